"""Takes README's picture of a run's report: `python docs/picture.py runs/quickstart`. Needs Chromium and its driver."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from browser import browser  # noqa: E402

WIDTH, HEIGHT = 1000, 790


def main(run: Path) -> None:
    """The top of its report.html, as wide as README shows it."""
    with browser(width_px=WIDTH, height_px=HEIGHT) as window:
        window.open((run / "report.html").resolve().as_uri())
        (ROOT / "docs" / "report.png").write_bytes(base64.b64decode(window.command("GET", "screenshot")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
