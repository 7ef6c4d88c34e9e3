"""Exact resume (invariant 7): whenever a run is killed, it ends with the same adapter bytes."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from envs.errors import UserError
from tests.support.run_server import SMALL, Server, lines, metrics, num_rollouts, write_config
from trainer.config import load_config
from trainer.train import train

NUM_STEPS = 12
NUM_KILLS = 10


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tiny_model: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "uninterrupted"
    server.start(write_config(folder, tiny_model, NUM_STEPS, **SMALL))
    assert server.wait() == 0
    return folder


def rollouts(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """By file and by rollout id without the run's own id: what was sampled, and its grade."""
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    out: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / kind).glob("step-*.jsonl")):
        rows = lines(path)
        out[path.name] = {
            row["episode"]["rollout_id"].removeprefix(run_id): (row["ledgers"], row["grade"]["reward"]) for row in rows
        }
        assert len(out[path.name]) == len(rows), f"{path} holds a rollout twice"
    return out


def assert_equal_runs(folder: Path, expected: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (expected / "adapter" / name).read_bytes(), name
    assert metrics(folder) == metrics(expected)
    for kind in ("rollouts", "evals"):
        assert rollouts(folder, kind) == rollouts(expected, kind)


def test_the_uninterrupted_run_learned_something_at_every_step(uninterrupted):
    rows = [row for row in metrics(uninterrupted) if "loss/grad_norm" in row]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert sum(row["loss/grad_norm"] > 0 for row in rows) >= NUM_STEPS - 2
    assert [row["step"] for row in metrics(uninterrupted) if "eval/reward" in row] == [0, 3, 6, 9, 12]


def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bytes(server, uninterrupted, tiny_model, tmp_path):
    folder = tmp_path / "killed"
    config = write_config(folder, tiny_model, NUM_STEPS, **SMALL)
    rng = random.Random(20)
    step_s = median(row["time/step_s"] for row in lines(uninterrupted / "metrics.jsonl") if "time/step_s" in row)
    # Rollouts written at the moment of the kill (4 a step); a delay of up to one step lets it fall into training,
    # publishing and checkpoints too.
    thresholds = sorted(rng.sample(range(4 * NUM_STEPS - 12), NUM_KILLS))
    for threshold in thresholds:
        pid = server.start(config)
        deadline = time.monotonic() + 120
        while num_rollouts(folder) <= threshold and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, step_s))
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, "the run had ended before it could be killed"
    assert not (folder / "adapter").exists()
    server.start(config)
    assert server.wait() == 0
    assert_equal_runs(folder, uninterrupted)


def test_a_torn_line_and_a_half_written_checkpoint_are_left_behind(server, tiny_model, tmp_path):
    folder, expected = tmp_path / "torn", tmp_path / "whole"
    config = write_config(folder, tiny_model, 3, **SMALL)
    server.start(config)
    assert server.wait() == 0
    shutil.copytree(folder, expected)

    # As after a kill in the third step: checkpoint 2 is the last, the next one half written.
    shutil.rmtree(folder / "adapter")
    about = json.loads((folder / "run.json").read_text())
    del about["finished_steps"]
    (folder / "run.json").write_text(json.dumps(about))
    half = (folder / "checkpoints" / "step-000003").rename(folder / "checkpoints" / ".unfinished-step-000003")
    (half / "policy.safetensors").write_bytes(b"half")
    in_flight = folder / "rollouts" / "step-000003.jsonl"
    before = in_flight.read_text().splitlines()
    in_flight.write_text("\n".join([*before[:3], before[3][:1000]]))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: text.rstrip().rfind("\n") + 40])

    server.start(config)
    assert server.wait() == 0
    assert_equal_runs(folder, expected)
    after = in_flight.read_text().splitlines()
    assert after[:3] == before[:3], "finished rollouts are kept as they were, their timings included"
    assert not list((folder / "checkpoints").glob(".unfinished-*"))


@pytest.mark.usefixtures("one_thread")
def test_a_second_run_on_the_folder_is_refused_touches_nothing_and_may_have_it_after_a_kill(
    server, uninterrupted, tiny_model, tmp_path
):
    folder = tmp_path / "shared"
    path = write_config(folder, tiny_model, NUM_STEPS, **SMALL)
    pid = server.start(path)
    while num_rollouts(folder) <= 6:
        time.sleep(0.005)
    # Stopped in its tracks, so that whatever changes is the other's doing.
    os.kill(pid, signal.SIGSTOP)
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    config = load_config(path)
    with pytest.raises(UserError, match=f"output_dir {folder}: is in use by process {pid} on {os.uname().nodename}"):
        train(config, beside={"hosted_job.yaml": "x"})
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    server.start(path)
    assert server.wait() == 0
    assert_equal_runs(folder, uninterrupted)
