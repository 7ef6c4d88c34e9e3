"""The body of `POST /v1/fine_tuning/jobs` for reinforcement, and the job object that the API gives back.

Written after the types of the `openai` package, with the agent form's `tools`, `max_episode_steps` and
`response_format` besides. Unknown keys are kept, so that they can be named; wrong values are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from envs.errors import UserError
from envs.reading.documents import read_document
from envs.remote.config import RemoteToolConfig
from envs.settings import JsonObject, Settings
from envs.validation import validation_problems
from graders.config import GraderConfig


class _Hosted(Settings, extra="allow"):
    """Unknown keys are kept."""


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


_Count = Annotated[int | None, BeforeValidator(_auto)]
_Factor = Annotated[float | None, BeforeValidator(_auto)]


class Hyperparameters(_Hosted):
    """None stands for `auto`, the hosted default of all of them."""

    batch_size: _Count = Field(None, ge=1, le=256, strict=True, description="tasks in a step")
    n_epochs: _Count = Field(None, ge=1, le=50, strict=True, description="passes over the training file")
    learning_rate_multiplier: _Factor = Field(None, gt=0, strict=True, description="times the default rate")
    compute_multiplier: _Factor = Field(
        None, ge=0.00001, le=10, strict=True, description="times the rollouts of a task"
    )
    eval_interval: _Count = Field(None, ge=1, strict=True, description="steps between evaluations")
    eval_samples: _Count = Field(None, ge=1, le=10, strict=True, description="rollouts of a held-out task")
    reasoning_effort: Annotated[
        Literal["default", "minimal", "low", "medium", "high"] | None, BeforeValidator(_auto)
    ] = Field(None, description="of models that have levels of it")


class HostedTool(RemoteToolConfig, extra="allow"):
    """A tool of the agent form: `{name, server_url, headers}`; our own settings of a tool may stand there too."""


class Reinforcement(_Hosted):
    """`method.reinforcement`."""

    grader: GraderConfig = Field(description="the score of an episode")
    tools: list[HostedTool] = Field([], description="tool servers; their schemas stand in the rows")
    max_episode_steps: _Count = Field(None, ge=1, strict=True, description="tool calls of an episode")
    response_format: JsonObject | None = Field(None, description="of the answer: JSON schema")
    hyperparameters: Hyperparameters = Field(Hyperparameters(), description="each may be auto")


class Method(_Hosted):
    """How the model is trained. Only reinforcement is, here."""

    type: Literal["reinforcement", "supervised", "dpo"] = Field(
        "reinforcement", description="only reinforcement is run here"
    )
    reinforcement: Reinforcement | None = Field(None, description="the method's own settings")

    @model_validator(mode="before")
    @classmethod
    def _is_reinforcement(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for other in ("supervised", "dpo"):
                if data.get("type") == other or other in data:
                    raise ValueError(
                        f"{other}: not done here; expected type reinforcement (whole conversations can be imitated "
                        "before it: warmstart.data)"
                    )
            if "reinforcement" not in data:
                raise ValueError("reinforcement: required, but not given")
        return data


class Wandb(_Hosted):
    """Where the hosted service would have logged."""

    project: str = Field(description="that the run is filed under")
    entity: str | None = Field(None, description="user or team")
    name: str | None = Field(None, description="of the run")
    tags: list[str] = Field([], description="of the run")


class Integration(_Hosted):
    """A tracker."""

    type: Literal["wandb"]
    wandb: Wandb = Field(description="its settings")


class HostedJob(_Hosted):
    """One job, as it was created or as the API tells of it."""

    model: str = Field(min_length=1, description="the base model, by the hosted service's name")
    training_file: str = Field(min_length=1, description="id of an uploaded file, or a path")
    validation_file: str | None = Field(None, min_length=1, description="held-out rows, likewise")
    suffix: str | None = Field(None, min_length=1, max_length=64, description="of the trained model's name")
    seed: int | None = Field(None, ge=0, strict=True, description="of the run")
    metadata: dict[str, Any] = Field({}, description="the user's own notes, which change nothing")
    integrations: list[Integration] = Field([], description="trackers of the run")
    method: Method = Field(description="how the model is trained")
    hyperparameters: dict[str, Any] = Field({}, description="the older place of what `method` holds now")


OF_THE_JOB_OBJECT = (
    "object",
    "id",
    "status",
    "created_at",
    "finished_at",
    "estimated_finish",
    "error",
    "fine_tuned_model",
    "organization_id",
    "result_files",
    "trained_tokens",
    "usage_metrics",
    "shared_with_openai",
    "eval_id",
)
"""What the API tells of a job besides what it was created with: not settings."""


def read_job(path: Path) -> tuple[dict[str, Any], HostedJob]:
    """The job as it stands in the file, nulls left out, and validated.

    Raises `UserError` that names the file, the key in the job and what was expected.
    """
    raw = _read(path)
    return raw, _validated(raw, path)


def _read(path: Path) -> dict[str, Any]:
    where = f"hosted job {path}"
    data = read_document(path, where)
    if not isinstance(data, dict) or data.get("object") == "list":
        raise UserError(f"{where}: expected one job as a JSON object, got a {_kind(data)}")
    without: dict[str, Any] = _without_nulls(data)
    return without


def _kind(data: Any) -> str:
    return "list of jobs" if isinstance(data, dict) else type(data).__name__


def _without_nulls(value: Any) -> Any:
    """The API writes null for what was not given. A JSON schema means it."""
    if isinstance(value, dict):
        return {
            key: inner if key == "response_format" else _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _validated(raw: dict[str, Any], path: Path) -> HostedJob:
    where = f"hosted job {path}"
    if "method" not in raw:
        raise UserError(
            f"{where}: method: required, with type reinforcement and its grader; a job without it is supervised"
        )
    try:
        job = HostedJob.model_validate(raw)
    except ValidationError as e:
        raise UserError(validation_problems(where, e, HostedJob)) from None
    try:
        older = Hyperparameters.model_validate(job.hyperparameters)
    except ValidationError as e:
        raise UserError(validation_problems(f"{where}: hyperparameters", e, Hyperparameters)) from None
    # What `method` says goes before the older place.
    assert job.method.reinforcement is not None
    said = job.method.reinforcement.hyperparameters.model_dump(exclude_unset=True)
    both = Hyperparameters.model_validate(
        older.model_dump(include=set(Hyperparameters.model_fields), exclude_unset=True) | said
    )
    reinforcement = job.method.reinforcement.model_copy(update={"hyperparameters": both})
    return job.model_copy(update={"method": job.method.model_copy(update={"reinforcement": reinforcement})})
