"""The settings of the finance world."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from envs.reading.rows import FileOrDataset
from envs.settings import WorldSettings

Style = Literal["brief", "full"]
Source = Literal["generated", "tatqa", "finqa"]
Kind = Literal[
    "value",
    "change",
    "percentage",
    "comparison",
    "sum",
    "product",
    "ratio",
    "greater",
    "table_max",
    "table_min",
    "table_sum",
    "table_average",
    "share",
    "average",
    "per_employee",
    "projection",
    "rate_change",
    "mean_rate",
]
KINDS: dict[Style, tuple[Kind, ...]] = {
    "brief": ("value", "change", "percentage", "comparison"),
    "full": (
        *("change", "percentage", "comparison", "sum", "product", "ratio", "greater", "table_max", "table_min"),
        *("table_sum", "table_average", "share", "average", "per_employee", "projection", "rate_change", "mean_rate"),
    ),
}
_MIXES: dict[Style, dict[Kind, float]] = {
    "brief": {"value": 0.7, "change": 0.1, "percentage": 0.1, "comparison": 0.1},
    "full": dict.fromkeys(KINDS["full"], 1.0),
}
# What has no effect beside another source or style, and is refused there rather than ignored.
_ONLY_GENERATED = (
    *("style", "num_companies", "first_year", "last_year", "num_years", "sister_share", "thousands_share"),
    *("restated_share", "distractor_share", "question_mix"),
)
_ONLY_LONG = ("last_year", "distractor_share", "page_chars")


def _default_mix(data: dict[str, Any]) -> dict[Kind, float]:
    return dict(_MIXES[data.get("style", "brief")])


class FinanceConfig(WorldSettings):
    """Where the corpus comes from, how large it is, what is asked about it, and how clumsy the scripted expert is."""

    type: Literal["finance"] = "finance"
    seed: int = Field(default=0, ge=0, description="Seed of the corpus, the split and the tasks.")
    source: Source = Field(
        default="generated",
        description="generated: from the seed; tatqa, finqa: real reports from `path`.",
    )
    path: FileOrDataset | None = Field(
        default=None, description="The JSON file of a real source, or a data set (see `envs.reading.rows`)."
    )
    style: Style = Field(
        default="brief",
        description="Of generated reports. brief: one small table; full: statements, notes and text over several "
        "pages, with drafts and press releases among them.",
    )
    num_companies: int = Field(default=60, ge=8, le=1000, description="Companies in the corpus, sisters included.")
    first_year: int = Field(default=2012, ge=1950, le=2030, description="Year of each company's first report.")
    last_year: int | None = Field(
        default=None,
        le=2050,
        description="With it, each company's reports begin in a year of their own, and none is later than this.",
    )
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
    distractor_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Probability that a report has a press release beside it, and that it has a draft.",
    )
    calculate: bool = Field(default=True, description="Offer the calculate tool.")
    search_mode: Literal["lexical", "semantic", "hybrid"] = Field(
        default="lexical",
        description="lexical: BM25; semantic: nearest embedding; hybrid: both, by reciprocal rank.",
    )
    search_shows: Literal["paths", "snippets", "document"] = Field(
        default="paths",
        description="paths: of the best documents; snippets: with the page and the line that fit best; "
        "document: the page of the best document that fits best, whole.",
    )
    search_hits: int = Field(default=3, ge=1, le=10, description="Documents that one search returns.")
    page_chars: int = Field(
        default=4000,
        ge=500,
        description="Longer documents are read page by page; cat takes a page where any document is longer.",
    )
    question_mix: dict[Kind, float] = Field(
        default_factory=_default_mix,
        description="Weight of each kind of question; kinds left out are not asked. Real sources bring their own.",
    )
    eval_share: float = Field(
        default=0.25, gt=0, lt=1, description="Share of the companies that only eval tasks ask about."
    )
    num_train_tasks: int = Field(default=256, ge=1, description="Tasks of the train split; at most, of a real source.")
    num_eval_tasks: int = Field(default=64, ge=1, description="Tasks of the eval split; at most, of a real source.")
    detour_calls: float = Field(
        default=2.5,
        ge=0,
        le=6,
        description="Mean number of needless tool calls in an expert episode, before the cap on calls.",
    )
    detour_thoughts: float | None = Field(
        default=None,
        ge=0,
        le=6,
        description="With it the expert reasons before each turn, with so many needless sentences on the mean; for "
        "models with a reasoning parser.",
    )

    @property
    def expert_reasons(self) -> bool:
        return self.detour_thoughts is not None

    @property
    def is_paged(self) -> bool:
        """Whether documents may be longer than a page, so that the tools take a page."""
        return self.source != "generated" or self.style == "full"

    @field_validator("question_mix")
    @classmethod
    def _weights_are_usable(cls, mix: dict[Kind, float]) -> dict[Kind, float]:
        if not all(weight >= 0 for weight in mix.values()) or not sum(mix.values()) > 0:
            raise ValueError("the weights must not be negative, and at least one of them above 0")
        return mix

    @model_validator(mode="after")
    def _source_and_style_fit_together(self) -> Self:
        if self.source == "generated":
            kinds = KINDS[self.style]
            unknown = sorted(set(self.question_mix) - set(kinds))
            if unknown:
                raise ValueError(
                    f"question_mix: style {self.style!r} has no kind {unknown[0]!r}; it has {', '.join(kinds)}"
                )
            if self.path is not None:
                raise ValueError("path: the generated source reads no file; set source to tatqa or finqa")
        elif self.path is None:
            raise ValueError(f"path: source {self.source!r} needs the JSON file or the data set to read")
        if self.last_year is not None and self.last_year < self.first_year + self.num_years - 1:
            raise ValueError(f"last_year: {self.num_years} yearly reports from {self.first_year} on do not end by then")
        return self

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Self:
        """A key is refused where it could do nothing, unless it has its default (a resolved config names them all)."""
        idle: list[str] = ["search_hits"] if self.search_shows == "document" else []
        if self.source != "generated":
            idle += _ONLY_GENERATED
        elif self.style == "brief":
            idle += _ONLY_LONG
        for key in idle:
            default = type(self).model_fields[key].get_default(call_default_factory=True, validated_data={})
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key}: has no effect with source {self.source!r}, style {self.style!r} and search_shows "
                    f"{self.search_shows!r}"
                )
        return self
