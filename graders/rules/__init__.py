"""Graders that compare an answer with a text or a number, by rule."""
