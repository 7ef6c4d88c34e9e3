"""A job of the hosted service turned into a config: what it says in our words, and what could not be taken over said.

The job brings data, tools, grader and hyperparameters. What the hosted service never knew (the open model, its
parsers, the engine) comes from a YAML or from overrides; whatever stands there goes before what the job says.
Loads neither torch nor vllm.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from envs.errors import UserError
from envs.reading.documents import override_of
from envs.reading.rows import FileOrDataset, read_rows
from envs.remote.config import RemoteToolConfig
from envs.secrets import hidden_in, without_secrets
from envs.terminal import shown_json
from envs.validation import validation_problems
from trainer.config import OptimConfig, RolloutConfig, RunConfig, read_sections, validate_config
from trainer.hosted.remarks import HYPER, METHOD, MISSING, find, is_open, left_open, not_taken
from trainer.hosted.schema import HostedJob, Hyperparameters, Reinforcement, read_job

_MOST_SHOWN = 120
_FILE_ID = re.compile(r"file-[\w-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenJob:
    """What became of a hosted job."""

    source: str
    sections: Mapping[str, Any]
    """The config as a YAML would hold it, defaults left out."""
    config: RunConfig
    """The same, validated."""
    remarks: tuple[str, ...]
    """A line, `KEY: what`, for all that was not taken over, or not as it stands."""

    def to_yaml(self) -> str:
        """A config for `--config`, the remarks at its head; secrets are left to the environment."""
        head = [f"# From the hosted job {self.source}.", *(f"# {remark}" for remark in self.remarks)]
        body = yaml.dump(without_secrets(self.sections), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        return "\n".join(head) + "\n" + body


@dataclass(frozen=True, slots=True, kw_only=True)
class _Take:
    """One setting that the job makes."""

    source: str
    """Its key in the job."""
    key: str
    """Its key here, with its section."""
    value: Any
    remark: str = ""
    """Said where it is taken over, but not just as it stands."""
    obstacle: str = ""
    """Why it can't be taken over."""


def take_job(
    path: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    training_file: Path | None = None,
    validation_file: Path | None = None,
) -> TakenJob:
    """The run that the job at `path` describes, under the YAML `config` and `overrides`, which go before it.

    Raises `UserError` that names the key in the job or in the config and what was expected.
    *Covered*: the body of a job's creation, the job object as the API gives it back, the older top-level
    `hyperparameters`. *Not covered*: supervised and DPO jobs, lists of jobs; hosted files are not fetched.
    """
    raw, job = read_job(path)
    files = {"data.train": training_file, "data.eval": validation_file}
    named = [override_of(key, str(file)) for key, file in files.items() if file is not None]
    given = read_sections(config, [*named, *overrides])
    assert job.method.reinforcement is not None
    remarks = [_model_remark(path, job, given), *not_taken(raw, job, given)]
    sections: dict[str, Any] = {}
    for take in _takes(path, raw, job, given):
        remarks += _put(sections, take, given)
    remarks += left_open(job.method.reinforcement, given)
    merged = _merged(sections, given)
    ordered = {key: merged[key] for key in (*RunConfig.model_fields, *merged) if key in merged}
    source = f"from the hosted job {path}" + (f" and {config}" if config else "")
    return TakenJob(
        source=path.name,
        sections=ordered,
        config=validate_config(ordered, source=source),
        remarks=tuple(hidden_in(" ".join(remark.split())) for remark in remarks if remark),
    )


# ---- what the job says, in our words


def _takes(path: Path, raw: Mapping[str, Any], job: HostedJob, given: Mapping[str, Any]) -> Iterator[_Take]:
    """In the order of a config. What is given beside the job is looked at where one setting rests on another."""
    method = job.method.reinforcement
    assert method is not None
    suffix = job.suffix or raw.get("user_provided_suffix") or path.stem
    yield _Take(source="suffix", key="output_dir", value=f"runs/{_folder_name(suffix)}")
    if job.seed is not None:
        yield _Take(source="seed", key="seed", value=job.seed)
    if is_open(job.model):
        yield _Take(source="model", key="model.name", value=job.model)
    yield _Take(source=f"{METHOD}.tools", key="world", value=_world(method))
    rows: dict[str, Any] = {}
    for source, name, key in (
        ("training_file", job.training_file, "data.train"),
        ("validation_file", job.validation_file, "data.eval"),
    ):
        rows[source] = find(given, key)
        if rows[source] is MISSING:
            rows[source] = _path_of(path, source, name, key)
            yield _Take(source=source, key=key, value=rows[source])
    yield _Take(source=f"{METHOD}.grader", key="grader", value=raw["method"]["reinforcement"]["grader"])
    yield from _rollout(method)
    yield from _answer(method, rows["training_file"], given)
    yield from _optim(method.hyperparameters, rows["training_file"], given)
    yield from _eval(method.hyperparameters, rows["validation_file"], given)
    if job.integrations and importlib.util.find_spec("wandb") is not None:
        yield _Take(source="integrations", key="trackers", value=["tensorboard", "wandb"])


def _world(method: Reinforcement) -> dict[str, Any]:
    known = RemoteToolConfig.model_fields.keys()
    tools = [
        {key: value for key, value in tool.model_dump(exclude_unset=True).items() if key in known}
        for tool in method.tools
    ]
    return {"type": "remote", "tools": tools}


def _rollout(method: Reinforcement) -> Iterator[_Take]:
    hyper = method.hyperparameters
    if hyper.batch_size is not None:
        yield _Take(source=f"{HYPER}.batch_size", key="rollout.tasks_per_step", value=hyper.batch_size)
    if hyper.compute_multiplier is not None:
        usual = RolloutConfig.model_fields["group_size"].default
        size = max(2, round(usual * hyper.compute_multiplier))
        yield _Take(
            source=f"{HYPER}.compute_multiplier",
            key="rollout.group_size",
            value=size,
            remark=f"{hyper.compute_multiplier:g} of {usual} rollouts of a task, the default here, and no less than 2: "
            f"rollout.group_size {size}",
        )
    if method.max_episode_steps is not None:
        steps = method.max_episode_steps
        yield _Take(source=f"{METHOD}.max_episode_steps", key="rollout.max_tool_calls", value=steps)
        # A turn to be told that the budget is used up, and one to answer, as the defaults have it.
        yield _Take(
            source=f"{METHOD}.max_episode_steps",
            key="rollout.max_turns",
            value=steps + 2,
            remark=f"{steps} tool calls (rollout.max_tool_calls) in up to {steps + 2} turns (rollout.max_turns); "
            "reasoning without a call is not counted as a step",
        )


def _answer(method: Reinforcement, train: Any, given: Mapping[str, Any]) -> Iterator[_Take]:
    """What an answer is, and its form."""
    served = bool(method.tools) or find(given, "world") is not MISSING
    calls = not served and _have_tools(train, "training_file")
    if calls:
        # Tools that are served by nobody: the hosted service then grades the calls themselves.
        yield _Take(
            source=f"{METHOD}.tools",
            key="rollout.answer",
            value="tool_calls",
            remark="none, but the rows define tools: their calls are the answer (rollout.answer tool_calls)",
        )
    if method.response_format is not None:
        is_free = method.response_format.get("type") == "text" or not (served or calls)
        yield _Take(
            source=f"{METHOD}.response_format",
            key="rollout.response_format",
            value=dict(method.response_format),
            obstacle="" if is_free else "answers have a form here only where no tools are offered",
        )


def _optim(hyper: Hyperparameters, train: Any, given: Mapping[str, Any]) -> Iterator[_Take]:
    source, key = f"{HYPER}.n_epochs", "optim.num_steps"
    if find(given, key) is MISSING:
        per_step = find(given, "rollout.tasks_per_step")
        if not isinstance(per_step, int):
            per_step = hyper.batch_size or RolloutConfig.model_fields["tasks_per_step"].default
        epochs, num_rows = hyper.n_epochs or 1, _num_rows(train, "training_file")
        num_steps = math.ceil(epochs * num_rows / max(1, per_step))
        yield _Take(
            source=source,
            key=key,
            value=num_steps,
            remark=f"{epochs}{'' if hyper.n_epochs else ' (auto)'} over {num_rows} rows, {per_step} a step: "
            f"optim.num_steps {num_steps}",
        )
    elif hyper.n_epochs is not None:
        yield _Take(source=source, key=key, value=f"{hyper.n_epochs} epochs")
    if hyper.learning_rate_multiplier is not None:
        usual = OptimConfig.model_fields["learning_rate"].default
        rate = float(f"{usual * hyper.learning_rate_multiplier:.6g}")
        yield _Take(
            source=f"{HYPER}.learning_rate_multiplier",
            key="optim.learning_rate",
            value=rate,
            remark=f"{hyper.learning_rate_multiplier:g} of {usual:g}, the default here (the hosted one is not known): "
            f"optim.learning_rate {rate:g}",
        )


def _eval(hyper: Hyperparameters, rows: Any, given: Mapping[str, Any]) -> Iterator[_Take]:
    if find(given, "eval.num_tasks") is MISSING:
        yield _Take(source="validation_file", key="eval.num_tasks", value=_num_rows(rows, "validation_file"))
    if hyper.eval_interval is not None:
        yield _Take(source=f"{HYPER}.eval_interval", key="eval.every_steps", value=hyper.eval_interval)
    if hyper.eval_samples is not None:
        yield _Take(source=f"{HYPER}.eval_samples", key="eval.samples_per_task", value=hyper.eval_samples)


# ---- files


def _path_of(job_path: Path, source: str, name: str | None, key: str) -> str:
    """The file of rows that the job names: a path, or an id next to the job under its own name."""
    option = f"--{source.replace('_', '-')}"
    if name is None:
        raise UserError(f"hosted job {job_path}: {source}: not given; name the held-out rows with {option} or {key}")
    tried = [job_path.parent / name, job_path.parent / f"{name}.jsonl", Path(name)]
    for candidate in tried:
        if candidate.is_file():
            return str(candidate)
    if _FILE_ID.fullmatch(name):
        raise UserError(
            f"hosted job {job_path}: {source}: {name!r} is the id of a file of the hosted service; download it, then "
            f"name it with {option} PATH, or put it next to the job as {name}.jsonl"
        )
    raise UserError(f"hosted job {job_path}: {source}: no file {name!r} next to the job; name it with {option} PATH")


def _num_rows(rows: Any, source: str) -> int:
    return sum(1 for _ in _read_rows(rows, source))


def _have_tools(rows: Any, source: str) -> bool:
    return any(isinstance(row, dict) and row.get("tools") for row in _read_rows(rows, source))


def _read_rows(rows: Any, source: str) -> Iterator[Any]:
    """The rows behind a key of the job. Raises `UserError` as `read_rows`."""
    try:
        named: Any = TypeAdapter(FileOrDataset).validate_python(rows)
    except ValidationError as e:
        raise UserError(validation_problems(f"hosted job: {source}", e)) from None
    return (row for _, _, row in read_rows(named, key=source))


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "job"


# ---- putting it together


def _model_remark(path: Path, job: HostedJob, given: Mapping[str, Any]) -> str:
    if is_open(job.model):
        return ""
    name = find(given, "model.name")
    if name is MISSING:
        raise UserError(
            f"hosted job {path}: model: {job.model!r} runs at the hosted service only; name an open model in its "
            "place, in --config or as model.name=Qwen/Qwen3-8B model.tool_parser=hermes model.reasoning_parser=qwen3"
        )
    return f"model: {job.model!r} is the hosted service's; model.name is {name!r}"


def _put(sections: dict[str, Any], take: _Take, given: Mapping[str, Any]) -> list[str]:
    """Add it to the sections, unless it is given beside the job; what there is to say of it."""
    there = find(given, take.key)
    if take.obstacle and there is MISSING:
        return [f"{take.source}: not taken over: {take.obstacle}"]
    is_part = _is_part(there, take.value)
    if there is MISSING or is_part:
        section, _, key = take.key.rpartition(".")
        node = sections.setdefault(section, {}) if section else sections
        node[key] = take.value
        lost = [k for k in there if k in take.value and there[k] != take.value[k]] if is_part else []
        said = [f"{take.source}: {take.remark}"] if take.remark else []
        return said + [f"{take.source}: {k} not taken over: {take.key}.{k} is given" for k in lost]
    if there == take.value:
        return []
    return [f"{take.source}: {_shown(take.value)} not taken over: {take.key} is given as {_shown(there)}"]


def _is_part(there: Any, value: Any) -> bool:
    """Whether what is given adds to what the job says, as a threshold does to a grader: the same type, or none."""
    if not isinstance(there, dict) or not isinstance(value, dict) or "type" not in value:
        return False
    return bool(there.get("type", value["type"]) == value["type"])


def _merged(sections: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given over taken, at every depth."""
    merged = dict(sections)
    for key, value in given.items():
        taken = merged.get(key)
        if isinstance(taken, dict) and (isinstance(value, dict) or value is None):
            merged[key] = _merged(taken, value or {})
        else:
            merged[key] = value
    return merged


def _shown(value: Any) -> str:
    text = shown_json(without_secrets(value), default=str)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines (a grader's source) as it reads."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
