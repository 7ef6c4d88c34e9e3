"""The settings of graders and penalties."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


ScoreConfig = Annotated[ExactConfig | NumericConfig, Field(discriminator="type")]


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


class GraderConfig(_Settings):
    """How an episode is scored: reward = score + penalties.

    Law: a penalty never lifts a wrong answer over a right one. All penalties together lie in [sum of floors, 0]. Where
    the size of that sum is below the least gap between two scores (1, or with partial credit c: min(c, 1 - c)),
    score_better + sum of floors > score_worse: whatever the two episodes cost, the better score keeps the better reward.
    Validation refuses every other configuration.
    """

    score: ScoreConfig = Field(description="What judges the answer.")
    penalties: PenaltiesConfig = Field(default=PenaltiesConfig(), description="What is taken off the score.")

    @model_validator(mode="after")
    def _penalties_cannot_reverse_the_scores(self) -> Self:
        gap, lowest = self.score.score_gap, self.penalties.lowest
        if lowest < 0 and -lowest > gap - _MARGIN:
            raise ValueError(
                f"the penalties' floors sum to {lowest:g}, but two scores of the {self.score.type!r} grader may differ "
                f"by only {gap:g}: a penalised right answer could fall below a wrong one; "
                f"raise the floors so that their sum stays above {-gap:g}"
            )
        return self
