"""Graders that ask a model, and the models that they ask."""
