"""A step of the example of several user turns on a real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from trainer.config import load_config
from trainer.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]
SMALL = [
    "model.dtype=float32",
    "warmstart={num_steps: 1, episodes_per_step: 4}",
    "optim.num_steps=1",
    "rollout.tasks_per_step=2",
    "rollout.group_size=2",
    "rollout.max_turns=4",
    "eval={num_tasks: 2, samples_per_task: 1}",
    "engine.kv_cache_gib=1",
]


def test_a_step_of_the_example_runs_on_a_real_engine(
    taught_model: Path, one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [*SMALL, f"model.name={taught_model}", f"output_dir={tmp_path / 'run'}"]
    folder = train(load_config(ROOT / "configs" / "shop_customer.yaml", overrides))
    trained, evaluated = (
        [json.loads(line)["episode"] for file in files for line in file.read_text().splitlines()]
        for files in (folder.glob("rollouts/*.jsonl"), folder.glob("evals/*.jsonl"))
    )
    assert (len(trained), len(evaluated)) == (4, 2 + 2)
    assert replies_in([*trained, *evaluated]) > 0, "no customer was heard"
    assert all("order" in episode["state"] for episode in [*trained, *evaluated])
    (step,) = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines() if "train/" in x]
    # What this model says is chance; a step in which no customer spoke has no figure of theirs.
    assert step.get("train/user_turns", 0.0) == replies_in(trained) / 4 and step["train/masked_rollouts"] == 0


def replies_in(episodes: list[dict[str, Any]]) -> int:
    return sum(turn["reply"] is not None for episode in episodes for turn in episode["turns"])
