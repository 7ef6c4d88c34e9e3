"""A public benchmark with a user who speaks several times: the multi-turn tasks of the Berkeley Function Calling
Leaderboard (package `bfcl-eval`, Apache-2.0), unchanged.

    pip install --no-deps bfcl-eval==2026.3.23
    python scripts/preflight.py --config configs/bfcl.yaml

Its own parts are used where they lie in the package: the data, the simulators (a file system, a car, a trading desk,
...), the user's words, and the checker, which compares the state after each of the user's turns with that of the
reference calls. Copy this file for a benchmark of your own: `Bfcl` gives the tasks, `BfclEnv` is one episode's world
with its user, `BfclGrader` asks the benchmark for the verdict.

As in the benchmark, arguments are not checked against the schema (some reference calls do not fit it), functions that a
task holds back appear later in the episode, and a turn without calls ends the user's turn. Not as there: a call that
can't be parsed is answered with an error instead of ending the user's turn, and the limit of 20 steps in each is
`rollout.max_turns` for all together.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import keyword
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bfcl_eval
from bfcl_eval.constants.category_mapping import VERSION_PREFIX
from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

from envs.tools import Tool, schema_tool
from envs.types import Episode, Message, StopReason, Task
from graders.types import Grade

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
DATA = Path(bfcl_eval.__file__).parent / "data"


class Bfcl:
    """The world: tasks out of the package. The last `num_eval` of each category are held out."""

    def __init__(self, categories: Sequence[str] = CATEGORIES[:1], num_eval: int = 40) -> None:
        self._tasks = {category: _tasks(category) for category in categories}
        self._num_eval = num_eval

    def make_env(self) -> BfclEnv:
        return BfclEnv()

    def tasks(self, split: str) -> list[Task]:
        held_out = slice(-self._num_eval, None) if split == "eval" else slice(-self._num_eval)
        return [task for tasks in self._tasks.values() for task in tasks[held_out]]

    def expert_episode(self, task: Task, seed: int) -> Sequence[Any]:
        return ()


class BfclEnv:
    """One episode: the simulators of the task, and the user, who says their words one after the other."""

    calls_in_order = True
    """Calls of one turn build on each other: `cd`, then `mkdir`."""

    def __init__(self) -> None:
        self.tools: Mapping[str, Tool] = {}
        self._name = f"rollout_{uuid.uuid4().hex}"
        self._calls: list[list[list[str]]] = [[]]
        """What ran, by the user's turn; the benchmark's form, a list for each step."""

    async def open(self, task: Task, rollout_id: str) -> None:
        self._entry: dict[str, Any] = task.item["entry"]
        held_back = {name for names in self._entry.get("missed_function", {}).values() for name in names}
        documented = [tool for simulator in self._entry["involved_classes"] for tool in _documented(simulator)]
        self._all = {tool.name: dataclasses.replace(tool, function=self._called(tool.name)) for tool in documented}
        self._offer([name for name in self._all if name not in held_back])

    def _offer(self, names: Sequence[str]) -> None:
        self.tools = {**self.tools, **{name: self._all[name] for name in names}}

    def _called(self, name: str) -> Callable[..., str]:
        """A call is run as the benchmark writes it: `name(argument=value)`."""

        def called(**arguments: Any) -> str:
            return self._run(f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})")

        return called

    def _run(self, call: str) -> str:
        turn = self._calls[-1]
        output: str = _execute(call, self._entry, self._name)
        turn.append([call])
        return output

    async def respond(self, message: Message) -> str | None:
        number = len(self._calls)
        if number == len(self._entry["question"]):
            return None
        self._calls.append([])
        if names := self._entry.get("missed_function", {}).get(str(number)):
            self._offer(names)
            return str(DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC)
        return _text(self._entry["question"][number])

    async def final_state(self) -> Mapping[str, Any]:
        return {"calls": self._calls}

    async def close(self, episode: Episode | None) -> None:
        _forget(self._name)


class BfclGrader:
    """1 where the benchmark's checker finds every turn right, else 0 with its reason."""

    def grade(self, task: Task, episode: Episode) -> Grade:
        error = self._error(task, episode)
        return Grade(reward=float(not error), parts={}, explanation=error)

    def _error(self, task: Task, episode: Episode) -> str:
        if episode.stop_reason is not StopReason.ANSWERED:
            return f"force_terminated: {episode.stop_reason}"
        entry, name = task.item["entry"], f"grade_{uuid.uuid4().hex}"
        category = entry["id"].rpartition("_")[0]
        try:
            found = multi_turn_checker(episode.state["calls"], task.item["ground_truth"], entry, category, name)
        finally:
            _forget(name)
        return "" if found["valid"] else f"{found['error_type']}: {found['error_message']}"


def _tasks(category: str) -> list[Task]:
    answers = {
        a["id"]: a["ground_truth"] for a in _lines(DATA / "possible_answer" / f"{VERSION_PREFIX}_{category}.json")
    }
    return [
        Task(
            task_id=entry["id"],
            messages=(Message(role="user", content=_text(entry["question"][0])),),
            item={"entry": entry, "ground_truth": answers[entry["id"]], "category": category},
        )
        for entry in _lines(DATA / f"{VERSION_PREFIX}_{category}.json")
        if _can_be_solved(entry, answers[entry["id"]])
    ]


def _can_be_solved(entry: Mapping[str, Any], answer: Sequence[Sequence[str]]) -> bool:
    """False for the one task of 800 whose reference calls a function in a turn before it is offered."""
    return not any(
        call.startswith(f"{name}(")
        for turn, names in entry.get("missed_function", {}).items()
        for name in names
        for calls in answer[: int(turn)]
        for call in calls
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _text(question: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in question)


@functools.cache
def _documented(simulator: str) -> list[Tool]:
    """What the benchmark says of a simulator's functions; an environment gives them something to run."""
    tools = []
    for function in _lines(DATA / "multi_turn_func_doc" / MULTI_TURN_FUNC_DOC_FILE_MAPPING[simulator]):
        about = {key: function[key] for key in ("name", "description")}
        about["parameters"] = _json_schema(function["parameters"])
        tool = schema_tool({"type": "function", "function": about}, _not_open, is_remote=False)
        tools.append(dataclasses.replace(tool, read_arguments=_read_arguments))
    return tools


def _not_open(**arguments: Any) -> str:
    raise AssertionError("only an environment's tools are called")


def _json_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark names types as Python or Java do."""
    schema = dict(parameters)
    if "type" in schema:
        schema["type"] = GORILLA_TO_OPENAPI[schema["type"]]
    if "properties" in schema:
        schema["properties"] = {key: _json_schema(value) for key, value in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _json_schema(schema["items"])
    return schema


def _read_arguments(value: Any) -> dict[str, Any]:
    """Any values, but names that can stand in a call: the benchmark evaluates it as Python."""
    if not isinstance(value, dict):
        raise ValueError("arguments: Input should be an object")
    for key in value:
        if not key.isidentifier() or keyword.iskeyword(key):
            raise ValueError(f"{key!r}: no name of an argument")
    return value


def _execute(call: str, entry: Mapping[str, Any], name: str) -> str:
    outputs, _ = multi_turn_utils.execute_multi_turn_func_call(
        [call], entry["initial_config"], entry["involved_classes"], name, entry["id"], "long_context" in entry["id"]
    )
    output: str = outputs[0]
    return output


def _forget(name: str) -> None:
    """The benchmark keeps simulators as globals of its module, for as long as the process lives."""
    held = vars(multi_turn_utils)
    for key in [key for key in list(held) if key.startswith(name)]:
        del held[key]
