"""The example of several user turns: its tasks and its expert; a step of its run: test_shop_customer_vllm.py."""

from __future__ import annotations

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
