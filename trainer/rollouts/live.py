"""An episode in the making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from envs.base import Env
from envs.tools import Tool
from envs.types import Episode, Message, Task, Turn
from trainer.rollouts.admission import Place
from trainer.templates.chat import OfferedTools
from trainer.types import Ledger, RolloutRequest


class NotMade:
    """Stands where the world has not made an environment yet."""

    tools: Mapping[str, Tool] = {}

    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def close(self, episode: Episode | None) -> None: ...


@dataclass(slots=True)
class Live:
    """What is there of it so far; a time-out loses none of it."""

    request: RolloutRequest
    rollout_id: str
    """The request's, or that of a retry."""
    place: Place
    messages: list[Message]
    env: Env = field(default_factory=NotMade)
    ledgers: list[Ledger] = field(default_factory=list)
    prompt: str = ""
    """The text of the next turn's, as the template renders it."""
    turns: list[Turn] = field(default_factory=list)
    seen_tools: list[tuple[str, Tool]] | None = None
    """What the environment had when it was last looked at."""
    tools: dict[str, Tool] = field(default_factory=dict)
    """What the model is offered of them."""
    schemas: OfferedTools = field(default_factory=OfferedTools)
    version: int | None = None
    """The policy version of its first turn."""
    num_tool_calls: int = 0
    num_replies: int = 0
    num_drifted_turns: int = 0
    waiting_for: str = ""
    """Who is being asked at the moment and keeps the model waiting: a remote tool, or the user."""
    over_budget: bool = False
    """The model has been told that its call budget is used up."""
    unclosed: str = ""
    """Why its environment did not close; empty where it did."""
