"""Train or resume: `python scripts/train.py --config configs/quickstart.yaml optim.learning_rate=2e-5`.

`accelerate launch scripts/train.py ...` runs it on several GPUs. Exit codes: 0 done, 2 something in the input is wrong
(nothing was loaded), 1 anything else (what only the run at work could show of your loss, grader or tasks included), 130
interrupted; the same command resumes.

`--check` looks at config, rows, tools, graders and servers, says what it found, and trains nothing.

`--hosted-job job.json` takes a job of the hosted service and says what it could not take over; `--config` and KEY=VALUE
add what the hosted service never knew and go before the job. `--write-config run.yaml` writes it as a config and runs
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from program import FoundLate, UserError, console, run, say, was_interrupted

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.hosted.job import TakenJob

HOSTED_ONLY = ("training_file", "validation_file", "write_config")


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    # Only now: --help and a misspelt option answer at once.
    from envs.reading.documents import check_writable
    from trainer.config import load_config

    is_main = os.environ.get("RANK", "0") == "0"
    # vLLM warns while it is imported, before there is a log to write to.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        if arguments.write_config is not None:
            check_writable(arguments.write_config, "--write-config")
        if (job := _hosted_job(arguments)) is None:
            config = load_config(arguments.config, arguments.overrides)
            if arguments.check:
                return _check(config)
            folder = _train(config)
        else:
            if is_main:
                for remark in job.remarks:
                    say(f"{job.source}: {remark}")
            if arguments.write_config is not None:
                _write(arguments.write_config, job)
                return 0
            if arguments.check:
                return _check(job.config)
            folder = _train_job(job, is_main=is_main)
    except (Exception, KeyboardInterrupt) as e:
        if was_interrupted(e):
            # A terminal that was closed takes no more words.
            with contextlib.suppress(OSError):
                if is_main:
                    looks = arguments.check or arguments.write_config is not None
                    say("interrupted" if looks else "interrupted; the same command resumes the run", file=sys.stderr)
            return 130
        if not isinstance(e, UserError):
            raise
        if is_main or isinstance(e, FoundLate):
            say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    if is_main:
        print_result(folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; see configs/")
    parser.add_argument("--check", action="store_true", help="check everything that can be wrong, and end")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example optim.learning_rate=2e-5")
    hosted = parser.add_argument_group("from the hosted service")
    hosted.add_argument("--hosted-job", type=Path, metavar="JSON", help="a fine-tuning job's JSON")
    hosted.add_argument("--training-file", type=Path, metavar="JSONL", help="the rows behind the job's training_file")
    hosted.add_argument("--validation-file", type=Path, metavar="JSONL", help="likewise")
    hosted.add_argument(
        "--write-config", type=Path, metavar="YAML", help="write the config that the job makes, and end"
    )
    return parser


def _hosted_job(arguments: argparse.Namespace) -> TakenJob | None:
    if arguments.hosted_job is None:
        for name in HOSTED_ONLY:
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: only with --hosted-job")
        if arguments.config is None:
            raise UserError("--config: required, but for --hosted-job")
        return None
    from trainer.hosted.job import take_job

    return take_job(
        arguments.hosted_job,
        config=arguments.config,
        overrides=arguments.overrides,
        training_file=arguments.training_file,
        validation_file=arguments.validation_file,
    )


def _check(config: RunConfig) -> int:
    from trainer.preflight.check import check_run

    for what, found in check_run(config):
        say(f"{what:<13}{found}")
    say("nothing is wrong that can be seen before the model's weights are loaded; nothing was trained")
    return 0


def _train(config: RunConfig, *, beside: Mapping[str, str] | None = None) -> Path:
    # Heavy imports only once the config is known to be good.
    from trainer.train import train

    return train(config, beside=beside)


def _train_job(job: TakenJob, *, is_main: bool) -> Path:
    """Train, and leave the config with what is said of it in the run folder, which the run itself lays out."""
    folder = _train(job.config, beside={"hosted_job.yaml": job.to_yaml()})
    if is_main:
        say(f"config    {folder / 'hosted_job.yaml'}")
    return folder


def _write(path: Path, job: TakenJob) -> None:
    try:
        path.write_text(job.to_yaml(), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--write-config {path}: {e.strerror or e}") from e
    say(f"config    {path}")


def print_result(folder: Path) -> None:
    """The table before and after, where everything lies, and how to serve it."""
    from trainer.reports.run_report import before_after_table, before_and_after
    from trainer.reports.tables import to_terminal
    from trainer.runs.about import read_about, serve_command_of

    adapter = folder / "adapter"
    shown = console()
    if comparison := before_and_after(folder):
        shown.print(to_terminal(before_after_table(comparison)))
    report = folder / "report.html"
    lost = "" if report.is_file() else f" is missing; `python scripts/report.py {folder}` writes it anew"
    shown.print(f"report   {report}{lost}\nadapter  {adapter}", highlight=False, markup=False)
    say(f"talk to it with python scripts/chat.py {shlex.quote(str(folder))}, export it with scripts/export.py")
    say("serve it with:")
    say(serve_command_of(read_about(folder), adapter))


if __name__ == "__main__":
    run(main)
