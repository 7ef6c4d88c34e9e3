"""Settings of how episodes are run, and of how far ahead of the training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from envs.reading.documents import from_file
from envs.settings import Settings
from trainer.config.response_format import ResponseFormat

Answer = Literal["text", "tool_calls"]


class RolloutConfig(Settings):
    """How episodes are run."""

    tasks_per_step: int = Field(8, ge=1, description="groups in a step")
    stratify_by: str | None = Field(
        None,
        description="a key of the tasks' items (kind, say): every step then holds its values in the proportion in "
        "which all tasks do",
    )
    group_size: int = Field(
        8, ge=1, description="rollouts of one task; one is enough for gae, reinforce_pp and custom alone"
    )
    tied_groups: Literal["keep", "skip", "replace"] = Field(
        "keep",
        description="groups without an advantage, all rewards being equal: keep: they count in the loss's denominators "
        "and have its KL and entropy terms; skip: they do not; replace: as skip, and groups of fresh tasks take their "
        "place in the same step (DAPO's dynamic sampling)",
    )
    replacement_rounds: int = Field(
        3, ge=1, description="with replace: how often a step may ask for fresh groups; then it goes on with fewer"
    )
    max_turns: int = Field(12, ge=1, description="model generations in an episode")
    max_tool_calls: int = Field(10, ge=0, description="the call budget of an episode")
    max_user_turns: int = Field(
        10, ge=0, description="messages that a simulated user may add to the prompt's; without such a user no limit"
    )
    answer: Answer = Field(
        "text",
        description="text: the first turn without calls is the answer; tool_calls: the first turn with calls, which "
        "are not run, so that the tools that rows define need no server; graders read sample.output_tools",
    )
    max_turn_tokens: int = Field(256, ge=1, description="generated tokens in one turn")
    max_episode_tokens: int = Field(
        1024, ge=16, description="tokens of a whole episode, prompt and tool outputs included"
    )
    episode_timeout_s: float = Field(
        600,
        gt=0,
        description="of an episode, seconds: its environment, tools and user; the engine, and waiting for a place "
        "at it or for a thread, do not count",
    )
    tool_timeout_s: float = Field(60, gt=0, description="of one tool call, seconds")
    settle_timeout_s: float = Field(
        300,
        gt=0,
        description="of what follows an episode, seconds each: one try of its grading, a judge's retries included (a "
        "grader that takes longer has failed), and closing its environment (no longer than episode_timeout_s)",
    )
    max_tool_output_chars: int = Field(20_000, ge=1, description="longer tool outputs are cut, and say so")
    temperature: float = Field(1.0, gt=0, description="sampling temperature in training")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; below 1 biases the policy gradient")
    response_format: Annotated[
        ResponseFormat | None,
        BeforeValidator(from_file("response_format")),
        Field(
            description="the form of every answer, as Chat Completions takes it (type json_schema, json_object or "
            "text), or a file that holds it; tasks may offer no tools then"
        ),
    ] = None
    world_retries: int = Field(
        2, ge=0, description="fresh attempts at an episode lost to a fault of the world, and at a grading that failed"
    )

    @property
    def num_rollouts(self) -> int:
        """Of a step, without those that replace others."""
        return self.tasks_per_step * self.group_size


class OverlapConfig(Settings):
    """Rollouts that go on while the trainer trains."""

    max_staleness: int = Field(
        0,
        ge=0,
        le=16,
        description="rollouts of so many steps are asked for ahead of the one that is trained on, so that no token is "
        "older than that; 0: rollouts, training and publishing one after the other. Above 0 a run that was interrupted "
        "has the same groups in the same order, and not the same bytes",
    )
    pin: Literal["turn", "episode"] = Field(
        "turn",
        description="what ends under the weights that it began with; turn: the next turn takes the newest, so that "
        "tokens are as fresh as can be, and every engine can do it; episode: all its turns have the same, and what was "
        "cached of it serves on: for long contexts, with an engine that keeps former weights (vLLM's adapters)",
    )
    deadline_s: float | None = Field(
        None,
        ge=1,
        description="rollouts of a step that are not done when the trainer has waited for it so many seconds are cut "
        "off, masked and counted; null: it waits for all",
    )
