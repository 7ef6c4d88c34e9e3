"""The environment protocol: where the tools of one episode live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from envs.tools import Tool
from envs.types import Episode, Task


class Env(Protocol):
    """The world of one episode. Single-use: one instance serves one episode and is never reused."""

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools by name. The rollout offers those that the task names, or all."""
        ...

    async def open(self, task: Task, rollout_id: str) -> None:
        """Prepare what belongs to this rollout. Raises `WorldError` when it cannot be had."""
        ...

    async def close(self, episode: Episode | None) -> None:
        """Release it; called once on every path. `episode` is None when the rollout was cancelled."""
        ...


class World(Protocol):
    """What a whole run shares: it supplies tasks and opens one `Env` per episode."""

    def make_env(self) -> Env:
        """A fresh environment; cheap, called once per episode."""
        ...

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `train` or `eval`, in a fixed order."""
        ...

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        """Scripted turns that solve the task, for the supervised warm start; empty where there is none."""
        ...


ExpertTurn = str | tuple[tuple[str, Mapping[str, object]], ...]
"""One scripted turn: a final answer's text, or the tool calls (name, arguments) that the turn makes."""
