"""Mirrors the packages; what tests share is in `tests.support`."""
