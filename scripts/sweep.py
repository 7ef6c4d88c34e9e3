"""Run one config with several values: `python scripts/sweep.py configs/sweep/quickstart.yaml`.

The file names a base config, the settings to try, and how: a grid, at random or by TPE, so many at once, judged by a
figure of the held-out evaluation. The same command goes on with a sweep that was interrupted or killed. It leaves
`report.html` and `best.yaml` in the sweep's folder. `KEY=VALUE` behind the file holds for all trials.

`python scripts/sweep.py --config configs/quickstart.yaml --set seed=0,1,2` needs no file: every combination of the
values is a run of `scripts/train.py` under the config's `output_dir`, one after the other, and a Markdown table closes
it. Exit codes as `scripts/train.py`; there a run that fails ends the sweep with its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from program import UserError, run, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="SWEEP.yaml | KEY=VALUE", help="the sweep; what holds for all runs")
    parser.add_argument("--launch", metavar="COMMAND", help="what starts scripts/train.py; before the sweep's own")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier call")
    alone = parser.add_argument_group("without a file")
    alone.add_argument("--config", type=Path, metavar="YAML", help="the config of all runs")
    alone.add_argument("--set", action="append", default=[], metavar="KEY=V1,V2", help="values to go through")
    arguments = parser.parse_intermixed_args()
    # Only now: --help and a misspelt option answer at once.
    from trainer.sweeps.sweep import run_sweep
    from trainer.sweeps.values import run_values

    files = [word for word in arguments.words if "=" not in word or Path(word).is_file()]
    overrides = [word for word in arguments.words if word not in files]
    how = {"train": Path(__file__).with_name("train.py"), "launch": arguments.launch}
    try:
        if arguments.config is not None:
            if files or arguments.retry_failed:
                raise UserError(f"{(*files, '--retry-failed')[0]}: not with --config; expected KEY=VALUE")
            return run_values(arguments.config, overrides, arguments.set, **how)
        if len(files) != 1 or arguments.set:
            raise UserError("expected a sweep's file, such as configs/sweep/quickstart.yaml, or --config and --set")
        return run_sweep(Path(files[0]), overrides, retry_failed=arguments.retry_failed, **how)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    run(main)
