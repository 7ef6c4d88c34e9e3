"""The world that the user's target makes.

What `target` gives decides: an object with `make_env` is a world; one with `tools`, `open` and `close` an environment
of ours; one with `reset` a TRL-style environment (see `trl_env`); a dict names several of these, chosen by the row's
key `environment`; a list holds functions or an agent framework's tools (see `toolbox`), as one of them alone does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from envs.base import Checks, Closes, Counts, Env, ExpertTurn, Sweeps, World
from envs.custom.toolbox import ToolboxEnv, is_toolbox, read_toolbox
from envs.custom.trl_env import TrlEnv, TrlKind, kind_and_row, trl_kind
from envs.errors import UserError, told_of
from envs.settings import Kwargs, WorldSettings
from envs.tools import Tool
from envs.types import Message, Task
from envs.user_code import TARGET_PATTERN, check_order, load_target, looked_at, make
from envs.users import UserConfig

_NUM_OWN_TASKS = 64
"""An environment has so many where it owns its data; each is a `seed`, for those whose `reset` takes one."""


class CustomEnvConfig(WorldSettings):
    """The user's own Python."""

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`.")
    kwargs: Kwargs = Field(default={}, description="The class or factory is called with them.")
    user: UserConfig | None = Field(
        default=None, description="A simulated user who answers turns without calls, where the target has none."
    )


class CustomWorld:
    """A world made of the user's target. Raises `UserError` where the target is none of what is understood."""

    check: Callable[[Task], None]
    """Absent where the target has none, as the other members are that a world may have."""

    def __init__(self, config: CustomEnvConfig) -> None:
        self._where = f"world.target {config.target!r}"
        self._target = load_target(config.target, key="world.target")
        self._make = functools.partial(make, self._target, config.kwargs, where=self._where)
        self._spare: Env | None = None
        self._world: World | None = None
        self._toolbox: dict[str, Tool] | None = None
        self._kinds: dict[str | None, TrlKind] = {}
        if isinstance(self._target, dict) and self._target:
            self._kinds = {name: self._kind(name, factory, config) for name, factory in self._target.items()}
        elif not config.kwargs and is_toolbox(self._target):
            self._toolbox = read_toolbox(self._target, self._where)
        elif callable(self._target):
            with looked_at(self._where):
                self._look_at(self._make())
        elif hasattr(self._target, "make_env"):
            self._world = self._target
        else:
            raise self._not_understood(self._target)
        if isinstance(self._world, Checks):
            self.check = self._world.check
        if isinstance(self._world, Counts):
            self.take_metrics = self._world.take_metrics
        if isinstance(self._world, Closes):
            self.aclose = self._world.aclose
        if isinstance(self._world, Sweeps):
            self.sweep = self._world.sweep
        if self._kinds:
            self.check = self._check_row

    def _look_at(self, made: Any) -> None:
        if hasattr(made, "make_env"):
            self._world = made
        elif all(hasattr(made, name) for name in ("tools", "open", "close")):
            check_order(made.open, ("task", "rollout_id"), f"{self._where}: open")
            check_order(made.close, ("episode",), f"{self._where}: close")
            # Made already: the first rollout gets it.
            self._spare = made
        elif callable(getattr(made, "reset", None)):
            self._kinds = {None: trl_kind(self._make, made, self._where)}
        elif isinstance(made, list | tuple) and made:
            self._toolbox = read_toolbox(made, self._where)
        else:
            raise self._not_understood(made)

    def _not_understood(self, found: Any) -> UserError:
        return UserError(
            f"{self._where}: expected a world (make_env), an environment (tools, open, close), a TRL-style "
            f"environment (reset), a dict of these or a list of tools, got {type(found).__name__}"
        )

    def _kind(self, name: Any, factory: Any, config: CustomEnvConfig) -> TrlKind:
        where = f"{self._where}[{name!r}]"
        make_one = functools.partial(make, factory, config.kwargs, where=where)
        made = None
        if callable(factory):
            with looked_at(where):
                made = make_one()
        if not callable(getattr(made, "reset", None)):
            raise UserError(f"{where}: expected a TRL-style environment class (reset)")
        return trl_kind(make_one, made, where)

    def _check_row(self, task: Task) -> None:
        with told_of(self._where):
            kind_and_row(self._kinds, task)

    def make_env(self) -> Env:
        if self._world is not None:
            return self._world.make_env()
        if self._kinds:
            return TrlEnv(self._kinds)
        if self._toolbox is not None:
            return ToolboxEnv(self._toolbox)
        spare, self._spare = self._spare, None
        env: Env = self._make() if spare is None else spare
        return env

    def tasks(self, split: str) -> Sequence[Task]:
        if None in self._kinds and not self._kinds[None].needs:
            return _own_tasks(split)
        tasks = self._own("tasks")
        if tasks is None:
            raise UserError(f"data: {self._where} has no tasks of its own; expected a data section with train and eval")
        with looked_at(f"{self._where}: tasks({split!r})"):
            found = tasks(split)
        if not isinstance(found, Sequence) or not found or not all(isinstance(task, Task) for task in found):
            raise UserError(
                f"{self._where}: tasks({split!r}): expected a list of envs.types.Task, with one at least, got "
                f"{found!r:.80}"
            )
        return found

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        expert = self._own("expert_episode")
        turns: Sequence[ExpertTurn] = expert(task, seed) if expert else ()
        return turns

    def _own(self, name: str) -> Callable[..., Any] | None:
        """A world's, or what the factory of our environments has; a TRL-style class has nothing but tools."""
        found: Callable[..., Any] | None = getattr(self._world or self._target, name, None)
        return None if self._kinds or self._toolbox is not None else found


def _own_tasks(split: str) -> list[Task]:
    """Empty prompts, which the environment's `reset` fills, as trl makes them without a data set."""
    first = 0 if split == "train" else _NUM_OWN_TASKS
    return [
        Task(task_id=f"{split}-{i}", messages=(Message(role="user", content=""),), item={"seed": first + i})
        for i in range(_NUM_OWN_TASKS)
    ]
