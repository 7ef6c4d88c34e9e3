"""Rollouts that run ahead of the training: as stale as allowed and no staler, resumed without loss, one run of two."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import PublishError, UserError
from envs.finance.world import FinanceWorld
from tests.support import ROOT
from tests.support.configs import scripted_config
from tests.support.run_server import Server, lines, num_rollouts
from tests.support.scripted_engine import Faults, ScriptedEngine, engine_starter, finance_script
from trainer.config import RunConfig
from trainer.engines.engine import Completion, EngineStart, Sampling
from trainer.runs.manifest import checkpoints
from trainer.train import train

NUM_STEPS = 8
NUM_KILLS = 5
MINE = """
class Mine:
    runs_here = publishes_merged = False
    async def start(self, given): ...
    async def generate(self, prompt_ids, sampling): ...
    async def score(self, token_ids): ...
    async def publish(self, weights, version): ...
    def shutdown(self): ...
    {has}
"""


def overlapping(folder: Path, model: Path, **sections: dict[str, object]) -> dict[str, Any]:
    eight: dict[str, object] = {"num_steps": NUM_STEPS}
    return scripted_config(folder, model, **{"overlap": {"max_staleness": 1}, "optim": eight} | sections)


def run(config: dict[str, Any], faults: Faults | None = None) -> Path:
    read = RunConfig.model_validate(config)
    return train(read, start_engine=engine_starter(finance_script(FinanceWorld(read.world)), faults))


def trained(folder: Path) -> list[dict[str, Any]]:
    return [row for row in lines(folder / "metrics.jsonl") if "loss/grad_norm" in row]


def ids(folder: Path) -> dict[int, list[str]]:
    """Of every step its rollouts, without the run's own id; asserts that there is none twice."""
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    out: dict[int, list[str]] = {}
    for path in (folder / "rollouts").glob("step-*.jsonl"):
        out.setdefault(int(path.name[5:11]), []).extend(
            row["episode"]["rollout_id"].removeprefix(run_id) for row in lines(path)
        )
    assert all(len(set(step)) == len(step) for step in out.values())
    return {step: sorted(rollout_ids) for step, rollout_ids in sorted(out.items())}


# --- how old tokens are


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ahead", [1, 2])
def test_tokens_are_as_old_as_allowed_and_no_older(tiny_model: Path, tmp_path: Path, ahead: int) -> None:
    config = overlapping(
        tmp_path / "run", tiny_model, overlap={"max_staleness": ahead}, optim={"num_steps": 5}, eval={"every_steps": 2}
    )
    folder = run(config)
    rows = trained(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["staleness/max"] for row in rows][:2] == [0, 1]
    assert max(row["staleness/max"] for row in rows) == ahead
    assert all(row["staleness/dropped"] == 0 <= row["staleness/mean"] <= row["staleness/max"] for row in rows)
    assert all(row["canary/mismatch"] < 1e-5 for row in rows), "every publish was proved"
    assert all(row["time/waiting_for_rollouts_s"] <= row["time/step_s"] for row in rows)
    assert sum(row["time/waiting_for_trainer_s"] for row in rows) > 0
    for path in sorted((folder / "rollouts").iterdir()):
        step = int(path.name[5:11])
        versions = [v for row in lines(path) for ledger in row["ledgers"] for *_, v in ledger["sampled"]]
        assert max(0, step - 1 - ahead) <= min(versions) <= max(versions) <= step - 1
    # What is learned from is weighted by how far the policy has moved since.
    stale = [row for row in rows if row["staleness/mean"] > 0]
    assert all(row["loss/mismatch_abs"] > 1e-3 for row in stale)
    assert rows[0]["loss/mismatch_abs"] < 1e-4
    assert max(row["loss/mismatch_abs"] for row in rows) > RunConfig.model_validate(config).engine.canary_mean_tolerance
    assert "sampled with other log-probabilities" not in (folder / "run.log").read_text(), "it is age, not the engine"
    evaluated = {}
    for path in (folder / "evals").iterdir():
        versions = {v for row in lines(path) for ledger in row["ledgers"] for *_, v in ledger["sampled"]}
        evaluated[int(path.name[5:11])] = versions
    assert evaluated == {step: {step} for step in (0, 2, 4, 5)}, "an evaluation is of one version"


class Laggard(ScriptedEngine):
    """Serves every version and calls it the first."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        return replace(await super().generate(prompt_ids, sampling), policy_version=0)


@pytest.mark.usefixtures("one_thread")
def test_rollouts_that_are_staler_than_allowed_are_counted_and_not_learned_from(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(overlapping(tmp_path / "run", tiny_model, optim={"num_steps": 3}))

    async def start(given: EngineStart) -> ScriptedEngine:
        engine = Laggard(finance_script(FinanceWorld(config.world)))
        await engine.start(given)
        return engine

    rows = trained(train(config, start_engine=start))
    assert [row["staleness/dropped"] for row in rows] == [0, 0, 8]
    assert [row["staleness/max"] for row in rows] == [0, 1, 0]
    assert rows[2]["loss/num_tokens"] == 0 and rows[1]["loss/num_tokens"] > 0


@pytest.mark.usefixtures("one_thread")
def test_an_engine_that_keeps_its_old_weights_is_found_out_while_episodes_are_under_way(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = overlapping(tmp_path / "run", tiny_model)
    with pytest.raises(PublishError, match=r"policy-v2 was published"):
        run(config, Faults(stale_from=2, delay_s=0.02))


# --- what is refused


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"engine": {"sleep": "kv"}}, r"engine.sleep: kv takes the engine away while the trainer trains"),
        ({"overlap": {"pin": "episode"}}, r"overlap.pin: episode has no effect where overlap.max_staleness is 0"),
        ({"overlap": {"max_staleness": 17}}, r"overlap.max_staleness"),
        ({"overlap": {"max_staleness": 1, "deadline_s": 0.5}}, r"overlap.deadline_s"),
    ],
)
def test_what_does_not_go_with_overlap_is_refused_by_its_config(
    tmp_path: Path, sections: dict[str, dict[str, object]], expected: str
) -> None:
    config = {"output_dir": str(tmp_path / "run"), "grader": {"type": "numeric"}, "overlap": {"max_staleness": 1}}
    with pytest.raises(ValueError, match=expected):
        RunConfig.model_validate(config | sections)


def test_pinned_episodes_need_an_engine_that_keeps_former_weights(tiny_model: Path, tmp_path: Path) -> None:
    config = overlapping(
        tmp_path / "run",
        tiny_model,
        overlap={"max_staleness": 1, "pin": "episode"},
        engine={"publish": "merged"},
    )
    with pytest.raises(UserError, match=r"overlap.pin: episode needs an engine that serves former weights"):
        train(RunConfig.model_validate(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ("def sleep(self): ...\n    def wake_up(self): ...", r"overlap.max_staleness: .* this engine sleeps then"),
        ("keeps_versions = 1", r"engine.target .*: keeps_versions: expected true or false, got 1"),
    ],
)
def test_an_engine_of_ones_own_that_cannot_is_refused_before_anything_is_loaded(
    tmp_path: Path, has: str, expected: str
) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(has=has))
    config = {
        "output_dir": str(tmp_path / "run"),
        "grader": {"type": "numeric"},
        "overlap": {"max_staleness": 1},
        "engine": {"type": "custom", "target": f"{tmp_path}/mine.py:Mine"},
    }
    with pytest.raises(UserError, match=expected):
        train(RunConfig.model_validate(config))
    assert not (tmp_path / "run").exists()


# --- going on


def test_a_run_killed_at_random_moments_loses_no_finished_rollout_and_makes_none_twice(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    paths = {}
    for name in ("whole", "killed"):
        config = overlapping(tmp_path / name, tiny_model, checkpoint={"every_steps": 2}, eval={"every_steps": 3})
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(config))
    server.start(paths["whole"])
    assert server.wait() == 0
    folder, rng = tmp_path / "killed", random.Random(3)
    kept: dict[Path, bytes] = {}
    # Rollouts written at the moment of the kill, 8 a step.
    for threshold in [*sorted(rng.sample(range(8 * NUM_STEPS - 32), NUM_KILLS)), None]:
        pid = server.start(paths["killed"])
        end = time.monotonic() + 120
        while threshold is not None and num_rollouts(folder) <= threshold and time.monotonic() < end:
            time.sleep(0.005)
        if threshold is not None:
            time.sleep(rng.uniform(0, 0.4))
            os.kill(pid, signal.SIGKILL)
        assert server.wait() == (0 if threshold is None else -signal.SIGKILL)
        for path, text in kept.items():
            assert path.read_bytes().startswith(text), f"{path} has lost finished rollouts"
        # The next step to be trained on, and the one that is ahead of it.
        newest = max((step for step, _ in checkpoints(folder)), default=0) + 2
        kept = {p: p.read_bytes() for p in (folder / "rollouts").iterdir() if int(p.name[5:11]) <= newest}
        kept = {path: text[: text.rfind(b"\n") + 1] for path, text in kept.items()}
    assert ids(folder) == ids(tmp_path / "whole"), "the same groups"
    assert [row["step"] for row in trained(folder)] == list(range(1, NUM_STEPS + 1))


def test_two_processes_run_ahead_together(tiny_model: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "two", tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(overlapping(folder, tiny_model, optim={"num_steps": 4})))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *command, "-m", "tests.support.scripted_run", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((folder / "rollouts").glob("step-000004*.jsonl"))) == 2, "each process rolled out its share"
    assert {step: len(rollout_ids) for step, rollout_ids in ids(folder).items()} == dict.fromkeys((1, 2, 3, 4), 8)
    assert [row["staleness/max"] for row in trained(folder)] == [0, 1, 1, 1]
