"""Tools and environments of others as a world: functions, agent frameworks' tools, trl's kinds of environments."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel
from smolagents import Tool, tool
from transformers.utils import get_json_schema

from envs.base import Env
from envs.custom.toolbox import read_toolbox
from envs.custom.world import CustomEnvConfig, CustomWorld
from envs.errors import UserError
from envs.tools import call_tool
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult
from graders.custom import EnvReward

TASK = Task(task_id="t", messages=(Message(role="user", content="Go."),), item={"environment": "count", "start": 3})


def multiply(a: float, b: float = 1.0) -> float:
    """Multiply two numbers.

    Args:
        a: One.
        b: The other.
    """
    if a < 0:
        raise ValueError("only positive ones")
    return a * b


async def shout(text: str) -> str:
    """Say it loud.

    Args:
        text: What.
    """
    return text.upper()


@tool
def reverse(text: str, times: int | None = None) -> str:
    """Turn a text round.

    Args:
        text: The text.
        times: How often.
    """
    return text[::-1]


class Shelf(Tool):
    name = "shelf"
    description = "What lies on a shelf."
    inputs: ClassVar = {
        "number": {"type": "integer", "description": "Which one."},
        "any": {"type": "any", "description": "x"},
    }
    output_type = "string"

    def forward(self, number: int, any: Any) -> str:
        return f"{number}: {any}"


class ByHand:
    """A framework that nobody knows."""

    name = "by_hand"
    description = "Does it."
    parameters: ClassVar = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}

    def run(self, x: int) -> list[int]:
        return [x]


class Mute:
    name, description, parameters = "mute", "Does it.", ByHand.parameters


FUNCTIONS = [multiply, shout]
SMOLAGENTS = (reverse, Shelf())
MIXED = [multiply, reverse, ByHand()]
TWICE = [multiply, multiply]
WRONG = [multiply, 3]
UNCALLED = [Mute()]
BY_HAND = ByHand()
EMPTY: list[Any] = []


class Count:
    """A TRL-style environment that owns its data, and its reward."""

    def reset(self, seed: int = 0, start: int = 0, **row: Any) -> str:
        self.n, self.row = start, row
        return f"Count on from {self.n + seed}."

    def up(self, by: int = 1) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.n += by
        return self.n

    def get_reward(self) -> float:
        return float(self.n)

    @property
    def done(self) -> bool:
        return self.n > 4

    async def respond(self, message: str) -> str | None:
        return None if message == "bye" else f"{message}?"

    def final_state(self) -> dict[str, int]:
        return {"n": self.n}


class Guess:
    """Without a tool."""

    def reset(self, **row: Any) -> str | None:
        return row.get("hint")

    def get_reward(self) -> float:
        return 1.0


KINDS = {"count": Count, "guess": Guess}
WRONG_KINDS = {"count": Count, "tool": multiply}


def world(name: str, **kwargs: Any) -> CustomWorld:
    return CustomWorld(CustomEnvConfig(type="custom", target=f"{__file__}:{name}", kwargs=kwargs))


async def call(env: Env, name: str, **arguments: Any) -> ToolResult:
    return await call_tool(env.tools, ToolCall(call_id="c", name=name, arguments=json.dumps(arguments)), timeout_s=60)


def schema(env: Env, name: str) -> dict[str, Any]:
    return env.tools[name].schema()


async def test_a_list_of_functions_is_a_world_and_is_shown_as_trl_shows_it():
    env = world("FUNCTIONS").make_env()
    assert [schema(env, name) for name in env.tools] == [get_json_schema(multiply), get_json_schema(shout)]
    assert (await call(env, "multiply", a=3, b=2)).output == "6.0"
    assert (await call(env, "shout", text="hi")).output == "HI"
    refused = await call(env, "multiply", a=-1)
    assert (refused.output, refused.error) == ("Error: only positive ones", ToolErrorKind.REFUSED)
    assert (await call(env, "multiply", a="x")).error is ToolErrorKind.BAD_ARGUMENTS
    with pytest.raises(UserError, match="has no tasks of its own; expected a data section"):
        world("FUNCTIONS").tasks("train")


@pytest.mark.parametrize("name", ["multiply", "reverse", "BY_HAND"])
async def test_one_tool_alone_is_a_world(name):
    assert list(world(name).make_env().tools) == [name.lower()]


async def test_smolagents_tools_are_taken_as_they_are():
    env = world("SMOLAGENTS").make_env()
    text = {"type": "string", "description": "The text."}
    times = {"type": "integer", "description": "How often."}
    assert schema(env, "reverse")["function"] == {
        "name": "reverse",
        "description": "Turn a text round.",
        "parameters": {"type": "object", "properties": {"text": text, "times": times}, "required": ["text"]},
    }
    assert (await call(env, "reverse", text="abc")).output == "cba"
    assert (await call(env, "shelf", number=3, any=[1])).output == "3: [1]"
    assert (await call(env, "shelf", number="x", any=1)).error is ToolErrorKind.BAD_ARGUMENTS


async def test_tools_of_any_origin_stand_side_by_side():
    env = world("MIXED").make_env()
    assert list(env.tools) == ["multiply", "reverse", "by_hand"]
    assert (await call(env, "by_hand", x=3)).output == "[3]"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("TWICE", "two tools are named 'multiply'"),
        ("WRONG", "expected functions, or objects with name, description, a JSON schema .*, got int"),
        ("UNCALLED", "tool 'mute' can't be called"),
        ("EMPTY", "expected a world"),
        ("WRONG_KINDS", r"\['tool'\]: (kwargs: missing|expected a TRL-style)"),
    ],
)
def test_what_is_no_tool_is_named(name, told):
    with pytest.raises(UserError, match=told):
        world(name)


async def test_rows_choose_among_environments_by_name():
    kinds = world("KINDS")
    env = kinds.make_env()
    assert list(env.tools) == ["up"], "of all of them, before it is open"
    await env.open(TASK, "r")
    assert (await call(env, "up", by=2)).output == "5"
    await env.close(None)
    other = kinds.make_env()
    await other.open(Task(task_id="t", messages=TASK.messages, item={"environment": "guess"}), "r")
    assert not other.tools
    await other.close(None)
    with pytest.raises(UserError, match="task 't': environment: expected one of 'count', 'guess', got 'gone'"):
        await kinds.make_env().open(Task(task_id="t", messages=TASK.messages, item={"environment": "gone"}), "r")
    with pytest.raises(UserError, match="expected a data section"):
        kinds.tasks("train")


async def test_an_environment_that_owns_its_data_gives_the_prompt_and_the_reward():
    counting = world("Count")
    train, held_out = counting.tasks("train"), counting.tasks("eval")
    assert len({task.task_id for task in [*train, *held_out]}) == len(train) + len(held_out)
    env: Any = counting.make_env()
    await env.open(held_out[1], "r")
    assert env.observation == f"Count on from {len(train) + 1}."
    assert not env.is_over
    await call(env, "up", by=5)
    assert env.is_over
    assert await env.final_state() == {"n": 5}
    assert [await env.respond(Message(role="assistant", content=said)) for said in ("so", "bye")] == ["so?", None]
    episode = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=StopReason.ENDED)
    assert await EnvReward().grade(TASK, episode) == 5.0
    await env.close(episode)


async def test_an_environment_may_have_no_tools_but_not_neither_prompt_nor_data():
    env: Any = world("Guess").make_env()
    assert not env.tools
    await env.open(TASK, "r")
    assert not hasattr(env, "respond") and not env.is_over and await env.final_state() == {}
    await env.close(None)
    with pytest.raises(UserError, match=r"train-0: reset\(\) gives no prompt, and there is none in a data section"):
        await env.open(world("Guess").tasks("train")[0], "r")
    await env.close(None)


def test_the_target_stands_in_a_config(tmp_path: Path) -> None:
    config = CustomEnvConfig.model_validate({"type": "custom", "target": f"{__file__}:FUNCTIONS"})
    assert list(CustomWorld(config).make_env().tools) == ["multiply", "shout"]


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def convert(degrees: float, unit: Unit, extra: list | None = None) -> str:  # type: ignore[type-arg]
    """Convert.

    Args:
        degrees: how warm
        unit: in what
        extra: more
    """
    return unit.name


async def test_what_functions_return_is_json_where_it_has_one_and_else_what_str_gives():
    class Place(BaseModel):
        city: str

    class Odd:
        def __str__(self) -> str:
            return "odd"

    def find(odd: bool) -> Any:
        """Find it.

        Args:
            odd: or not
        """
        return Odd() if odd else [Place(city="Zürich")]

    tools = read_toolbox([find], "world.target")
    for odd, shown in ((False, '[{"city": "Zürich"}]'), (True, "odd")):
        made = ToolCall(call_id="c", name="find", arguments=json.dumps({"odd": odd}))
        assert (await call_tool(tools, made, timeout_s=5)).output == shown


def test_the_model_is_shown_what_a_class_takes_where_trl_would_show_an_object():
    (made,) = read_toolbox([convert], "world.target").values()
    shown = json.dumps(made.schema())
    assert '"enum": ["celsius", "kelvin"]' in shown and '"type": "array"' in shown


class Thermostat:
    def reset(self) -> str:
        return "Set it."

    def convert(self, degrees: float, unit: Unit, extra: list | None = None) -> str:  # type: ignore[type-arg]
        """Convert.

        Args:
            degrees: how warm
            unit: in what
            extra: more
        """
        return unit.name


async def test_a_class_of_trls_is_shown_as_trl_shows_it_even_where_that_is_an_object() -> None:
    env = world("Thermostat").make_env()
    assert schema(env, "convert") == get_json_schema(Thermostat().convert)
    assert schema(env, "convert")["function"]["parameters"]["properties"]["unit"]["type"] == "object"
    await env.open(TASK, "r")
    assert (await call(env, "convert", degrees=1, unit="kelvin")).output == "KELVIN"
    await env.close(None)
