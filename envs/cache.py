"""Where what took long to make is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$AGENT_RFT_CACHE`, or `~/.cache/agent-rft`. It need not exist."""
    return Path(os.environ.get("AGENT_RFT_CACHE") or Path.home() / ".cache" / "agent-rft").expanduser()
