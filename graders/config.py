"""The settings of graders and penalties."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.errors import UserError

# Keeps `right > wrong` strict in floating point: far above the rounding of a sum of four numbers near 1.
_MARGIN = 1e-6


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExactConfig(_Settings):
    """1 for the gold text, 0 for any other."""

    type: Literal["exact"]
    answer_key: str = Field(
        default="answer", min_length=1, description="Key of the task's item that holds the gold answer."
    )
    ignore_case: bool = Field(default=True, description="Take capital and small letters as equal.")

    @property
    def score_gap(self) -> float:
        """The least difference of two scores that differ."""
        return 1.0


class NumericConfig(_Settings):
    """1 for the gold number in any unit or format, partial credit for a near miss, 0 for any other."""

    type: Literal["numeric"]
    answer_key: str = Field(
        default="answer", min_length=1, description="Key of the task's item that holds the gold answer."
    )
    partial_credit: float = Field(
        default=0.5, ge=0, lt=1, description="Score of an answer off by at most 0.1 % or by rounding; 0 turns it off."
    )

    @property
    def score_gap(self) -> float:
        """The least difference of two scores that differ."""
        return min(self.partial_credit, 1 - self.partial_credit) if self.partial_credit else 1.0


GraderConfig = Annotated[ExactConfig | NumericConfig, Field(discriminator="type")]


class PenaltyConfig(_Settings):
    """A penalty of `slope` for each unit over the free allowance, never below `floor`."""

    free: int = Field(default=0, ge=0, description="Units that cost nothing.")
    slope: float = Field(gt=0, description="Reward lost by each unit over the free ones.")
    floor: float = Field(ge=-1, lt=0, description="The lowest value that the penalty reaches, such as -0.2.")
    only_passing: bool = Field(default=False, description="Only where the score is the full 1.")


class PenaltiesConfig(_Settings):
    """The penalties that are taken off the score; what is left out costs nothing."""

    reasoning_tokens: PenaltyConfig | None = Field(default=None, description="On each reasoning token.")
    tool_calls: PenaltyConfig | None = Field(default=None, description="On each tool call, malformed ones included.")
    invalid_calls: PenaltyConfig | None = Field(
        default=None, description="On each malformed call, unknown tool, or call whose arguments do not fit the schema."
    )

    @property
    def lowest(self) -> float:
        """The sum of the floors: no rollout loses more."""
        set_up = (self.reasoning_tokens, self.tool_calls, self.invalid_calls)
        return sum(penalty.floor for penalty in set_up if penalty)


def check_penalties(grader: GraderConfig, penalties: PenaltiesConfig) -> None:
    """Raise `UserError` unless the law holds: a penalty never lifts a wrong answer over a right one.

    All penalties together lie in [sum of floors, 0]. Where the size of that sum is below the least gap between two
    scores (1, or with partial credit c: min(c, 1 - c)), score_better + sum of floors > score_worse: whatever the two
    episodes cost, the better score keeps the better reward. Every other configuration is refused.
    """
    gap, lowest = grader.score_gap, penalties.lowest
    if lowest < 0 and -lowest > gap - _MARGIN:
        raise UserError(
            f"penalties: the floors sum to {lowest:g}, but two scores of the {grader.type!r} grader may differ by only "
            f"{gap:g}: a penalised right answer could fall below a wrong one; raise the floors so that their sum stays "
            f"above {-gap:g}"
        )
