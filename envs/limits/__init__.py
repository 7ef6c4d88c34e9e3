"""Limits on time and threads."""
