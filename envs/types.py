"""The words of the project as types: task → turn → episode. See `trainer.rollouts.worker` for rollout and group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
NOT_PARSED, NOT_RUN = "Error: your tool call could not be parsed", "Error: none of these calls was run"
MALFORMED_NOTES = (NOT_PARSED, NOT_RUN)
"""How the user messages begin that answer a malformed call: only the rollout says so, never a user."""


class StopReason(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"
    """The model wrote a turn without a tool call: its final answer."""
    CALLED = "called"
    """The turn's tool calls are the answer (`rollout.answer: tool_calls`); they were not executed."""
    ENDED = "ended"
    """The environment ended it: a game is over, say."""
    MAX_TURNS = "max_turns"
    """The turn limit was reached before an answer."""
    MAX_USER_TURNS = "max_user_turns"
    """The user would have gone on, but had spoken as often as an episode allows."""
    MAX_TOOL_CALLS = "max_tool_calls"
    """The model went on calling tools after it had been told that the call budget was used up."""
    MAX_TURN_TOKENS = "max_turn_tokens"
    """A single turn was cut off at its token limit."""
    MAX_EPISODE_TOKENS = "max_episode_tokens"
    """The whole episode, prompt and tool outputs included, no longer fits its token limit."""
    WALL_CLOCK = "wall_clock"
    """The episode's wall-clock limit passed."""
    TEMPLATE_REFUSED = "template_refused"
    """The chat template can't render what the model wrote, not even as plain text: serving could not go on either."""
    WORLD_FAULT = "world_fault"
    """A tool server or the engine failed after its retries. Masked out of the loss."""
    DEADLINE = "deadline"
    """It was cut off, for the step had waited long enough for it (`overlap.deadline_s`). Masked out of the loss."""

    @property
    def is_masked(self) -> bool:
        """Whether the episode was lost, through no doing of the model's: it is never graded."""
        return self in (StopReason.WORLD_FAULT, StopReason.DEADLINE)

    @property
    def is_complete(self) -> bool:
        """Whether the episode came to its own end: an answer, calls that are the answer, a game that is over."""
        return self in (StopReason.ANSWERED, StopReason.CALLED, StopReason.ENDED)


class ToolErrorKind(StrEnum):
    """What was wrong with a tool call."""

    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    REFUSED = "refused"
    """The tool raised `ToolError`."""
    TIMEOUT = "timeout"
    OVER_BUDGET = "over_budget"
    """The call came after the episode's call budget was used up; it was not executed."""

    @property
    def is_invalid_call(self) -> bool:
        """Whether the penalty on invalid calls counts it."""
        return self in (ToolErrorKind.UNKNOWN_TOOL, ToolErrorKind.BAD_ARGUMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One tool call as the model wrote it."""

    call_id: str
    """Unique within the episode; ties the result to the call."""
    name: str
    arguments: str
    """JSON text, not yet validated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What came back from one tool call."""

    call_id: str
    name: str
    output: str
    """The text shown to the model; the error's text where `error` is set."""
    error: ToolErrorKind | None = None
    latency_s: float = 0.0
    num_tokens: int = 0
    """Tokens of `output` as the model reads it, template glue aside."""
    num_special_tokens: int = 0
    """How many of them are special tokens of the chat format, which the output spells out."""
    reward: float | None = None
    """What the tool says that the call was worth (`envs.tools.Rewarded`); None where it says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message, in the words of the Chat Completions format."""

    role: Role
    content: str = ""
    reasoning: str = ""
    """The assistant's reasoning, as the reasoning parser split it off."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Assistant messages only."""
    call_id: str = ""
    """Tool messages only: the call that this answers."""
    name: str = ""
    """The tool's, on tool messages; on others who speaks, where a row says so."""

    def to_openai(self) -> dict[str, Any]:
        """The message as Chat Completions JSON."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        if self.role == "tool":
            out |= {"tool_call_id": self.call_id, "name": self.name}
        elif self.name:
            out["name"] = self.name
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the data set."""

    task_id: str
    messages: tuple[Message, ...]
    """The prompt; the last message is the user's."""
    tools: tuple[str, ...] | None = None
    """Names of the tools offered to this task; None offers all that the environment has."""
    definitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The row's own definitions of its tools (Chat Completions JSON, as it stands there) by name; remote tools take
    their schemas here."""
    where: str = field(default="", compare=False)
    """The file and line of the row; empty for a world's own task."""
    item: Mapping[str, Any] = field(default_factory=dict)
    """The whole row, `messages` and `tools` included; graders and environments read it (the gold answer, say). Of a
    world's own task its data alone: `graders.hosted.view.item_of` adds the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One model generation and the tool results it caused."""

    message: Message
    results: tuple[ToolResult, ...] = ()
    """One per tool call, in the order called; where the calls are the answer, of those that no tool could take."""
    malformed: bool = False
    """The turn tried to call a tool but did not parse; it was answered with an error and is no final answer."""
    reply: str | None = None
    """What the user said to it, where a user answers; None where nobody did."""
    reply_s: float = 0.0
    """Wall-clock time of waiting for the reply."""
    num_tokens: int = 0
    """Tokens generated in this turn."""
    num_reasoning_tokens: int = 0
    """How many of them were reasoning, as the reasoning parser split them."""
    num_spelled_tokens: int = 0
    """Special tokens of the chat format that the turn spells out of ordinary ones."""
    generation_s: float = 0.0
    tools_s: float = 0.0
    """Wall-clock time of the turn's tool calls together (they run concurrently)."""
    env_reward: float | None = None
    """What the environment says that the turn was worth (`envs.base.RewardsTurns`); None where it says nothing."""

    @property
    def reward(self) -> float | None:
        """What its tools and its environment gave it together; None where none of them said anything."""
        given = [x for x in (*(r.reward for r in self.results), self.env_reward) if x is not None]
        return math.fsum(given) if given else None

    @property
    def num_messages(self) -> int:
        """The messages that the turn added: its own, the tool results, the user's to a malformed call or an answer."""
        return 1 + len(self.results) + self.malformed + (self.reply is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """All turns of one attempt at a task."""

    rollout_id: str
    """Unique over the run; passed with every tool call and to the grader."""
    task_id: str
    messages: tuple[Message, ...]
    """Everything the model saw and wrote, the prompt first."""
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    error: str = ""
    """The cause, for WORLD_FAULT."""
    state: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the environment says of its final state (JSON values); graders read it as `sample.state`."""
    latency_s: float = 0.0
    completion_ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    """The tokens behind the prompt, from the first that the model sampled to the last, tool results between them
    included; where the template rewrote earlier text, of each row its own. None where they are not known."""

    @property
    def answer(self) -> str | None:
        """The final answer's text, that beside the calls where they are the answer; None without an answer."""
        has_answer = self.stop_reason in (StopReason.ANSWERED, StopReason.CALLED)
        return self.turns[-1].message.content.strip() if has_answer else None

    @property
    def num_tool_calls(self) -> int:
        """Calls the model made, malformed ones included: an agent pays for each of them in time."""
        return sum(len(t.message.tool_calls) + t.malformed for t in self.turns)

    @property
    def num_invalid_calls(self) -> int:
        """Malformed calls, unknown tools and arguments that do not fit the schema."""
        return sum(
            t.malformed + sum(r.error is not None and r.error.is_invalid_call for r in t.results) for t in self.turns
        )

    @property
    def num_tokens(self) -> int:
        return sum(t.num_tokens for t in self.turns)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(t.num_reasoning_tokens for t in self.turns)
