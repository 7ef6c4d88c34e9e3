"""The user's own environments and how they are found: our protocols, TRL-style classes, files and modules."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from envs.base import Env, ExpertTurn
from envs.custom.trl_env import live_environment
from envs.custom.world import CustomEnvConfig, CustomWorld
from envs.errors import UserError, WorldError
from envs.tools import Tool, call_tool, tool
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult
from envs.user_code import load_target

TASK = Task(
    task_id="t", messages=(Message(role="user", content="Open the drawer."),), item={"code": 7, "answer": "gold"}
)
EPISODE = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=StopReason.MAX_TURNS)


class Drawer:
    """A TRL-style environment, as a user of trl writes it."""

    num_open = 0

    def __init__(self, colour: str = "red") -> None:
        self.colour = colour
        self.log: list[str] = []
        Drawer.num_open += 1

    def reset(self, **row: Any) -> str | None:
        self.row = row
        self.reward = 0.0
        return f" The drawer is {self.colour}."

    def turn(self, code: int) -> str:
        """Turn the lock.

        Args:
            code: what to dial
        """
        self.log.append(f"turn {code}")
        time.sleep(0.05)
        self.log.append("turned")
        if code != self.row["code"]:
            raise ValueError("it stays shut")
        self.reward = 1.0
        return "it opens"

    async def wait(self, hours: int = 1) -> dict[str, int]:
        """Wait.

        Args:
            hours: how long
        """
        await asyncio.sleep(0.05)
        return {"waited": hours}

    def fetch(self) -> str:
        """Ask the store, which is down."""
        raise WorldError("the store is down")

    def look(self) -> list[dict[str, str]]:
        """Look into the drawer."""
        return [{"type": "text", "text": "dark"}, {"type": "image", "image": "…"}]

    def get_reward(self) -> float:
        return self.reward

    def close(self) -> None:
        Drawer.num_open -= 1

    def _secret(self) -> None:
        raise AssertionError


class Plain:
    """No `**row`, no observation; an action that happens to be called close, and a context manager's end."""

    left: Sequence[object] = ()

    def reset(self, code: int) -> None:
        self.code = code

    def close(self, lid: str) -> str:
        """Close a lid.

        Args:
            lid: which one
        """
        return f"{lid} closed on {self.code}"

    async def __aexit__(self, *of: object) -> None:
        Plain.left = of


@tool
def ring() -> str:
    """Ring the bell."""
    return "ding"


class OwnEnv:
    """Our protocol."""

    def __init__(self, bell: Tool = ring) -> None:
        self.tools: Mapping[str, Tool] = {"ring": bell}

    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def close(self, episode: Episode | None) -> None: ...

    @staticmethod
    def tasks(split: str) -> list[Task]:
        return [TASK] if split == "train" else []

    @staticmethod
    def expert_episode(task: Task, seed: int) -> Sequence[ExpertTurn]:
        return ((("ring", {}),), "rung")


class OwnWorld:
    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def make_env(self) -> Env:
        return OwnEnv()

    def tasks(self, split: str) -> list[Task]:
        return [TASK] * self.num_tasks

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        return ()

    async def sweep(self, rollout_ids: Sequence[str]) -> None:
        self.swept = rollout_ids


class NoEnv:
    pass


class Mute:
    def reset(self) -> None: ...

    def act(self, code: int) -> None:
        pass


def world(name: str, **kwargs: Any) -> CustomWorld:
    return CustomWorld(CustomEnvConfig(type="custom", target=f"{__file__}:{name}", kwargs=kwargs))


def cls(name: str) -> Any:
    """The class as the world has it: loaded from this file, apart from the test's own import of it."""
    return load_target(f"{__file__}:{name}", key="test")


async def call(env: Env, name: str, **arguments: Any) -> ToolResult:
    request = ToolCall(call_id="c", name=name, arguments=json.dumps(arguments))
    return await call_tool(env.tools, request, timeout_s=30)


def test_the_public_methods_of_a_trl_style_class_are_tools() -> None:
    before = cls("Drawer").num_open
    tools = world("Drawer").make_env().tools
    assert sorted(tools) == ["fetch", "look", "turn", "wait"]
    assert tools["turn"].schema()["function"] == {
        "name": "turn",
        "description": "Turn the lock.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"description": "what to dial", "type": "integer"}},
            "required": ["code"],
        },
        "return": {"type": "string"},
    }, "as trl shows it"
    assert cls("Drawer").num_open == before, "the instance that the tools are read off is closed"


async def test_a_trl_style_environment_plays_an_episode() -> None:
    env = world("Drawer", colour="blue").make_env()
    await env.open(TASK, "r-1")
    assert getattr(env, "observation") == " The drawer is blue."  # noqa: B009
    instance = live_environment("r-1")
    assert instance is not None
    assert instance.row == {
        "code": 7,
        "answer": "gold",
        "prompt": [{"role": "user", "content": "Open the drawer."}],
    }
    wrong = await call(env, "turn", code=1)
    assert (wrong.output, wrong.error) == ("Error: it stays shut", ToolErrorKind.REFUSED)
    assert (await call(env, "turn", code=7)).output == "it opens"
    assert (await call(env, "turn", code="x")).error is ToolErrorKind.BAD_ARGUMENTS
    assert (await call(env, "wait")).output == "{'waited': 1}", "as trl shows it"
    assert (await call(env, "look")).output == "dark\n[image]"
    with pytest.raises(WorldError, match="the store is down"):
        await call(env, "fetch")
    assert instance.get_reward() == 1.0
    open_before = cls("Drawer").num_open
    await env.close(EPISODE)
    assert live_environment("r-1") is None
    assert cls("Drawer").num_open == open_before - 1


async def test_each_rollout_has_an_instance_of_its_own_and_closing_needs_no_opening() -> None:
    drawers = world("Drawer")
    one, two = drawers.make_env(), drawers.make_env()
    await asyncio.gather(one.open(TASK, "r-1"), two.open(TASK, "r-2"))
    await call(one, "turn", code=7)
    first, second = live_environment("r-1"), live_environment("r-2")
    assert first is not None and second is not None
    assert (first.reward, second.reward) == (1.0, 0.0)
    await one.close(None)
    await two.close(None)
    await drawers.make_env().close(None)


async def test_sync_methods_run_one_at_a_time_off_the_event_loop_and_async_ones_together() -> None:
    env = world("Drawer").make_env()
    await env.open(TASK, "r")
    instance = live_environment("r")
    assert instance is not None
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await asyncio.gather(*(call(env, "turn", code=code) for code in (1, 2, 3)))
    ticking.cancel()
    assert instance.log == ["turn 1", "turned", "turn 2", "turned", "turn 3", "turned"]
    assert ticks >= 3
    start = time.perf_counter()
    await asyncio.gather(*(call(env, "wait") for _ in range(40)))
    assert time.perf_counter() - start < 40 * 0.05
    await env.close(None)


async def test_a_reset_without_catch_all_gets_what_it_names_and_close_with_an_argument_is_a_tool() -> None:
    env = world("Plain").make_env()
    assert list(env.tools) == ["close"]
    await env.open(TASK, "r")
    assert getattr(env, "observation") is None  # noqa: B009
    assert (await call(env, "close", lid="top")).output == "top closed on 7"
    await env.close(EPISODE)
    assert cls("Plain").left == (None, None, None)


async def test_our_own_protocol_is_taken_as_it_is() -> None:
    own = world("OwnEnv")
    one, two = own.make_env(), own.make_env()
    assert one is not two
    assert (await call(one, "ring")).output == "ding"
    assert own.tasks("train") == [cls("TASK")]
    assert list(own.expert_episode(TASK, 0)) == [(("ring", {}),), "rung"]
    given = world("OwnWorld", num_tasks=3)
    assert len(given.tasks("eval")) == 3
    assert list(given.make_env().tools) == ["ring"]
    await getattr(given, "sweep")(["r-9"])  # noqa: B009
    assert not hasattr(own, "sweep")


class Swapped:
    tools: Mapping[str, Tool] = MappingProxyType({"ring": ring})

    async def open(self, rollout_id: str, task: Task) -> None: ...

    async def close(self, episode: Episode | None) -> None: ...


class Hasty:
    tools: Mapping[str, Tool] = MappingProxyType({"ring": ring})

    async def open(self, row: Task, name: str) -> None: ...

    async def close(self) -> None: ...


def test_tasks_come_from_the_data_where_the_environment_has_none() -> None:
    with pytest.raises(
        UserError, match=r"data: world.target .*Plain' has no tasks of its own; expected a data section"
    ):
        world("Plain").tasks("train")
    assert world("Drawer").expert_episode(TASK, 0) == ()


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("Swapped", {}, r"open is called as open\(task, rollout_id\), but: its parameters are rollout_id, task"),
        ("Hasty", {}, r"close is called as close\(episode\), but: too many positional arguments"),
        ("NoEnv", {}, r"expected a world \(make_env\), .* a TRL-style environment \(reset\), .*got NoEnv"),
        ("Mute", {}, r"every public method is a tool: tool 'act' has no docstring"),
        ("Drawer", {"size": 1}, r"kwargs: got an unexpected keyword argument 'size'"),
        ("Draw", {}, r"test_custom_env.py has no 'Draw'; did you mean 'Drawer'\?"),
    ],
)
def test_a_target_that_is_no_environment_is_named(name: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        world(name, **kwargs)


def test_a_target_that_cannot_be_loaded_is_named_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(target: str) -> str:
        with pytest.raises(UserError) as caught:
            load_target(target, key="grader.target")
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "slip.py").write_text("def f(:\n")
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    assert fault("gone.py:f") == f"grader.target 'gone.py:f': no file {tmp_path / 'gone.py'}"
    assert "can't be imported: ZeroDivisionError: division by zero" in fault("broken.py:x")
    assert f"({tmp_path / 'broken.py'}, line 2)" in fault("broken.py:x")
    assert "SyntaxError" in fault("slip.py:f")
    assert "ModuleNotFoundError: No module named 'no_such_package'" in fault("broken_module:f")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in fault("no_such_module:f")
    assert "expected `package.module:Name` or" in fault("json")


def test_a_file_is_loaded_once_and_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_the_target.py").write_text("value = 3\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour_of_the_target import value\nclass Outer:\n    class Inner:\n        held = value\n"
    )
    inner = load_target(f"{tmp_path / 'mine.py'}:Outer.Inner", key="k")
    assert inner.held == 3
    assert load_target(f"{tmp_path / 'mine.py'}:Outer", key="k").Inner is inner
    assert load_target("json.decoder:JSONDecoder.decode", key="k") is json.JSONDecoder.decode


async def test_an_error_in_reset_is_not_the_models(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import threading\n"
        "class Fails:\n"
        "    def reset(self):\n"
        "        raise KeyError(threading.current_thread().name)\n"
        "    def act(self):\n"
        "        '''Act.'''\n"
    )
    env = CustomWorld(CustomEnvConfig(type="custom", target=f"{tmp_path / 'fails.py'}:Fails")).make_env()
    with pytest.raises(KeyError) as caught:
        await env.open(TASK, "r")
    assert threading.current_thread().name not in str(caught.value)
    await env.close(None)
    assert live_environment("r") is None


async def test_a_tool_may_speak_our_own_errors(tmp_path: Path) -> None:
    (tmp_path / "speaks.py").write_text(
        "from envs.errors import ToolError\n"
        "class Speaks:\n"
        "    def reset(self): ...\n"
        "    def act(self):\n"
        "        '''Act.'''\n"
        "        raise ToolError('not so')\n"
    )
    env = CustomWorld(CustomEnvConfig(type="custom", target=f"{tmp_path / 'speaks.py'}:Speaks")).make_env()
    await env.open(TASK, "r")
    result = await call(env, "act")
    assert (result.output, result.error) == ("Error: not so", ToolErrorKind.REFUSED)
    await env.close(None)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import sys\nsys.exit(0)", r"can't be imported: SystemExit: 0 \(.*odd\.py, line 2\)"),
        (
            'def odd(a: "Gone"):\n    """Odd.\n\n    Args:\n        a: b\n    """\nOdd = [odd]\n',
            r"tool 'odd': an annotation can't be read: name 'Gone' is not defined",
        ),
        (
            "class Odd:\n    @property\n    def tools(self): raise OSError('no tools')\n",
            r"raised OSError: no tools \(.*odd\.py, line 3\)",
        ),
        (
            "class Odd:\n    def reset(self, **row): ...\n    def look(self, a: 'Gone'): 'Look.'\n",
            r"every public method is a tool: tool 'look': an annotation can't be read: name 'Gone' is not defined",
        ),
    ],
)
def test_whatever_a_target_raises_as_it_is_looked_at_is_told_with_it(source: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(source)
    with pytest.raises(UserError, match=rf"^world\.target '.*odd\.py:Odd': {told}"):
        CustomWorld(CustomEnvConfig(type="custom", target=f"{tmp_path}/odd.py:Odd"))
