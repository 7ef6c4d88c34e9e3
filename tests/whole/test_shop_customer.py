"""The example of several user turns: its tasks, its expert and, on a real engine, a step of its run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from envs.registry import build_world
from envs.types import StopReason
from graders.build import build_grader
from graders.penalties import PenaltiesConfig
from tests.support import ROOT
from tests.support.scripted_engine import Writer
from trainer.config import RunConfig, load_config
from trainer.rollouts.worker import RolloutWorker
from trainer.tasks.expert import play_expert
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest

CONFIG = ROOT / "configs" / "shop_customer.yaml"
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


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_config(CONFIG)


def test_customers_change_their_mind_never_once_or_twice_and_splits_differ(config: RunConfig) -> None:
    world = build_world(config.world)
    train, held_out = world.tasks("train"), world.tasks("eval")
    assert {len(t.item["changes"]) for t in train} == {0, 1, 2}
    assert {t.task_id for t in train}.isdisjoint(t.task_id for t in held_out)
    assert world.tasks("train") == build_world(config.world).tasks("train")


async def test_the_expert_hears_each_change_and_leaves_the_order_that_is_wanted(
    config: RunConfig, smollm2: Path
) -> None:
    chat, world = Chat(smollm2), build_world(config.world)
    grader = build_grader(config.grader, PenaltiesConfig(), judge=None, tasks=world.tasks("train"))
    for task in world.tasks("train")[:6]:
        shown = await play_expert(task, world.expert_episode(task, 0), world=world)
        said = [m.content for m in shown.messages if m.role == "user"]
        assert said == [task.messages[-1].content, *task.item["changes"]]
        # The same words from a model, through a real rollout: what is graded is the order that is left.
        written = [
            chat.decode(chat.encode_assistant(shown.messages[:i], m, shown.tools)[:-1])
            for i, m in enumerate(shown.messages)
            if m.role == "assistant"
        ]
        rollout = await rolled_out(config, chat, written, grader, task)
        assert rollout.reward == 1.0 and rollout.episode.stop_reason is StopReason.ANSWERED
        assert [(m.role, m.content) for m in rollout.episode.messages] == [(m.role, m.content) for m in shown.messages]
        nothing = await rolled_out(config, chat, ["Done."] * 4, grader, task)
        assert nothing.reward == 0.0


async def rolled_out(config: RunConfig, chat: Chat, written: list[str], grader: Any, task: Any) -> Rollout:
    worker = RolloutWorker(
        world=build_world(config.world), grader=grader, chat=chat, engine=Writer(chat, written), config=config.rollout
    )
    (rollout,) = await worker.run([RolloutRequest(task=task, rollout_id="r", seed=0)], temperature=1.0)
    return rollout


@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_a_step_of_the_example_runs_on_a_real_engine(taught_model: Path, one_process: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train = [sys.executable, "scripts/train.py", "--config", str(CONFIG), *SMALL, f"output_dir={folder}"]
    train += [f"model.name={taught_model}"]
    result = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr
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
