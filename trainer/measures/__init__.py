"""Figures of rollouts: what they are called, how they are taken, and how sure they are."""
