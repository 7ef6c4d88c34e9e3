"""The settings of graders and penalties. The hosted service's grader JSON loads unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from envs.errors import UserError
from envs.reading.variables import NAME
from envs.settings import Settings
from envs.user_code import TARGET_PATTERN

# Keeps `right > wrong` strict in floating point: far above the rounding of a sum of four numbers near 1.
_MARGIN = 1e-6
_MAX_SOURCE_BYTES = 256_000


Name = Annotated[str, Field(min_length=1, description="Of the grader, in messages and metrics.")]


class ExactConfig(Settings):
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


class NumericConfig(Settings):
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


class StringCheckConfig(Settings):
    """1 where the comparison of two texts holds, 0 otherwise."""

    type: Literal["string_check"]
    name: Name = "string_check"
    input: str = Field(description="Template of the text that is checked.")
    reference: str = Field(description="Template of the text that it is compared with.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="eq, ne (or neq): equal or not; like: input contains reference; ilike: so in any capitals."
    )

    @field_validator("operation", mode="before")
    @classmethod
    def _by_either_name(cls, operation: Any) -> Any:
        return "ne" if operation == "neq" else operation

    @property
    def score_gap(self) -> float:
        """The least difference of two scores that differ."""
        return 1.0


class _Continuous(Settings):
    """A grader whose scores may lie anywhere."""

    pass_threshold: float | None = Field(
        default=None, description="The score from which an answer counts as right; penalties need it."
    )


class TextSimilarityConfig(_Continuous):
    """How alike two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    name: Name = "text_similarity"
    input: str = Field(description="Template of the text that is checked.")
    reference: str = Field(description="Template of the text that it is compared with.")
    evaluation_metric: Literal[
        "fuzzy_match",
        "bleu",
        "gleu",
        "meteor",
        "cosine",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ] = Field(description="The measure of likeness, in the hosted service's words.")


class ContentPart(Settings):
    """A text part of a message; `input_text` is the hosted service's word for `text`."""

    type: Literal["text", "input_text", "output_text"]
    text: str = Field(description="A template.")


class JudgeMessage(Settings):
    """One message of a judge's prompt; the texts are templates."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Whose message it is.")
    content: str | ContentPart | list[ContentPart] = Field(description="A text, a text part, or several.")

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
                raise ValueError(f"a part of type {kind!r}: judges are shown text alone here; expected text parts")
        return content

    @property
    def text(self) -> str:
        """The content as one template."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        return "\n".join(part if isinstance(part, str) else part.text for part in parts)


class JudgeSampling(Settings):
    """How a judge samples."""

    seed: int | None = Field(default=None, description="Passed on; null: none.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling; null: as the server has it.")
    temperature: float | None = Field(default=None, ge=0, description="0 is greedy; null: as the server has it.")
    max_completions_tokens: int | None = Field(default=None, ge=1, description="The hosted service spells it so.")
    reasoning_effort: str | None = Field(default=None, description="Of judges that have levels of it.")


_Sampling = Annotated[JudgeSampling, Field(description="How the judge samples.")]


class ScoreModelConfig(_Continuous):
    """A judge model gives a number."""

    type: Literal["score_model"]
    name: Name = "score_model"
    model: str = Field(min_length=1, description="The judge's name at its server.")
    input: list[JudgeMessage] = Field(min_length=1, description="The judge's prompt.")
    range: tuple[float, float] = Field(default=(0.0, 1.0), description="The result is clamped to it.")
    sampling_params: _Sampling = JudgeSampling()

    @field_validator("range")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("expected [low, high] with low below high")
        return value


class LabelModelConfig(Settings):
    """A judge model chooses a label: 1 for a passing one. Inside `multi` only."""

    type: Literal["label_model"]
    name: Name = "label_model"
    model: str = Field(min_length=1, description="The judge's name at its server.")
    input: list[JudgeMessage] = Field(min_length=1, description="The judge's prompt.")
    labels: list[str] = Field(min_length=1, description="What the judge chooses from.")
    passing_labels: list[str] = Field(min_length=1, description="Those that score 1.")
    sampling_params: _Sampling = JudgeSampling()

    @field_validator("passing_labels")
    @classmethod
    def _are_labels(cls, passing: list[str], info: Any) -> list[str]:
        unknown = [label for label in passing if label not in info.data.get("labels", passing)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of labels")
        return passing


class PythonConfig(_Continuous):
    """The user's own `grade(sample, item) -> float`, in a sandbox."""

    type: Literal["python"]
    name: Name = "python"
    source: str = Field(min_length=1, description="Python source that defines grade(sample, item).")
    image_tag: str | None = Field(default=None, description="Read and ignored: the environment is this machine's.")
    isolation: Literal["required", "none"] = Field(
        default="required", description="none runs the source unprotected where no isolation can be had."
    )

    @field_validator("source")
    @classmethod
    def _is_small(cls, source: str) -> str:
        if len(source.encode()) >= _MAX_SOURCE_BYTES:
            raise ValueError(f"expected less than {_MAX_SOURCE_BYTES // 1000} kB of source")
        return source


class EndpointConfig(_Continuous):
    """The user's own HTTP server: POST {sample, item, trace_id} → {"score": number}."""

    type: Literal["endpoint"]
    name: Name = "endpoint"
    url: str = Field(pattern=r"^(https?://|\$\{)", description="Samples are posted here.")
    headers: dict[str, str] = Field(
        default={}, description="Sent with every request; ${NAME} here and in the URL is read from the environment."
    )
    rate_limit: float | None = Field(default=None, gt=0, description="Requests a second.")
    timeout_s: float = Field(default=600.0, gt=0, description="Of one request.")


class CustomTarget(Settings):
    """One of several graders of the user's own, whose rewards are summed."""

    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`.")
    kwargs: dict[str, Any] = Field(default={}, description="A class or a factory is called with them.")
    weight: float = Field(default=1.0, description="What its reward is multiplied with, as trl's reward_weights.")


class CustomConfig(_Continuous):
    """The user's own Python: classes with `grade(task, episode)`, or TRL-style reward functions."""

    type: Literal["custom"]
    name: Name = "custom"
    target: str | None = Field(
        default=None, pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`."
    )
    kwargs: dict[str, Any] = Field(default={}, description="A class or a factory is called with them.")
    targets: list[CustomTarget] | None = Field(
        default=None,
        min_length=1,
        description="Several, in place of target: the reward is the weighted sum, as trl's reward_funcs give it. Names "
        "of targets, or {target, kwargs, weight}.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _by_name(cls, targets: Any) -> Any:
        return [{"target": t} if isinstance(t, str) else t for t in targets] if isinstance(targets, list) else targets

    @model_validator(mode="after")
    def _has_one_form(self) -> CustomConfig:
        if (self.target is None) == (self.targets is None):
            raise ValueError("expected target or targets, one of the two")
        if self.targets is not None and self.kwargs:
            raise ValueError("kwargs: with targets they stand beside each target")
        return self


SingleGraderConfig = Annotated[
    ExactConfig
    | NumericConfig
    | StringCheckConfig
    | TextSimilarityConfig
    | ScoreModelConfig
    | LabelModelConfig
    | PythonConfig
    | EndpointConfig
    | CustomConfig,
    Field(discriminator="type"),
]


class MultiConfig(_Continuous):
    """A formula over the scores of several graders. They do not nest."""

    type: Literal["multi"]
    name: Name = "multi"
    graders: dict[str, SingleGraderConfig] = Field(
        min_length=1, description="By the name that the formula uses; a list or a single grader goes by its own names."
    )
    calculate_output: str = Field(
        min_length=1, description="The formula: + - * / ^, min max abs floor ceil exp sqrt log."
    )
    invalid_grade: float = Field(default=0.0, description="The score where the formula has no value.")

    @field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, graders: Any) -> Any:
        if isinstance(graders, dict) and isinstance(graders.get("type"), str):
            graders = [graders]
        if not isinstance(graders, list):
            return graders
        named: dict[str, Any] = {}
        for grader in graders:
            name = grader.get("name", grader.get("type")) if isinstance(grader, dict) else None
            if not isinstance(name, str):
                raise ValueError("every grader of a list needs a name")
            if name in named:
                raise ValueError(f"two graders are named {name!r}")
            named[name] = grader
        return named


GraderConfig = Annotated[
    ExactConfig
    | NumericConfig
    | StringCheckConfig
    | TextSimilarityConfig
    | ScoreModelConfig
    | PythonConfig
    | EndpointConfig
    | CustomConfig
    | MultiConfig,
    Field(discriminator="type"),
]


class JudgeConfig(Settings):
    """Where `score_model` and `label_model` find their judges: any OpenAI-compatible server, or the run's engine."""

    base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern=r"^(https?://.+|\$\{.+|engine)$",
        description="The server's URL with /v1, ${NAME} in it read from the environment; `engine` asks the run's own "
        "base model with the adapter off.",
    )
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=NAME, description="The environment variable of the key.")
    model: str | None = Field(default=None, description="Asked in place of the model that the graders name.")
    max_concurrency: int = Field(default=32, ge=1, description="Requests in flight.")
    timeout_s: float = Field(default=120.0, gt=0, description="Of one request.")
    max_retries: int = Field(default=3, ge=0, description="Further attempts at a request that failed.")
    cache_size: int = Field(default=100_000, ge=0, description="Answers kept, by content; 0 turns the cache off.")

    @field_validator("base_url")
    @classmethod
    def _ends_before_the_path(cls, url: str) -> str:
        for path in ("/chat/completions", "/completions"):
            if url.rstrip("/").endswith(path):
                raise ValueError(f"expected the URL up to /v1; {path} is added to it")
        return url


class PenaltyConfig(Settings):
    """A penalty of `slope` for each unit over the free allowance, never below `floor`."""

    free: int = Field(default=0, ge=0, description="Units that cost nothing.")
    slope: float = Field(gt=0, description="Reward lost by each unit over the free ones.")
    floor: float = Field(ge=-1, lt=0, description="The lowest value that the penalty reaches, such as -0.2.")
    only_passing: bool = Field(default=False, description="Only on right answers.")


class PenaltiesConfig(Settings):
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


def pass_threshold(grader: GraderConfig) -> float | None:
    """The score from which an answer counts as right; None where a grader of continuous scores names none."""
    return grader.pass_threshold if isinstance(grader, _Continuous) else 1.0


def has_continuous_scores(grader: GraderConfig) -> bool:
    return isinstance(grader, _Continuous)


def check_penalties(grader: GraderConfig, penalties: PenaltiesConfig) -> None:
    """Raise `UserError` unless the law holds: a penalty never lifts a wrong answer over a right one.

    All penalties together lie in [sum of floors, 0]. Where the scores are discrete and the size of that sum is below
    the least gap between two of them (1, or with partial credit c: min(c, 1 - c)), score_better + sum of floors >
    score_worse: whatever the two episodes cost, the better score keeps the better reward; every other configuration is
    refused. Continuous scores need `pass_threshold`: the penalties of a right answer then end at the threshold (see
    `graders.penalties`), and no wrong answer can reach it.
    """
    if penalties.lowest == 0:
        return
    if isinstance(grader, _Continuous):
        if grader.pass_threshold is None:
            raise UserError(
                f"penalties: the scores of the {grader.type!r} grader may lie anywhere, so a penalised right answer "
                "could fall below a wrong one; set grader.pass_threshold to the score from which an answer is right"
            )
        return
    gap, lowest = grader.score_gap, penalties.lowest
    if -lowest > gap - _MARGIN:
        raise UserError(
            f"penalties: the floors sum to {lowest:g}, but two scores of the {grader.type!r} grader may differ by only "
            f"{gap:g}: a penalised right answer could fall below a wrong one; raise the floors so that their sum stays "
            f"above {-gap:g}"
        )
