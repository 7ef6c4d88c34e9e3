"""A world may keep what belongs to one event loop (a session, a pool, a queue): a run has one for all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from envs.base import ExpertTurn
from envs.tools import Tool, tool
from envs.types import Episode, Message, Task
from tests.support.configs import scripted_config
from tests.support.scripted_engine import call, engine_starter
from trainer.config import RunConfig
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Pool:
    """Answers from a task on the loop that asked first, as a client's session would; of no use on another."""

    def __init__(self) -> None:
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.opened: list[str] = []
        self.is_closed = False
        self._questions: asyncio.Queue[tuple[str, asyncio.Future[str]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, question: str) -> str:
        self.loops.add(asyncio.get_running_loop())
        if self._task is None:
            self._task = asyncio.create_task(self._answer())
        if self._task.done():
            raise RuntimeError("the loop to which this pool belongs is closed")
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._questions.put_nowait((question, answer))
        return await answer

    async def _answer(self) -> None:
        while True:
            question, answer = await self._questions.get()
            answer.set_result(f"{question}: 42")

    async def aclose(self) -> None:
        await self.ask("last")
        assert self._task is not None
        self._task.cancel()
        self.is_closed = True


POOLS: list[Pool] = []


class PooledEnv:
    def __init__(self, pool: Pool) -> None:
        @tool
        async def look(where: str) -> str:
            """Look.

            Args:
                where: a place
            """
            return await pool.ask(where)

        self.tools: Mapping[str, Tool] = {"look": look}
        self._pool = pool

    async def open(self, task: Task, rollout_id: str) -> None:
        await self._pool.ask("open")
        self._pool.opened.append(rollout_id)

    async def close(self, episode: Episode | None) -> None:
        await self._pool.ask("close")


class Pooled:
    """The world of `tests.whole.test_one_loop:Pooled`."""

    def __init__(self) -> None:
        self.pool = Pool()
        POOLS.append(self.pool)

    def make_env(self) -> PooledEnv:
        return PooledEnv(self.pool)

    def tasks(self, split: str) -> list[Task]:
        prompt = (Message(role="user", content="What is in the drawer?"),)
        return [Task(task_id=f"{split}-{i}", messages=prompt, item={"answer": "42"}) for i in range(2)]

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        return ((("look", {"where": "drawer"}),), "42")

    async def aclose(self) -> None:
        await self.pool.aclose()


def script(prompt: str, seed: int) -> str:
    if "drawer: 42" not in prompt:
        return call("look", where="drawer")
    return "42" if seed % 2 else "43"


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    warmstart: dict[str, object] = {"num_steps": 1, "episodes_per_step": 2}
    grader: dict[str, object] = {
        "type": "string_check", "name": "g", "operation": "eq",
        "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    }  # fmt: skip
    settings = scripted_config(tmp_path / "run", tiny_model, warmstart=warmstart, optim={"num_steps": 1})
    POOLS.clear()
    return settings | {"world": {"type": "custom", "target": "tests.whole.test_one_loop:Pooled"}, "grader": grader}


def test_experts_the_canary_rollouts_and_the_worlds_end_share_one_event_loop(config: dict[str, Any]) -> None:
    folder = train(RunConfig.model_validate(config), start_engine=engine_starter(script))
    (pool,) = POOLS
    assert len(pool.loops) == 1 and pool.is_closed
    assert len(list((folder / "rollouts").glob("*.jsonl"))) == 1
    played = [name.partition("-")[2].partition("-")[2] for name in pool.opened]
    assert [name.rpartition("-")[0] for name in played[:4]] == ["expert", "expert", "canary-0", "canary-0"]
    assert len(set(pool.opened)) == len(pool.opened) == 2 + 2 + 8 + 2 * 2, "no two environments go by one id"


def test_a_preflight_keeps_to_one_event_loop_too(config: dict[str, Any], tmp_path: Path) -> None:
    from trainer.preflight.measured import Options, preflight

    options = Options(out=tmp_path / "preflight", num_tasks=2, samples=2)
    preflight(RunConfig.model_validate(config), options, start_engine=engine_starter(script))
    (pool,) = POOLS
    assert len(pool.loops) == 1 and pool.is_closed
