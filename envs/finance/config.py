"""The settings of the finance world."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Kind = Literal["value", "change", "percentage", "comparison"]


class FinanceConfig(BaseModel):
    """How large the corpus is, what is asked about it, and how clumsy the scripted expert is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["finance"] = "finance"
    seed: int = Field(default=0, ge=0, description="Seed of the corpus, the split and the tasks.")
    num_companies: int = Field(default=60, ge=8, le=1000, description="Companies in the corpus, sisters included.")
    first_year: int = Field(default=2012, ge=1950, le=2030, description="Year of each company's first report.")
    num_years: int = Field(default=4, ge=2, le=20, description="Reports of each company, one a year.")
    sister_share: float = Field(
        default=0.4, ge=0, le=1, description="Probability that a company has a sister of nearly the same name."
    )
    thousands_share: float = Field(
        default=0.3, ge=0, le=1, description="Probability that a company reports in thousands instead of millions."
    )
    restated_share: float = Field(
        default=0.3, ge=0, le=1, description="Probability that a report restates one figure of the year before."
    )
    calculate: bool = Field(default=True, description="Offer the calculate tool.")
    search_hits: int = Field(default=3, ge=1, le=10, description="Paths that one search returns.")
    question_mix: dict[Kind, float] = Field(
        default={"value": 0.7, "change": 0.1, "percentage": 0.1, "comparison": 0.1},
        description="Weight of each kind of question; kinds left out are not asked.",
    )
    eval_share: float = Field(
        default=0.25, gt=0, lt=1, description="Share of the companies that only eval tasks ask about."
    )
    num_train_tasks: int = Field(default=256, ge=1, description="Tasks of the train split.")
    num_eval_tasks: int = Field(default=64, ge=1, description="Tasks of the eval split.")
    detour_calls: float = Field(
        default=2.5,
        ge=0,
        le=6,
        description="Mean number of needless tool calls in an expert episode, before the cap on calls.",
    )

    @field_validator("question_mix")
    @classmethod
    def _weights_are_usable(cls, mix: dict[Kind, float]) -> dict[Kind, float]:
        if not all(0 <= weight < float("inf") for weight in mix.values()) or not sum(mix.values()) > 0:
            raise ValueError("the weights must be finite and not negative, and at least one of them above 0")
        return mix
