"""What of a hosted job has no place in a config, and what a config needs that no hosted job says: a line for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from envs.secrets import VARIABLE, without_secrets
from envs.terminal import shown_json
from graders.config import singles
from graders.judges.base import JudgeConfig
from graders.judges.model_graders import LabelModelConfig, ScoreModelConfig
from graders.settings import GraderSettings
from graders.user.python import PythonConfig
from trainer.config import EvalConfig, ModelConfig, OptimConfig, RolloutConfig
from trainer.hosted.schema import OF_THE_JOB_OBJECT, HostedJob, Hyperparameters, Reinforcement
from trainer.models.cache import DEFAULT_MODEL

METHOD = "method.reinforcement"
HYPER = f"{METHOD}.hyperparameters"
MISSING: Any = object()
"""What `find` gives where there is nothing; null is a value."""

_AUTO: dict[str, tuple[str, type[BaseModel]]] = {
    "batch_size": ("rollout.tasks_per_step", RolloutConfig),
    "learning_rate_multiplier": ("optim.learning_rate", OptimConfig),
    "compute_multiplier": ("rollout.group_size", RolloutConfig),
    "eval_interval": ("eval.every_steps", EvalConfig),
    "eval_samples": ("eval.samples_per_task", EvalConfig),
}
"""Our key of each hyperparameter whose `auto` means our default, and the section that holds it."""


def find(sections: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or `MISSING`."""
    node: Any = sections
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return MISSING
        node = node[part]
    return node


def is_open(model: str) -> bool:
    """Whether a job's model is one that can be had: a Hugging Face id, a folder, or the embedded default."""
    return not model.startswith("ft:") and ("/" in model or model == DEFAULT_MODEL or Path(model).is_dir())


def not_taken(raw: Mapping[str, Any], job: HostedJob, given: Mapping[str, Any]) -> Iterator[str]:
    """Lines, `KEY: what`. `raw` is the job as it was written."""
    method = job.method.reinforcement
    assert method is not None
    if told := [key for key in OF_THE_JOB_OBJECT if key in raw]:
        yield f"{', '.join(told)}: what the API tells of the job; no settings, not used"
    for key in _unknown(job):
        if key not in (*OF_THE_JOB_OBJECT, "user_provided_suffix"):
            yield f"{key}: unknown key; not taken over"
    if job.metadata:
        shown = shown_json(without_secrets({"metadata": job.metadata})["metadata"])
        yield f"metadata: no place for it; not taken over: {shown}"
    yield from _of_integrations(job)
    yield from _of_hyperparameters(raw, method.hyperparameters, given)
    for name, grader in _graders(method):
        if isinstance(grader, PythonConfig) and grader.image_tag is not None:
            yield f"{name}.image_tag: ignored; the source can import what is installed here"
    held = {key: raw["method"]["reinforcement"].get(key) for key in ("grader", "tools")}
    for key, variables in _left_out(held, without_secrets(held), METHOD):
        yield (
            f"{key}: holds a secret, which is used but not written into YAML and run folder; to run from these, set "
            f"the environment variable that stands there, {variables}, to the whole of what it replaces; it may stand "
            "in the job as well"
        )


def _left_out(value: Any, written: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, variables) of each secret in `value` that is a variable in what is written down."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _left_out(inner, written[name], f"{key}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _left_out(inner, written[i], f"{key}[{i}]")
    elif value != written:
        there = VARIABLE.findall(str(value))
        yield key, ", ".join(f"${{{name}}}" for name, held in VARIABLE.findall(written) if (name, held) not in there)


def _unknown(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for key in section.model_extra or {}:
        yield prefix + key
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from _unknown(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                if isinstance(inner, BaseModel):
                    yield from _unknown(inner, f"{prefix}{key}[{i}].")


def _of_integrations(job: HostedJob) -> Iterator[str]:
    for i, integration in enumerate(job.integrations):
        key = f"integrations[{i}].wandb"
        if importlib.util.find_spec("wandb") is None:
            yield f"{key}: wandb is not installed; not taken over: install it and add it to trackers"
            continue
        named = integration.wandb.model_dump(exclude_defaults=True, include={"project", "entity", "name", "tags"})
        yield (
            f"{key}: trackers has wandb; not taken over: {shown_json(named)}: the project is agent-rft, and wandb "
            "itself reads WANDB_ENTITY, WANDB_NAME and WANDB_TAGS"
        )


def _of_hyperparameters(raw: Mapping[str, Any], taken: Hyperparameters, given: Mapping[str, Any]) -> Iterator[str]:
    newer = raw["method"]["reinforcement"].get("hyperparameters", {})
    older = raw.get("hyperparameters", {})
    for key, value in older.items():
        if key not in Hyperparameters.model_fields:
            yield f"hyperparameters.{key}: unknown key; not taken over"
        elif value != "auto" and key in newer and newer[key] != value:
            yield f"hyperparameters.{key}: {value} not taken over: {HYPER}.{key} is {newer[key]}"
    for key, (ours, section) in _AUTO.items():
        if (older | newer).get(key) == "auto" and find(given, ours) is MISSING:
            default = section.model_fields[ours.partition(".")[2]].default
            yield f"{HYPER}.{key}: auto: {ours} is {default:g}, the default here"
    if taken.reasoning_effort not in (None, "default"):
        yield (
            f"{HYPER}.reasoning_effort: {taken.reasoning_effort} not taken over: open models have no common measure of "
            "it; see model.chat_template_kwargs (enable_thinking, reasoning_effort) and penalties.reasoning_tokens"
        )


def left_open(method: Reinforcement, given: Mapping[str, Any]) -> Iterator[str]:
    """Settings that the hosted service made by itself and that nothing given makes: what stands there now."""
    name = find(given, "model.name")
    if name is not MISSING and name != DEFAULT_MODEL and find(given, "model.tool_parser") is MISSING:
        parser = ModelConfig.model_fields["tool_parser"].default
        yield f"model.tool_parser: not given, so {parser}; expected the one with which vLLM serves {name}"
    for key in ("max_turn_tokens", "max_episode_tokens"):
        if find(given, f"rollout.{key}") is MISSING:
            default = RolloutConfig.model_fields[key].default
            yield f"rollout.{key}: not given, so {default}; the hosted service names no limit"
    if find(given, "judge.base_url") is MISSING:
        judge = JudgeConfig()
        for key, grader in _graders(method):
            if isinstance(grader, ScoreModelConfig | LabelModelConfig):
                yield (
                    f"{key}.model: {grader.model} is asked at {judge.base_url} with the key in {judge.api_key_env}; "
                    "judge.base_url names another server"
                )


def _graders(method: Reinforcement) -> Iterator[tuple[str, GraderSettings]]:
    """The grader, or those of a multi, by their keys in the job."""
    for inner, grader in singles(method.grader).items():
        yield f"{METHOD}.grader{inner}", grader
