"""A model behind a real vLLM server plays the user: what this one says is worth nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.remote.config import RemoteConfig
from envs.types import Message, StopReason, Task
from tests.support.episodes import LengthGrader, World
from tests.support.scripted_engine import Writer
from trainer.config import RolloutConfig
from trainer.rollouts.model_users import ModelUsers, build_users
from trainer.rollouts.worker import RolloutWorker
from trainer.templates.chat import Chat
from trainer.types import RolloutRequest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]
TASK = Task(task_id="t", messages=(Message(role="user", content="A mug, please."),), item={"wish": "a large red mug"})


async def test_a_model_behind_a_server_plays_the_user_and_says_the_same_for_the_same_rollout(
    judge_url: str, smollm2: Path
) -> None:
    user = {"type": "model", "base_url": judge_url, "model": "judge", "max_tokens": 24}
    world = RemoteConfig.model_validate({"user": user | {"prompt": "You want {{ item.wish }}. You talk to a shop."}})
    users, chat = build_users(world), Chat(smollm2)
    assert isinstance(users, ModelUsers)
    worker = RolloutWorker(
        world=World({}),
        grader=LengthGrader(),
        chat=chat,
        engine=Writer(chat, lambda prompt, seed: "Which colour do you want?"),
        config=RolloutConfig(max_user_turns=2, max_turn_tokens=32, max_episode_tokens=600),
        users=users,
    )
    requests = [RolloutRequest(task=TASK, rollout_id=f"r{i}", seed=i // 2) for i in range(4)]
    rollouts = await worker.run(requests, temperature=1.0)
    metrics = users.take_metrics()
    await users.aclose()
    replies = [tuple(turn.reply for turn in rollout.episode.turns) for rollout in rollouts]
    assert replies[0] == replies[1] and replies[2] == replies[3] and replies[0] != replies[2]
    for rollout, said in zip(rollouts, replies, strict=True):
        assert rollout.episode.stop_reason is StopReason.MAX_USER_TURNS and rollout.grade is not None
        assert [reply is not None for reply in said] == [True, True, False]
        assert said[0] in chat.decode(rollout.ledgers[0].prompt_ids)
    assert metrics["user/requests"] == 12 and metrics["user/tokens"] > 0
