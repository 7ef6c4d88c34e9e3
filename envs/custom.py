"""The user's own environments: our `Env` or `World` protocol, or a TRL-style environment class as it is.

What `target` gives decides: an object with `make_env` is a world; one with `tools`, `open` and `close` an environment
of ours; one with `reset` a TRL-style environment, used as trl's GRPOTrainer uses what its `environment_factory` gives:

- `reset(**row)` gets the row's data and its messages as `prompt` (those that it takes, where it has no `**kwargs`); the
  text it returns is appended to the last user message.
- Every public method but `reset` and `get_reward` is a tool; an exception in one is shown to the model as an error,
  `WorldError` aside. What it returns is shown as `str` gives it.
- `get_reward()` is the reward when the grader is `{"type": "custom", "target": "graders.custom:EnvReward"}`.

What trl does not know, and what is no tool (see docs/episodes.md):

- `respond(message)` is a simulated user: it gets the text of each turn without calls and gives the user's next words,
  or None where the turn is the final answer. By its parameter's name it is told from a tool that is called respond.
- A public attribute or property `is_over` or `done`, or a method `is_over()`, that is true ends the episode.
- `final_state()` gives what graders read as `sample.state`, a mapping of JSON values.

Where ours differs from trl: each rollout has an instance of its own, made when it opens; arguments are checked against
the signature before the call; the error text begins with "Error: "; methods may be called `close` or `aclose` and take
no argument, then they are no tools but are called at the end, or else `__exit__` or `__aexit__` is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Env, ExpertTurn, World
from envs.errors import ToolError, UserError, WorldError
from envs.loading import TARGET_PATTERN, accepted, call_user, is_async, load_target, make, required
from envs.tools import Tool, tool
from envs.trl_schema import trl_schema
from envs.types import Episode, Message, Task
from envs.users import UserConfig

_OPTIONAL_HOOKS = ("aclose", "take_metrics", "sweep")
_live: dict[str, Any] = {}
"""TRL-style environments by rollout id, from open to close: graders read the reward of their own."""


class CustomEnvConfig(BaseModel):
    """The user's own Python."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`.")
    kwargs: dict[str, Any] = Field(default={}, description="The class or factory is called with them.")
    user: UserConfig | None = Field(
        default=None, description="A simulated user who answers turns without calls, where the target has none."
    )


def live_environment(rollout_id: str) -> Any | None:
    """The TRL-style environment of a rollout that is open in this process."""
    return _live.get(rollout_id)


class CustomWorld:
    """A world made of the user's target. Raises `UserError` where the target is none of what is understood."""

    def __init__(self, config: CustomEnvConfig) -> None:
        self._where = f"world.target {config.target!r}"
        self._target = load_target(config.target, key="world.target")
        self._make = functools.partial(make, self._target, config.kwargs, where=self._where)
        made = self._target if hasattr(self._target, "make_env") and not callable(self._target) else self._make()
        self._spare: Env | None = None
        self._world: World | None = None
        self._tools: dict[str, Tool] = {}
        self._trl_class: type | None = None
        if hasattr(made, "make_env"):
            self._world = made
        elif all(hasattr(made, name) for name in ("tools", "open", "close")):
            # Made already: the first rollout gets it.
            self._spare = made
        elif callable(getattr(made, "reset", None)):
            self._tools, self._trl_class = _tools_of(made, self._where), type(made)
            _close_probe(made)
        else:
            raise UserError(
                f"{self._where}: expected a world (make_env), an environment (tools, open, close) or a TRL-style "
                f"environment (reset), got {type(made).__name__}"
            )
        for name in _OPTIONAL_HOOKS:
            if hook := getattr(self._world, name, None):
                setattr(self, name, hook)

    def make_env(self) -> Env:
        if self._world is not None:
            return self._world.make_env()
        if self._trl_class is not None:
            return _TrlEnv(self._make, self._tools, has_user=_has_user(self._trl_class))
        spare, self._spare = self._spare, None
        env: Env = self._make() if spare is None else spare
        return env

    def tasks(self, split: str) -> Sequence[Task]:
        tasks = self._own("tasks")
        if tasks is None:
            raise UserError(f"data: {self._where} has no tasks of its own; expected a data section with train and eval")
        found: Sequence[Task] = tasks(split)
        return found

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        expert = self._own("expert_episode")
        turns: Sequence[ExpertTurn] = expert(task, seed) if expert else ()
        return turns

    def _own(self, name: str) -> Callable[..., Any] | None:
        """A world's, or what the factory of our environments has; a TRL-style class has nothing but tools."""
        found: Callable[..., Any] | None = getattr(self._world or self._target, name, None)
        return None if self._trl_class else found


class _TrlEnv:
    """One rollout's TRL-style environment.

    Covered: sync methods of one instance run one at a time, in the order called, as trl runs them; async ones together.
    Not covered: a sync method that exceeds its time is abandoned, not stopped, and the next one may run beside it.
    """

    def __init__(self, make_one: Callable[[], Any], tools: Mapping[str, Tool], *, has_user: bool) -> None:
        self._make = make_one
        self._instance: Any = None
        self._rollout_id = ""
        self._turn = asyncio.Lock()
        self.tools = {name: dataclasses.replace(t, function=self._bound(name)) for name, t in tools.items()}
        self.observation: str | None = None
        if has_user:
            # An environment that has the attribute is one with a user: `envs.base.Responds`.
            self.respond = self._respond

    @property
    def is_over(self) -> bool:
        told = getattr(self._instance, "is_over", None)
        if callable(told):
            told = told()
        done = getattr(self._instance, "done", False)
        return bool(told) or (not callable(done) and bool(done))

    async def final_state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = {}
        if _is_hook(self._instance, "final_state"):
            state = await call_user(self._instance.final_state)
        return state

    async def _respond(self, message: Message) -> str | None:
        async with self._turn:
            said = await call_user(self._instance.respond, message=message.content)
        return None if said is None else _content_text(said)

    async def open(self, task: Task, rollout_id: str) -> None:
        self._instance = await call_user(self._make)
        self._rollout_id = rollout_id
        _live[rollout_id] = self._instance
        row = {**task.item, "prompt": [message.to_openai() for message in task.messages]}
        reset = self._instance.reset
        observation = await call_user(reset, **accepted(reset, row))
        self.observation = None if observation is None else _content_text(observation)

    async def close(self, episode: Episode | None) -> None:
        instance, self._instance = self._instance, None
        _live.pop(self._rollout_id, None)
        if instance is not None and (hook := _close_hook(instance)):
            await call_user(hook)

    def _bound(self, name: str) -> Callable[..., Any]:
        async def method(**arguments: Any) -> str:
            function = getattr(self._instance, name)
            try:
                if is_async(function):
                    value = await function(**arguments)
                else:
                    async with self._turn:
                        value = await call_user(function, **arguments)
            except (WorldError, ToolError):
                raise
            except Exception as e:
                raise ToolError(str(e) or type(e).__name__) from e
            return _content_text(value)

        return method


def _tools_of(instance: Any, where: str) -> dict[str, Tool]:
    """The public methods of the instance's class, as trl lists them."""
    hooks = [name for name in ("close", "aclose", "is_over", "final_state") if _is_hook(instance, name)]
    if _has_user(type(instance)):
        hooks.append("respond")
    tools: dict[str, Tool] = {}
    for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction):
        if name.startswith("_") or name in ("reset", "get_reward", *hooks):
            continue
        try:
            method = getattr(instance, name)
            tools[name] = dataclasses.replace(tool(method), definition=trl_schema(method))
        except TypeError as e:
            raise UserError(f"{where}: every public method is a tool: {e}") from None
    if not tools and "respond" not in hooks:
        raise UserError(f"{where}: expected public methods besides reset and get_reward: they are the tools")
    return tools


def _has_user(cls: type) -> bool:
    respond = getattr(cls, "respond", None)
    return callable(respond) and [name for name in required(respond) if name != "self"] == ["message"]


def _is_hook(instance: Any, name: str) -> bool:
    function = getattr(instance, name, None)
    return callable(function) and not required(function)


def _close_hook(instance: Any) -> Callable[[], Any] | None:
    for name in ("aclose", "close"):
        if _is_hook(instance, name):
            hook: Callable[[], Any] = getattr(instance, name)
            return hook
    for name in ("__aexit__", "__exit__"):
        if leave := getattr(instance, name, None):
            return functools.partial(leave, None, None, None)
    return None


def _close_probe(instance: Any) -> None:
    """The instance that was made to read the tools off. An async hook would need an event loop, and is not called."""
    hook = _close_hook(instance)
    if hook is not None and not is_async(hook):
        hook()


def _content_text(value: Any) -> str:
    """As trl shows it: `str` of the value; of content blocks the texts, others by their type."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        return "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in value)
    return str(value)
