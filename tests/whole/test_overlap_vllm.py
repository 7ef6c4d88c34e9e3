"""Rollouts that run ahead of the training on the real engine: every publish is proved while episodes are under way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.configs import scripted_config
from tests.support.run_server import lines
from trainer.config import RunConfig
from trainer.engines.local import VllmEngine
from trainer.train import train

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_process"),
]
NUM_STEPS = 3


@pytest.mark.parametrize(
    ("publish", "pin", "ahead"),
    [
        ("lora", "turn", 1),
        # As slow as the first, whose ground they share: with `make test-learning`.
        pytest.param("lora", "episode", 2, marks=pytest.mark.learning),
        pytest.param("merged", "turn", 1, marks=pytest.mark.learning),
    ],
)
def test_every_publish_is_proved_while_episodes_are_under_way(
    taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: str, pin: str, ahead: int
) -> None:
    under_way: list[int] = []
    load = VllmEngine.publish

    async def noted(engine: VllmEngine, weights: Path, version: int) -> None:
        under_way.append(engine._live_requests.total())
        await load(engine, weights, version)

    monkeypatch.setattr(VllmEngine, "publish", noted)
    config = scripted_config(
        tmp_path / "run",
        taught_model,
        overlap={"max_staleness": ahead, "pin": pin},
        engine={"publish": publish, "enforce_eager": True, "kv_cache_gib": 1, "max_num_seqs": 4},
        rollout={"max_turns": 6, "max_turn_tokens": 64},
        optim={"num_steps": NUM_STEPS},
        eval={"num_tasks": 1},
    ) | {"penalties": {"tool_calls": {"free": 0, "slope": 0.04, "floor": -0.3}}}
    folder = train(RunConfig.model_validate(config))

    steps = [row for row in lines(folder / "metrics.jsonl") if "loss/grad_norm" in row]
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    for row in steps:
        assert row["canary/mismatch"] < 0.02
        assert row.get("canary/applied_since_model", 1) == pytest.approx(1, abs=0.25)
        assert row["staleness/max"] <= ahead and row["staleness/dropped"] == 0
    assert max(row["staleness/max"] for row in steps) > 0
    versions = [
        {version for ledger in rollout["ledgers"] for *_, version in ledger["sampled"]}
        for path in sorted((folder / "rollouts").glob("step-*.jsonl"))
        for rollout in map(json.loads, path.read_text().splitlines())
    ]
    if publish == "merged":
        assert max(under_way) == 0, "weights change between turns"
    else:
        assert max(under_way) > 0, "turns go on under the adapter that they began with"
    if pin == "episode":
        assert max(map(len, versions)) == 1
    else:
        assert max(map(len, versions)) > 1, "no episode went on under newer weights"
