"""Texts of models, servers and users, cut for show."""

from __future__ import annotations


def shown(text: str, most: int) -> str:
    """The text, or its first `most` characters and …"""
    return text if len(text) <= most else text[:most] + "…"


def one_line(text: str, most: int) -> str:
    """As `shown`, each run of white space as one space."""
    return shown(" ".join(text.split()), most)


def quoted(text: str, most: int) -> str:
    """As `shown`, in quotes, and safe to write anywhere: `repr` escapes half characters and control characters."""
    return repr(shown(text, most))
