"""Tied groups are replaced by fresh tasks in the same step, also in a run that was interrupted in the midst of one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from envs.finance.world import FinanceWorld
from tests.support.configs import scripted_config
from tests.support.scripted_engine import engine_starter, finance_script
from trainer.config import RunConfig
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def run(folder: Path, model: Path, *, fails_at: int | None = None) -> tuple[RunConfig, list[int]]:
    """Two steps in which many groups are tied; the seeds that the engine was asked for, in order."""
    sections = {
        "world": {"num_train_tasks": 9},
        "rollout": {"tied_groups": "replace", "group_size": 2, "tasks_per_step": 3, "replacement_rounds": 2},
        "optim": {"num_steps": 2},
        "eval": {"every_steps": 0, "num_tasks": 1},
    }
    config = RunConfig.model_validate(scripted_config(folder, model, **sections))
    plain, seeds = finance_script(FinanceWorld(config.world)), []

    def script(prompt: str, seed: int) -> str:
        seeds.append(seed)
        if len(seeds) == fails_at:
            raise RuntimeError("the machine is gone")
        return plain(prompt, seed)

    train(config, start_engine=engine_starter(script))
    return config, seeds


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tied_groups_are_replaced_and_an_interrupted_step_goes_on_with_the_same_tasks(tiny_model, tmp_path):
    config, seeds = run(tmp_path / "whole", tiny_model)
    metrics = [row for row in lines(config.output_dir / "metrics.jsonl") if "groups/replacements" in row]
    assert sum(row["groups/replacements"] for row in metrics) > 0
    for row in metrics:
        rows = lines(config.output_dir / "rollouts" / f"step-{row['step']:06d}.jsonl")
        assert len(rows) == row["train/rollouts"] == 2 * (3 + row["groups/replacements"])
        taught = (1 - row["groups/tied_share"]) * len(rows) / 2
        assert taught == pytest.approx(len(rows) / 2 - row["groups/skipped"])
        # Full, or the rounds are used up; never more than asked for.
        assert taught <= 3.001
        tasks = Counter(row["task"]["task_id"] for row in rows)
        assert set(tasks.values()) == {2}, "no task comes twice while there are others"

    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path / "cut", tiny_model, fails_at=len(seeds) * 2 // 3)
    done = [row["episode"]["rollout_id"] for f in (tmp_path / "cut" / "rollouts").iterdir() for row in lines(f)]
    _, again = run(tmp_path / "cut", tiny_model)
    rolled = [row["episode"]["rollout_id"] for f in (tmp_path / "cut" / "rollouts").iterdir() for row in lines(f)]
    assert len(rolled) == len(set(rolled)) and set(done) < set(rolled) and len(again) < len(seeds)
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]
