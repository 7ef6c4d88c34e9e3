"""A public benchmark as it is: bfcl-eval's simulators, its user of several turns and its checker, in real rollouts."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from envs.base import HasState, OrdersCalls, Responds
from envs.types import StopReason, Task
from envs.user_code import load_target
from graders.user.custom import CustomConfig, load_custom_grader
from tests.support import ROOT
from tests.support.episodes import STOP
from tests.support.scripted_engine import Writer, call
from trainer.config import EngineConfig, ModelConfig, RolloutConfig
from trainer.engines.engine import EngineStart, Sampler
from trainer.engines.local import VllmEngine
from trainer.rollouts.worker import RolloutWorker
from trainer.seeds import derive_seed
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest

EXAMPLE = str(ROOT / "scripts" / "examples" / "bfcl.py")
LIMITS = RolloutConfig(
    max_turns=40,
    max_user_turns=10,
    max_tool_calls=60,
    max_turn_tokens=2000,
    max_episode_tokens=60_000,
    tool_timeout_s=20,
)
EVERY = 20
"""Of the tasks of a category one in so many is played here."""

Words = Callable[[Task], Sequence[str]]
"""What the model writes in a task, turn after turn."""


@pytest.fixture(scope="module")
def world() -> Any:
    categories = load_target(f"{EXAMPLE}:CATEGORIES", key="world.target")
    return load_target(f"{EXAMPLE}:Bfcl", key="world.target")(categories, num_eval=10)


@pytest.fixture(scope="module")
def tasks(world: Any) -> list[Task]:
    return world.tasks("train")[::EVERY]


def gold_calls(task: Task) -> list[list[str]]:
    """The reference calls by the user's turn, as the model writes them."""
    documented = load_target(f"{EXAMPLE}:_documented", key="world.target")
    tools = [tool for simulator in task.item["entry"]["involved_classes"] for tool in documented(simulator)]
    names = {tool.name: list(tool.parameters["properties"]) for tool in tools}

    def written(text: str) -> str:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        by_place = zip(names[node.func.id], node.args, strict=False)
        arguments = {**dict(by_place), **{k.arg: k.value for k in node.keywords}}
        return call(node.func.id, **{str(key): ast.literal_eval(value) for key, value in arguments.items()})

    return [[written(text) for text in turn] for turn in task.item["ground_truth"]]


def gold(task: Task) -> list[str]:
    """Each of the user's turns: its calls in one of the model's, then words."""
    return [text for turn in gold_calls(task) for text in (["".join(turn)] if turn else []) + ["Done."]]


def silent(task: Task) -> list[str]:
    return ["Done."] * len(task.item["ground_truth"])


def worker_of(world: Any, chat: Chat, engine: Sampler, limits: RolloutConfig) -> RolloutWorker:
    grader = load_custom_grader(CustomConfig(type="custom", target=f"{EXAMPLE}:BfclGrader"))
    return RolloutWorker(world=world, grader=grader, chat=chat, engine=engine, config=limits)


async def play(chat: Chat, world: Any, tasks: Sequence[Task], words: Words) -> list[Rollout]:
    """A rollout of each task, all at once, by the run's own worker."""
    texts = {derive_seed(i, n): text for i, task in enumerate(tasks) for n, text in enumerate(words(task))}
    worker = worker_of(world, chat, Writer(chat, lambda prompt, seed: texts[seed]), LIMITS)
    requests = [RolloutRequest(task=task, rollout_id=f"r{i}", seed=i) for i, task in enumerate(tasks)]
    rollouts = await worker.run(requests, temperature=1.0)
    left = load_target(f"{EXAMPLE}:multi_turn_utils", key="world.target")
    assert not [name for name in vars(left) if name.startswith(("rollout_", "grade_"))], "simulators are released"
    return rollouts


def rewards(rollouts: Sequence[Rollout]) -> list[float | None]:
    return [rollout.reward for rollout in rollouts]


def test_the_version_is_the_one_that_is_pinned():
    pinned = f"bfcl-eval=={importlib.metadata.version('bfcl-eval')}"
    assert pinned in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert pinned in (ROOT / EXAMPLE).read_text()


def test_it_is_a_world_with_a_user_a_state_and_calls_in_order(world):
    env = world.make_env()
    assert isinstance(env, Responds) and isinstance(env, HasState) and isinstance(env, OrdersCalls)
    assert len(world.tasks("train")) == 4 * 190 - 1 and len(world.tasks("eval")) == 4 * 10


async def test_replaying_the_reference_calls_is_right_on_every_task(chat, world, tasks):
    rollouts = await play(chat, world, tasks, gold)
    assert len(rollouts) == 38
    wrong = {r.task.task_id: r.grade.explanation for r in rollouts if r.grade and r.grade.explanation}
    assert rewards(rollouts) == [1.0] * len(tasks), wrong
    for rollout in rollouts:
        said = [turn.reply for turn in rollout.episode.turns if turn.reply is not None]
        assert len(said) == len(rollout.task.item["ground_truth"]) - 1
        assert rollout.episode.stop_reason is StopReason.ANSWERED and not rollout.episode.num_invalid_calls
    assert sum(len(turn.results) for r in rollouts for turn in r.episode.turns) > 150


async def test_doing_nothing_is_wrong_on_every_task(chat, world, tasks):
    assert rewards(await play(chat, world, tasks, silent)) == [0.0] * len(tasks)


async def test_one_turn_left_out_is_wrong(chat, world, tasks):
    def with_a_gap(task: Task) -> list[str]:
        last = max(i for i, turn in enumerate(gold_calls(task)) if turn)
        return [
            text
            for i, turn in enumerate(gold_calls(task))
            for text in (["".join(turn)] if turn and i != last else []) + ["Done."]
        ]

    rollouts = await play(chat, world, tasks[::4], with_a_gap)
    assert rewards(rollouts) == [0.0] * 10
    assert all(r.grade and "empty_turn_model_response" in r.grade.explanation for r in rollouts)


async def test_a_wrong_argument_is_seen_in_the_state(chat, world):
    (task,) = [t for t in world.tasks("train") if t.task_id == "multi_turn_base_0"]
    words = [text.replace('"dir_name": "temp"', '"dir_name": "tmp"') for text in gold(task)]
    assert words != gold(task)
    (rollout,) = await play(chat, world, [task], lambda _: words)
    assert rollout.reward == 0.0 and rollout.grade and "instance_state_mismatch" in rollout.grade.explanation


async def test_an_episode_that_is_cut_short_is_wrong(chat, world, tasks):
    (rollout,) = await play(chat, world, tasks[:1], lambda task: gold(task)[:-1] + [call("pwd")] * 60)
    assert rollout.episode.stop_reason is not StopReason.ANSWERED and rollout.reward == 0.0


async def test_rollouts_of_one_task_do_not_meet(chat, world, tasks):
    assert rewards(await play(chat, world, [tasks[0]] * 4, gold)) == [1.0] * 4


async def test_a_function_that_is_held_back_appears_when_the_user_says_so(chat, world):
    (task,) = [t for t in world.tasks("train") if t.task_id == "multi_turn_miss_func_0"]
    ((turn, names),) = task.item["entry"]["missed_function"].items()
    (rollout,) = await play(chat, world, [task], gold)
    first, second = (chat.decode(ledger.prompt_ids) for ledger in rollout.ledgers)
    offered = [f"\n{name}(" for name in names]
    before, after = first.partition(STOP)[0], second.partition(STOP)[0]
    assert offered and not any(o in before for o in offered) and all(o in after for o in offered)
    (asked,) = [t.reply for t in rollout.episode.turns if t.reply and "updated some more functions" in t.reply]
    assert [t.reply for t in rollout.episode.turns if t.reply].index(asked) == int(turn) - 1


async def test_what_the_model_writes_runs_as_a_call_and_never_as_code(chat, world, tasks):
    words = [call("pwd", **{"a=print(), b": 1}), call("__import__", name="os"), "Done."]
    (rollout,) = await play(chat, world, tasks[:1], lambda task: words + silent(task))
    results = [r for turn in rollout.episode.turns for r in turn.results]
    assert [r.error for r in results] == ["bad_arguments", "unknown_tool"]
    assert rollout.reward == 0.0


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
async def test_a_model_plays_it_on_vllm_without_a_fault_of_the_world(taught_model, one_process, world):
    chat = Chat(taught_model)
    small = LIMITS.model_copy(update={"max_turns": 4, "max_turn_tokens": 64, "max_episode_tokens": 8000})
    engine = VllmEngine(
        EngineConfig(publish="merged", seeded_requests=True, enforce_eager=True, kv_cache_gib=1, max_num_seqs=4)
    )
    given = EngineStart(
        model_path=taught_model,
        model=ModelConfig(dtype="float32"),
        max_model_len=small.max_episode_tokens + 1,
        stop_token_ids=sorted(chat.stop_token_ids),
        device="cpu",
    )
    await engine.start(given)
    try:
        worker = worker_of(world, chat, engine, small)
        tasks = [task for task in world.tasks("train") if task.item["entry"]["involved_classes"] == ["TradingBot"]][:2]
        requests = [RolloutRequest(task=task, rollout_id=f"r{i}", seed=i) for i, task in enumerate(tasks)]
        rollouts = await worker.run(requests, temperature=1.0)
    finally:
        engine.shutdown()
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert rollout.episode.stop_reason is not StopReason.WORLD_FAULT and rollout.reward in (0.0, 1.0)
        assert rollout.episode.turns and rollout.num_attempts == 1
