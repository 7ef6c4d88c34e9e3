"""What tests share: engines, servers, worlds, runs. Programs among it are started by `program`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
