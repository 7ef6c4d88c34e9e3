"""Train or resume: `python scripts/train.py --config configs/quickstart.yaml optim.learning_rate=2e-5`.

`accelerate launch scripts/train.py ...` runs it on several GPUs. Exit codes: 0 done, 2 something in the input is wrong
(nothing was loaded), 1 anything else, 130 interrupted; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path

from envs.errors import UserError
from trainer.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example optim.learning_rate=2e-5")
    arguments = parser.parse_args()
    is_main = os.environ.get("RANK", "0") == "0"
    # Ended as Ctrl-C ends it: the engine's processes would otherwise outlive the run and keep its memory.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # vLLM warns while it is imported, before there is a log to write to.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        config = load_config(arguments.config, arguments.overrides)
        # Heavy imports only once the config is known to be good.
        from trainer.train import train

        folder = train(config)
    except UserError as e:
        if is_main:
            print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main:
            print("interrupted; the same command resumes the run", file=sys.stderr)
        return 130
    if is_main:
        print_result(folder)
    return 0


def print_result(folder: Path) -> None:
    """The table before and after, where everything lies, and how to serve it."""
    from rich.console import Console

    from trainer.report import render_terminal_table

    about = json.loads((folder / "run.json").read_text())
    console = Console()
    console.print(render_terminal_table(folder))
    console.print(f"report   {folder / 'report.html'}\nadapter  {about['adapter']}\nserve it with:", highlight=False)
    print(about["serve_command"])


if __name__ == "__main__":
    sys.exit(main())
