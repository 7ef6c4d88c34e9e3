"""The body of `POST /v1/fine_tuning/jobs` for reinforcement, and the job object that the API gives back.

Written after the types of the `openai` package, with the agent form's `tools`, `max_episode_steps` and
`response_format` besides. Unknown keys are kept, so that they can be named; wrong values are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from envs.remote.config import RemoteToolConfig
from graders.config import GraderConfig


class _Hosted(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=(), allow_inf_nan=False)


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


class HostedTool(RemoteToolConfig):
    """A tool of the agent form: `{name, server_url, headers}`; our own settings of a tool may stand there too."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Reinforcement(_Hosted):
    """`method.reinforcement`."""

    grader: GraderConfig
    tools: list[HostedTool] = Field([], description="tool servers; their schemas stand in the rows")
    max_episode_steps: _Count = Field(None, ge=1, strict=True, description="tool calls of an episode")
    response_format: dict[str, Any] | None = Field(None, description="of the answer: JSON schema")
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(_Hosted):
    """How the model is trained. Only reinforcement is, here."""

    type: Literal["reinforcement", "supervised", "dpo"] = "reinforcement"
    reinforcement: Reinforcement | None = None

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

    project: str
    entity: str | None = None
    name: str | None = None
    tags: list[str] = []


class Integration(_Hosted):
    """A tracker."""

    type: Literal["wandb"]
    wandb: Wandb


class HostedJob(_Hosted):
    """One job, as it was created or as the API tells of it."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = Field(None, min_length=1)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, strict=True)
    metadata: dict[str, Any] = {}
    integrations: list[Integration] = []
    method: Method
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
