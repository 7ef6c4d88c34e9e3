"""Tool calls/s that one rollout worker sustains, against the limit that the tool's latency sets; and its CPU a turn.

    python scripts/bench/tool_calls.py [KEY=VALUE ...] [--rollouts 1000] [--calls 5] [--latency-ms 100] [--repeats 3]
    python scripts/bench/tool_calls.py --rollouts 1 64 1000 --calls 2 29 --arms "in process"

All rollouts are in flight at once, and each makes its calls one after the other, one a turn. The engine is a script: it
answers at once, or after --engine-ms, with tokens made beforehand, so that all the time is the worker's own (chat
template, parsing, schemas, ledger) and the tool's. With nothing but latencies the rate would be rollouts / latency, the
limit. CPU is that of this process, an episode's beginning and end included: other work on the machine moves it less
than it moves rates.

in process   an async tool that sleeps.
http         the same tool in another process, by the hosted protocol.
http alone   the same requests without a worker: what client, server and the cores that they share allow.

*Not covered*: a server on another machine, tools that run in threads, a real engine's own work in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from common import Figure, bench_config, parser, report, run_main
from sleeping_tool import raise_file_limit

from envs.base import ExpertTurn, World
from envs.errors import UserError
from envs.remote.config import RemoteConfig
from envs.remote.world import RemoteWorld
from envs.tools import Tool, call_tool, offered_tools, tool
from envs.types import Episode, Message, Task, ToolCall
from graders.types import Grade
from trainer.config import RolloutConfig
from trainer.engines.engine import Completion, Engine, Sampler, Sampling
from trainer.engines.watched import WatchedEngine
from trainer.models.machines import loaded_set_aside
from trainer.prepare import prepare
from trainer.rollouts.worker import RolloutWorker
from trainer.seeds import derive_seed
from trainer.templates.chat import Chat
from trainer.types import RolloutRequest

TEMPERATURE = 1.0
ARMS = ("in process", "http", "http alone")
SERVER = Path(__file__).with_name("sleeping_tool.py")


def lookup_tool(latency_s: float) -> Tool:
    @tool
    async def lookup(key: str) -> str:
        """Look a value up.

        Args:
            key: what to look for
        """
        await asyncio.sleep(latency_s)
        return f"the value of {key} is 42"

    return lookup


class InProcess:
    """A world of one tool; it is its own environment, for nothing is kept."""

    def __init__(self, offered: Tool) -> None:
        self.tools: Mapping[str, Tool] = {offered.name: offered}

    def make_env(self) -> InProcess:
        return self

    def tasks(self, split: str) -> Sequence[Task]:
        return ()

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        return ()

    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def close(self, episode: Episode | None) -> None: ...


class ScriptEngine:
    """A `Sampler` that answers with the tokens made for the request's seed: at once, or after a while."""

    def __init__(self, token_ids_by_seed: Mapping[int, list[int]], latency_s: float) -> None:
        self._token_ids_by_seed = token_ids_by_seed
        self._latency_s = latency_s

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        token_ids = self._token_ids_by_seed[sampling.seed]
        return Completion(token_ids=token_ids, logprobs=[-1.0] * len(token_ids), finished=True, policy_version=0)


class OneGrader:
    async def grade(self, task: Task, episode: Episode) -> Grade:
        return Grade(reward=1.0, parts={"one": 1.0})


def task_of(number: int, offered: Tool) -> Task:
    return Task(
        task_id=f"task-{number}",
        messages=(Message(role="user", content=f"Look up all the values of {number}."),),
        tools=(offered.name,),
        definitions={offered.name: offered.schema()},
    )


def call_of(number: int, turn: int) -> ToolCall:
    return ToolCall(call_id=f"call-{turn}", name="lookup", arguments=f'{{"key": "{number}-{turn}"}}')


def scripted_turns(
    chat: Chat, requests: Sequence[RolloutRequest], offered: Tool, num_calls: int
) -> dict[int, list[int]]:
    """The token ids of every turn, by the seed that the worker derives for it."""
    turns: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        for turn in range(num_calls + 1):
            calls = (call_of(number, turn),) if turn < num_calls else ()
            message = Message(role="assistant", content="" if calls else "They are all 42.", tool_calls=calls)
            token_ids = chat.encode_assistant(request.task.messages, message, [offered.schema()])
            turns[derive_seed(request.seed, turn)] = token_ids
    return turns


async def time_worker(
    world: World, chat: Chat, engine: Sampler, requests: Sequence[RolloutRequest], num_calls: int
) -> tuple[float, float]:
    """Seconds for all rollouts, and this process's CPU seconds. Raises `UserError` where one did not make its calls."""
    config = RolloutConfig(
        max_turns=num_calls + 1,
        max_tool_calls=num_calls,
        max_turn_tokens=4096,
        max_episode_tokens=100_000,
        world_retries=0,
    )
    worker = RolloutWorker(world=world, grader=OneGrader(), chat=chat, engine=engine, config=config)
    start, cpu_start = time.perf_counter(), time.process_time()
    rollouts = await worker.run(requests, temperature=TEMPERATURE)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    for rollout in rollouts:
        results = [result for turn in rollout.episode.turns for result in turn.results]
        if len(results) != num_calls or any(r.error or "42" not in r.output for r in results) or rollout.grade is None:
            raise UserError(f"a rollout did not make its calls: {rollout.episode.stop_reason} {rollout.episode.error}")
    return seconds, cpu_s


async def time_calls(world: RemoteWorld, requests: Sequence[RolloutRequest], num_calls: int) -> tuple[float, float]:
    """The same for those calls without a worker."""

    async def one(number: int, request: RolloutRequest) -> None:
        env = world.make_env()
        await env.open(request.task, request.rollout_id)
        tools = offered_tools(request.task, env.tools)
        for turn in range(num_calls):
            result = await call_tool(tools, call_of(number, turn), timeout_s=60)
            assert result.error is None, result.output
        await env.close(None)

    start, cpu_start = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            group.create_task(one(number, request))
    return time.perf_counter() - start, time.process_time() - cpu_start


@contextlib.contextmanager
def server_url(latency_s: float) -> Iterator[str]:
    command = [sys.executable, str(SERVER), "--latency-ms", str(latency_s * 1000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/call"
        finally:
            process.terminate()


async def measure(chat: Chat, url: str, given: argparse.Namespace, num_rollouts: int, num_calls: int) -> list[Figure]:
    """Each arm's calls/s, its share of the limit and its CPU a turn, a value per repeat; the warm-up is left out."""
    offered = lookup_tool(given.latency_ms / 1000)
    requests = [
        RolloutRequest(task=task_of(i // given.group_size, offered), rollout_id=f"bench-{i}", seed=i)
        for i in range(num_rollouts)
    ]
    script = ScriptEngine(scripted_turns(chat, requests, offered, num_calls), given.engine_ms / 1000)
    # As in a run; it asks for no more of an engine here than that it samples.
    engine = WatchedEngine(cast(Engine, script), limit_s=600)
    settings = {"name": "lookup", "server_url": url, "max_concurrency": num_rollouts}
    remote = RemoteWorld(RemoteConfig.model_validate({"type": "remote", "tools": [settings]}))
    timed: dict[str, list[tuple[float, float]]] = {arm: [] for arm in given.arms}
    for _ in range(1 + given.repeats):
        for arm, of_arm in timed.items():
            if arm == "http alone":
                of_arm.append(await time_calls(remote, requests, num_calls))
            else:
                world = InProcess(offered) if arm == "in process" else remote
                of_arm.append(await time_worker(world, chat, engine, requests, num_calls))
    await remote.aclose()
    limit = num_rollouts / ((given.latency_ms + given.engine_ms) / 1000)
    figures = []
    for arm, (_, *of_repeats) in timed.items():
        name = f"{arm}, {num_rollouts} in flight, {num_calls + 1} turns"
        rates = [num_rollouts * num_calls / seconds for seconds, _ in of_repeats]
        cpu_ms = [1000 * cpu_s / (num_rollouts * (num_calls + 1)) for _, cpu_s in of_repeats]
        figures.append(Figure(name=name, unit="calls/s", values=rates))
        figures.append(Figure(name=f"{name}: of the limit {limit:g}", unit="ratio", values=[r / limit for r in rates]))
        figures.append(Figure(name=f"{name}: CPU a turn", unit="ms", values=cpu_ms))
    return figures


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rollouts", type=int, nargs="+", default=[1000], help="in flight at once (default 1000)")
    arguments.add_argument("--calls", type=int, nargs="+", default=[5], help="of each rollout (default 5)")
    arguments.add_argument("--latency-ms", type=float, default=100.0, help="of the tool (default 100)")
    arguments.add_argument("--engine-ms", type=float, default=0.0, help="that a turn takes the engine (default 0)")
    arguments.add_argument("--group-size", type=int, default=8, help="rollouts of one task (default 8)")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all")
    given = arguments.parse_args()
    raise_file_limit()
    figures: list[Figure] = []
    with bench_config(given) as config, server_url(given.latency_ms / 1000) as url:
        chat = prepare(config).chat
        for num_calls, num_rollouts in itertools.product(given.calls, given.rollouts):
            # As in a run.
            with loaded_set_aside():
                figures += asyncio.run(measure(chat, url, given, num_rollouts, num_calls))
    about = {
        "latency": f"tool {given.latency_ms:g} ms, engine {given.engine_ms:g} ms",
        "rollouts of a task": given.group_size,
    }
    report("Tool calls of one worker", figures, about=about, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
