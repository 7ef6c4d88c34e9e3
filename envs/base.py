"""The environment protocol: where the tools of one episode live."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from envs.limits.clocks import blocking_limit
from envs.tools import Tool
from envs.types import Episode, Message, Task


class Env(Protocol):
    """The world of one episode. Single-use: one instance serves one episode and is never reused.

    What an environment may have besides stands below as protocols of one member each: `Observes`, `Responds`, `Ends`,
    `RewardsTurns`, `HasState`, `OrdersCalls`.

    The calls of one turn run at the same time, sync functions in threads: tools that share state need a lock, or
    `OrdersCalls`. Their results always stand in the order called.
    """

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools by name. The rollout offers those that the task names, or all; it looks again before each turn."""
        ...

    async def open(self, task: Task, rollout_id: str) -> None:
        """Prepare what belongs to this rollout. Raises `WorldError` when it cannot be had."""
        ...

    async def close(self, episode: Episode | None) -> None:
        """Release it; called once on every path. `episode` is None when the rollout was cancelled."""
        ...


@runtime_checkable
class Observes(Protocol):
    """Has something to show once it is open."""

    @property
    def observation(self) -> str | None:
        """Appended to the last user message of the prompt."""
        ...


@runtime_checkable
class Responds(Protocol):
    """Has a user who answers what the model says."""

    async def respond(self, message: Message) -> str | None:
        """The user's next words to `message`, a turn without tool calls; None where they have no more to say.

        None makes the turn the final answer. Raises `WorldError` where the user (a model, say) can't be reached.
        """
        ...


@runtime_checkable
class Ends(Protocol):
    """Can be over before the model has answered."""

    @property
    def is_over(self) -> bool:
        """Asked after each turn's tool calls and after each of the user's replies; True ends the episode there."""
        ...


@runtime_checkable
class RewardsTurns(Protocol):
    """Can say what a turn was worth."""

    @property
    def turn_reward(self) -> float | None:
        """Asked once after each turn, its tool calls and the user's reply included; None: nothing.

        It is added to the reward of the episode and credited to the turn.
        """
        ...


@runtime_checkable
class HasState(Protocol):
    """Tells graders what the episode left behind."""

    async def final_state(self) -> Mapping[str, Any]:
        """JSON values; asked once, before the episode is graded. Raises `WorldError` where it can't be had."""
        ...


@runtime_checkable
class OrdersCalls(Protocol):
    """Can have the calls of one turn run one after the other, as the model wrote them, instead of all at once."""

    @property
    def calls_in_order(self) -> bool: ...


def of_env(
    env: Env,
    member: Literal["tools", "observation", "respond", "is_over", "turn_reward", "final_state", "calls_in_order"],
    *,
    limit_s: float = math.inf,
) -> Any:
    """A member of an environment; None where it has none. Raises `WorldError` for a property that is not done in time.

    Which it may have besides is the same as `isinstance` of its protocol says, which takes Python 3.11 ten times as
    long: some are asked every turn.
    """
    kind = type(env)
    of_kind = getattr(kind, member, None)
    # An alarm takes ten times as long as to look at an attribute or a method, which run nobody's code.
    runs_code = (hasattr(of_kind, "__get__") and not callable(of_kind)) or hasattr(kind, "__getattr__")
    if not runs_code or limit_s == math.inf:
        return getattr(env, member, None)
    with blocking_limit(limit_s, f"{kind.__name__}.{member}"):
        return getattr(env, member, None)


@runtime_checkable
class Checks(Protocol):
    """A world, a grader or users that can tell before the run which tasks they can't serve."""

    def check(self, task: Task) -> None:
        """Raises `UserError` for a task that it can't open, grade or answer; called before any model is loaded."""
        ...


@runtime_checkable
class Counts(Protocol):
    """A world, a grader, a judge, users or an engine with figures of their own."""

    def take_metrics(self) -> dict[str, float]:
        """Those since the last call, by their keys in the metrics."""
        ...


@runtime_checkable
class Closes(Protocol):
    """A world, a grader, a judge, users or an engine that hold what must be released, such as connections."""

    async def aclose(self) -> None:
        """Called once, at the end of the run."""
        ...


@runtime_checkable
class Sweeps(Protocol):
    """A world where what a rollout holds outlives the process, and can be released by the rollout's id."""

    async def sweep(self, rollout_ids: Sequence[str]) -> None:
        """Release what rollouts of a killed run left open. Called by the main process of a run alone.

        A failure is counted, not raised: `WorldError` is told and the run begins, anything else ends it.
        """
        ...


class World(Protocol):
    """What a whole run shares: it supplies tasks and opens one `Env` per episode.

    It may also be what `Checks`, `Counts`, `Closes` and `Sweeps` describe.
    """

    def make_env(self) -> Env:
        """A fresh environment; called once per episode, on the event loop, in the order of the episodes.

        Cheap: while it runs everything waits. What takes time belongs in `Env.open`; `rollout.episode_timeout_s` is
        the limit of both.
        """
        ...

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `train` or `eval`, in a fixed order."""
        ...

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        """Scripted turns that solve the task, for the supervised warm start; empty where there is none."""
        ...


Act = str | tuple[tuple[str, Mapping[str, object]], ...]
"""A final answer's text, or the tool calls (name, arguments) that a turn makes."""


@dataclass(frozen=True, slots=True)
class Thinks:
    """A turn that reasons before it acts, for models that do."""

    reasoning: str
    then: Act


ExpertTurn = Act | Thinks
"""One scripted turn."""
