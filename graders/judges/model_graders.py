"""The hosted service's `score_model` and `label_model`: a judge model reads the sample, gives a number or a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from envs.messages import ROLES
from envs.settings import Settings
from envs.text import one_line
from envs.types import Episode, Task
from graders.hosted.templates import MissingVariable, Template
from graders.hosted.view import hosted_sample, item_of
from graders.judges.answers import answer_of, label_of, score_of
from graders.judges.base import Judge, JudgeReply, JudgeRequest, JudgeSampling, NobodyAsked, check_judge
from graders.settings import Continuous, GraderSettings, Name
from graders.types import Grade, GraderErrorKind

_MAX_WORDS = 300
_MAX_ECHO = 120
_STEP = {
    "type": "object",
    "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
    "required": ["description", "conclusion"],
    "additionalProperties": False,
}


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


_Sampling = Annotated[JudgeSampling, Field(description="How the judge samples.")]


class ScoreModelConfig(Continuous):
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

    def check_texts(self) -> None:
        ScoreModelGrader(self, NobodyAsked())


class LabelModelConfig(GraderSettings):
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

    def check_texts(self) -> None:
        LabelModelGrader(self, NobodyAsked())


class ScoreModelGrader:
    """The judge's number, clamped to the range; how it may be written: `graders.judges.answers`.

    Covered, each scored 0 and named in `errors`: a judge that refuses (MODEL_GRADER_REFUSAL), whose answer is cut off
    or holds no finite number (MODEL_GRADER_PARSE), a variable that this sample does not have (INVALID_VARIABLE, or
    SAMPLE_PARSE under `sample.output_json`). It is 0 also where the range does not hold 0, [1, 5] say: the lowest
    score that a judge gave stays above that of an answer that could not be judged. A judge that can't be reached is no
    score at all: `WorldError`. Not covered: judges that can be talked into a high score by what they read.
    """

    def __init__(self, config: ScoreModelConfig, judge: Judge) -> None:
        self._config = config
        self._question = _Question(
            judge,
            where=f"grader {config.name!r}",
            model=config.model,
            messages=config.input,
            sampling=config.sampling_params,
            schema=_answer_schema({"type": "number"}),
        )

    async def grade(self, task: Task, episode: Episode) -> Grade:
        return await _judged(self._config, self._question, task, episode, self._read)

    def _read(self, result: Any) -> tuple[float, str]:
        low, high = self._config.range
        number = score_of(result, (low, high))
        if number is None:
            raise _NoResult(f"result {one_line(repr(result), _MAX_ECHO)} is no number")
        score = min(max(number, low), high)
        clamped = "" if score == number else f", clamped from {one_line(str(result), _MAX_ECHO)}"
        return score, f"gives {score:g}{clamped}"

    def check(self, task: Task) -> None:
        self._question.check(task)


class LabelModelGrader:
    """1 where the judge chooses a passing label, 0 for any other. What fails is scored as by `score_model`."""

    def __init__(self, config: LabelModelConfig, judge: Judge) -> None:
        self._config = config
        self._question = _Question(
            judge,
            where=f"grader {config.name!r}",
            model=config.model,
            messages=config.input,
            sampling=config.sampling_params,
            schema=_answer_schema({"type": "string", "enum": list(config.labels)}),
        )

    async def grade(self, task: Task, episode: Episode) -> Grade:
        return await _judged(self._config, self._question, task, episode, self._read)

    def _read(self, result: Any) -> tuple[float, str]:
        label = label_of(result, self._config.labels)
        if label is None:
            raise _NoResult(f"result {one_line(repr(result), _MAX_ECHO)} is none of the labels")
        return float(label in self._config.passing_labels), f"chooses {label!r}"

    def check(self, task: Task) -> None:
        self._question.check(task)


async def _judged(
    config: ScoreModelConfig | LabelModelConfig,
    question: _Question,
    task: Task,
    episode: Episode,
    read: Callable[[Any], tuple[float, str]],
) -> Grade:
    """Ask and grade; `read` turns the answer's result into a score and what the judge did, or raises `_NoResult`."""
    try:
        reply = await question.ask(task, episode)
    except MissingVariable as e:
        return _failed(config.name, e.kind, str(e))
    tokens = {config.model: reply.num_tokens}
    try:
        answer = _read_answer(reply)
        score, words = read(answer["result"])
    except _NoResult as e:
        return _failed(config.name, e.kind, str(e), tokens)
    return Grade(
        reward=score,
        parts={config.name: score},
        explanation=f"{config.model} {words}{_reasons(answer)}",
        judge_tokens=tokens,
    )


class _Question:
    """The judge's prompt as templates, and what its answer must fit."""

    def __init__(
        self,
        judge: Judge,
        *,
        where: str,
        model: str,
        messages: list[JudgeMessage],
        sampling: JudgeSampling,
        schema: Mapping[str, Any],
    ) -> None:
        check_judge(judge, sampling)
        self._judge = judge
        self._model = model
        self._sampling = sampling
        self._schema = schema
        self._messages = [
            (ROLES[m.role], Template(m.text, where=f"{where}: input[{i}].content")) for i, m in enumerate(messages)
        ]

    async def ask(self, task: Task, episode: Episode) -> JudgeReply:
        """Raises `MissingVariable`, and `WorldError` as the judge does."""
        item, sample = item_of(task), hosted_sample(episode)
        messages = tuple({"role": role, "content": text.render(item, sample)} for role, text in self._messages)
        return await self._judge.ask(
            JudgeRequest(model=self._model, messages=messages, schema=self._schema, sampling=self._sampling)
        )

    def check(self, task: Task) -> None:
        for _, text in self._messages:
            text.check(task)


class _NoResult(Exception):
    """The judge's answer gives no result."""

    def __init__(self, cause: str, kind: GraderErrorKind = GraderErrorKind.MODEL_GRADER_PARSE) -> None:
        super().__init__(cause)
        self.kind = kind


def _answer_schema(result: Mapping[str, Any]) -> dict[str, Any]:
    """The hosted service's structure. The steps come first: a judge that has written its result no longer thinks."""
    return {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": _STEP}, "result": dict(result)},
        "required": ["steps", "result"],
        "additionalProperties": False,
    }


def _read_answer(reply: JudgeReply) -> Mapping[str, Any]:
    """The answer as an object, which has a `result`. Raises `_NoResult`."""
    if reply.refusal:
        raise _NoResult(
            f"the judge refused: {one_line(reply.refusal, _MAX_ECHO)}", GraderErrorKind.MODEL_GRADER_REFUSAL
        )
    answer = answer_of(reply.text)
    if "result" not in answer:
        raise _NoResult(f"the judge's answer has no result: {one_line(reply.text, _MAX_ECHO)}")
    return answer


def _reasons(answer: Mapping[str, Any]) -> str:
    """What the judge concluded at each step, in at most `_MAX_WORDS` characters; nothing without steps."""
    steps = answer.get("steps")
    said = [step.get("conclusion") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    words = "; ".join(text.strip() for text in said if isinstance(text, str) and text.strip())
    return f": {one_line(words, _MAX_WORDS)}" if words else ""


def _failed(name: str, kind: GraderErrorKind, cause: str, judge_tokens: Mapping[str, int] | None = None) -> Grade:
    return Grade(reward=0.0, parts={name: 0.0}, explanation=cause, errors=(kind,), judge_tokens=judge_tokens or {})
