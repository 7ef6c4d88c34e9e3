"""What the scripts share: quick answers to a question or a slip, options in any order, and an orderly end."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.scripts import script_at_work, wait_for
from tests.support.written_runs import make_rollout, write_run

SCRIPTS = ["train", "preflight", "grade", "compare", "report", "sweep", "rehearse_gpu", "watch", "chat"]
SCRIPTS += ["export", "serve"]
# Runs a script as its user does, and tells at the end what it had loaded of what takes long.
CHILD = """
import atexit, runpy, sys
slow = ("pydantic", "aiohttp", "numpy", "torch", "transformers", "vllm")
atexit.register(lambda: print("loaded:", *[m for m in slow if m in sys.modules]))
sys.argv = sys.argv[1:]
sys.path[0] = "scripts"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ended(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, f"scripts/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_misspelt_option_are_answered_before_anything_slow_is_loaded(script: str) -> None:
    asked = ended(script, "--help")
    assert asked.returncode == 0 and asked.stdout.startswith("usage: ") and asked.stdout.endswith("loaded:\n")
    slipped = ended(script, "--confog")
    assert (slipped.returncode, slipped.stdout) == (2, "loaded:\n")
    assert f"{script}.py: error: " in slipped.stderr and slipped.stderr.startswith("usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_packages_is_told_in_one_line_where_they_are(script: str) -> None:
    command = [sys.executable, "-E", "-s", "-S", f"scripts/{script}.py", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1 and not told.stdout
    assert re.fullmatch(r"error: envs is not installed for \S+: run `make setup` once, .*\n", told.stderr)


def test_values_may_stand_before_between_and_behind_the_options() -> None:
    words = ["optim.num_steps=a", "--config", "configs/quickstart.yaml", "seed=b", "--check", "rollout.group_size=c"]
    said = ended("train", *words)
    assert said.returncode == 2 and "3 problems" in said.stderr
    assert all(key in said.stderr for key in ("optim.num_steps", "seed", "rollout.group_size"))


def test_the_sweep_of_the_docs_runs_every_combination_and_ends_with_a_table(tmp_path: Path) -> None:
    [shown] = re.findall(r"^    python (scripts/sweep\.py .*)$", (ROOT / "docs" / "runs.md").read_text(), re.M)
    run = write_run(tmp_path / "run", {"evals/step-000000.jsonl": [make_rollout("a", reward=0.0)]})
    write_run(run, {"evals/step-000001.jsonl": [make_rollout("a", reward=1.0)]})
    steps = [{"step": step, "eval/rollouts": 1.0, "eval/reward": float(step)} for step in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    stand_in = tmp_path / "train.py"
    stand_in.write_text(
        "import pathlib, shutil, sys\n"
        "folder = sys.argv[-1].removeprefix('output_dir=')\n"
        f"shutil.copytree({str(run)!r}, folder)\n"
        f"open({str(tmp_path / 'started')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    )
    command = [sys.executable, *shlex.split(shown.replace("configs/mine.yaml", "configs/quickstart.yaml"))]
    command += [f"output_dir={tmp_path / 'runs'}", "optim.num_steps=1"]
    command += ["--launch", shlex.join([sys.executable, str(stand_in)])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    names = [f"seed={s}-optim.learning_rate={r}" for s, r in itertools.product((0, 1, 2), ("1e-4", "3e-4"))]
    started = (tmp_path / "started").read_text().splitlines()
    assert [line.rpartition("/")[2] for line in started] == names
    assert all("scripts/train.py --config configs/quickstart.yaml " in line for line in started)
    assert all(" optim.num_steps=1 seed=" in line for line in started)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| seed=")]
    assert [row.split(" ")[1] for row in rows] == names and all("0.000 → 1.000" in row for row in rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_interrupts_a_sweep_interrupts_its_run_once_and_waits_for_its_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    stand_in = tmp_path / "train.py"
    stand_in.write_text(
        "import pathlib, sys, time\n"
        "from envs.terminal import end_on_signals\n"
        "end_on_signals()\n"
        f"state = pathlib.Path({str(tmp_path / 'state')!r})\n"
        "state.write_text('at work')\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        "    state.write_text('cleared up')\n"
        "    sys.exit(130)\n"
    )
    arguments = ["--config", "configs/quickstart.yaml", "--set", "seed=0,1", f"output_dir={tmp_path / 'runs'}"]
    arguments += ["--launch", shlex.join([sys.executable, str(stand_in)])]
    with script_at_work("sweep", *arguments) as sweep:
        wait_for((tmp_path / "state").exists, sweep)
        sweep.send_signal(number)
        said, errors = sweep.communicate(timeout=60)
    assert (sweep.returncode, errors.strip()) == (130, "interrupted")
    assert (tmp_path / "state").read_text() == "cleared up" and said.count("---") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_only_grades_is_ended_by_signals_as_the_others_are(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio, pathlib\n"
        "class Slow:\n"
        "    async def grade(self, task, episode):\n"
        f"        pathlib.Path({str(tmp_path / 'asked')!r}).write_text('')\n"
        "        await asyncio.sleep(60)\n"
        "        return 1.0\n"
    )
    grader = {"type": "custom", "target": f"{tmp_path / 'mine.py'}:Slow", "pass_threshold": 1.0}
    (tmp_path / "grader.yaml").write_text(json.dumps({"grader": grader}))
    (tmp_path / "samples.jsonl").write_text('{"item": {"answer": "1"}, "model_sample": "1"}\n')
    files = ["--grader", str(tmp_path / "grader.yaml"), "--samples", str(tmp_path / "samples.jsonl")]
    with script_at_work("grade", "run", *files) as grading:
        wait_for((tmp_path / "asked").exists, grading)
        grading.send_signal(number)
        _, errors = grading.communicate(timeout=60)
    assert (grading.returncode, errors.strip()) == (130, "interrupted")


def test_a_check_that_is_interrupted_has_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal, time\n"
        "class Mine:\n"
        "    async def grade(self, task, episode):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "        return 0.0\n"
    )
    command = ["scripts/train.py", "--config", "configs/quickstart.yaml", "--check", f"output_dir={tmp_path / 'run'}"]
    command += [f"grader={{type: custom, target: '{tmp_path / 'mine.py'}:Mine', pass_threshold: 1}}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted"
