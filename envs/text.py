"""Texts of models, servers and users, cut for show."""

from __future__ import annotations


def shown(text: str, most: int) -> str:
    """The text, or its first `most` characters and …"""
    return text if len(text) <= most else text[:most] + "…"


def both_ends(text: str, most: int) -> str:
    """The text, or its first quarter of `most` characters, … and its end: a traceback says at its end what it was."""
    return text if len(text) <= most else f"{text[: most // 4]} … {text[-(most - most // 4) :]}"


def one_line(text: str, most: int) -> str:
    """As `shown`, each run of white space as one space."""
    return shown(" ".join(text.split()), most)


def quoted(text: str, most: int) -> str:
    """As `shown`, in quotes, and safe to write anywhere: `repr` escapes half characters and control characters."""
    return repr(shown(text, most))
