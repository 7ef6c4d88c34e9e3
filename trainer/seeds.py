"""Chance that is a pure function of the config, the step and the task: the same in every process and after a resume."""

from __future__ import annotations

import hashlib


def hash_of(*parts: object) -> int:
    """A 64-bit number from any values, by their `str`; stable over processes and Python versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values; stable likewise."""
    return hash_of(*parts) >> 1
