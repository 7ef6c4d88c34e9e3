"""Is this run worth its time? Some rollouts of the policy that training would start from, and what they say.

They go through the very parts of the trainer: what is prepared, the policy with its warm start, the engine, the
published and proven adapter, the rollout worker. What is measured is what the first step would see.

Writes into the folder `out`: preflight.html, preflight.json (`tasks` holds what the curriculum reads), rollouts.jsonl,
preflight.log. *Not covered:* more than one process; the estimate takes a number of GPUs instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError, found_late
from envs.reading.documents import check_writable
from envs.reading.json_text import write_json
from envs.secrets import without_secrets
from envs.types import Task
from trainer import processes
from trainer.config import RunConfig
from trainer.learning.samples import rollout_samples
from trainer.models.machines import Machine, check_option, this_machine
from trainer.models.memory import MemoryRow, memory_rows, num_weights_of, read_shape
from trainer.preflight.advice import Advice, advise, advise_memory, verdict
from trainer.preflight.duration import Speeds, TimeEstimate, time_estimate
from trainer.preflight.figures import Figures, figures_of
from trainer.prepare import Prepared, prepare
from trainer.reachable import PATIENCE_S
from trainer.rollouts.collect import refuse_if_none_graded, warn_of_unclosed
from trainer.runs.files import append_text, sealed, write_atomically
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.runs.records import rollout_to_json
from trainer.runs.resuming import beginning_with
from trainer.seeds import derive_seed
from trainer.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    from trainer.learning.policy import Policy
    from trainer.session import StartEngine

_LONG_UPDATE_S = 60.0
"""An update that takes longer is not repeated without its warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `scripts/preflight.py` is given beside the config."""

    out: Path
    num_tasks: int = 32
    held_out: bool = False
    """The evaluation's tasks, the first of them, instead of a draw of training's."""
    samples: int | None = None
    """Rollouts of each task; None: the config's group size, so that shares of varied tasks are those of a step."""
    adapter: Path | None = None
    """A trained adapter to measure instead of the policy that training would start from."""
    gpu_hour_price: float | None = None
    gpus: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Everything found."""

    policy: str
    """In words: which policy was measured."""
    config: RunConfig
    figures: Figures
    speeds: Speeds
    time: TimeEstimate
    gpu_hour_price: float | None
    memory: Sequence[MemoryRow]
    """Empty for a model that the formulas do not cover."""
    advice: Sequence[Advice]

    @property
    def verdict(self) -> str:
        return verdict(list(self.advice))

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self.figures)
        tasks = figures.pop("tasks")
        cost = None if self.gpu_hour_price is None else self.time.cost(self.gpu_hour_price)
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "policy": self.policy,
            "verdict": self.verdict,
            "advice": [asdict(a) for a in self.advice],
            "figures": figures,
            "speeds": asdict(self.speeds),
            "time": asdict(self.time) | {"total_s": self.time.total_s, "cost": cost},
            "memory": [asdict(row) for row in self.memory],
            "config": without_secrets(self.config.model_dump(mode="json")),
            "tasks": tasks,
        }


def preflight(config: RunConfig, options: Options, *, start_engine: StartEngine | None = None) -> Preflight:
    """Roll out, measure, advise; write the files. Raises `UserError` before anything is loaded.

    `WorldError` when every rollout was lost. `start_engine` as in `train`.
    """
    options = _checked(options)
    measured = config.model_copy(update={"trackers": []})
    if options.adapter is not None:
        measured = beginning_with(measured, options.adapter)
    with tempfile.TemporaryDirectory(prefix="agent-rft-preflight-") as folder:
        # The run's own folder stays untouched: training must find it empty.
        prepared = prepare(measured.model_copy(update={"output_dir": Path(folder) / "run"}), patience_s=PATIENCE_S)
        options.out.mkdir(parents=True, exist_ok=True)
        rollouts, speeds, machine = _measure(prepared, options, start_engine)
    figures = figures_of(rollouts, samples_per_task=_samples(config, options))
    memory = memory_of(config, prepared.model_path, on_cpu=machine.on_cpu)
    advice = advise(figures, config, offers_tools=bool(prepared.world.make_env().tools))
    if memory:
        advice += advise_memory(memory, config, total_bytes=machine.memory_bytes, on_cpu=machine.on_cpu)
    found = Preflight(
        policy=_policy_in_words(measured, options),
        config=config,
        figures=figures,
        speeds=speeds,
        time=_time(config, figures, speeds, options),
        gpu_hour_price=options.gpu_hour_price,
        memory=memory,
        advice=advice,
    )
    write_atomically(options.out / "preflight.json", write_json(found.to_json(), indent=1))
    return found


def _time(config: RunConfig, figures: Figures, speeds: Speeds, options: Options) -> TimeEstimate:
    time = time_estimate(config, figures, speeds, gpus=options.gpus)
    if options.adapter is None or config.warmstart is None:
        return time
    return replace(time, notes=[*time.notes, "an adapter was measured: the warm start is not in it"])


def preflight_requests(config: RunConfig, tasks: Sequence[Task], options: Options) -> list[RolloutRequest]:
    """A seeded draw of the tasks, or the first as the evaluation takes them, each with its samples.

    Other seeds than training's.
    """
    drawn = list(tasks[: options.num_tasks])
    if not options.held_out:
        drawn = random.Random(f"{config.seed}/preflight").sample(list(tasks), min(options.num_tasks, len(tasks)))
    return [
        RolloutRequest(
            task=task,
            rollout_id=f"preflight-{task.task_id}-{k}",
            seed=derive_seed(config.seed, "preflight", task.task_id, k),
        )
        for task in drawn
        for k in range(_samples(config, options))
    ]


def memory_of(config: RunConfig, model_path: Path, *, on_cpu: bool) -> list[MemoryRow]:
    """The memory estimate of the configured model; empty where the formulas do not cover it."""
    shape = read_shape(model_path)
    if shape is None:
        return []
    return memory_rows(config, shape, num_weights_of(model_path, shape), on_cpu=on_cpu)


def _measure(
    prepared: Prepared, options: Options, start_engine: StartEngine | None
) -> tuple[list[Rollout], Speeds, Machine]:
    from trainer.session import open_session

    config = prepared.config
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise UserError("preflight runs on one process: start it with python, and give the run's GPUs as --gpus")
    RunFolder.create(config)
    run = RunFolder.open(config, rank=0)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(options.out / "preflight.log", 0))
        loop = stack.enter_context(asyncio.Runner())
        stack.callback(lambda: loop.run(prepared.aclose()))
        start = time.perf_counter()
        session = stack.enter_context(
            open_session(prepared, run, accelerator, progress, loop, start_engine, first_step=0)
        )
        start_s = time.perf_counter() - start
        stack.enter_context(found_late())

        requests = preflight_requests(
            config, prepared.eval_tasks if options.held_out else prepared.train_tasks, options
        )
        progress.phase("preflight's rollouts", total=len(requests))
        path = options.out / "rollouts.jsonl"
        write_atomically(path, "")

        def keep(rollout: Rollout) -> None:
            append_text(path, sealed(rollout_to_json(rollout)))
            progress.advance(1, tokens=rollout.episode.num_tokens)

        rollouts_start = time.perf_counter()
        rollouts = loop.run(session.worker.run(requests, temperature=config.rollout.temperature, on_rollout=keep))
        rollouts_s = time.perf_counter() - rollouts_start
        warn_of_unclosed(rollouts, progress)
        refuse_if_none_graded(rollouts, "of the preflight")

        progress.phase("one microbatch's update")
        trained_tokens_per_s = _training_speed(session.policy, rollouts, config, progress)
    speeds = Speeds(
        sampled_tokens_per_s=sum(r.episode.num_tokens for r in rollouts) / rollouts_s,
        num_rollouts=len(rollouts),
        trained_tokens_per_s=trained_tokens_per_s,
        publish_s=session.first_publish_s,
        start_s=start_s,
    )
    return rollouts, speeds, this_machine()


def _training_speed(policy: Policy, rollouts: Sequence[Rollout], config: RunConfig, progress: Progress) -> float | None:
    """Row tokens a second of an update of one microbatch of middling length; None where memory does not suffice.

    It changes the policy, which nothing uses afterwards.
    """
    import torch

    from trainer.learning.packing.layouts import pack

    rows = [
        sample
        for i, r in enumerate(rollouts)
        if r.grade is not None
        for sample in rollout_samples(
            r.ledgers, advantage=(-1.0) ** i, rollout_id=r.episode.rollout_id, task_id=r.task.task_id
        )
    ]
    if not rows:
        return None
    batches = pack(rows, config.optim.max_microbatch_tokens, policy.layout)
    batch = [rows[i] for i in batches[len(batches) // 2].row_indices]
    tokens = sum(len(row.token_ids) for row in batch)
    seconds = 0.0
    try:
        # The first update also allocates and compiles.
        for _ in range(2):
            start = time.perf_counter()
            policy.update(
                batch,
                config.loss,
                temperature=config.rollout.temperature,
                constant_tokens=config.rollout.max_episode_tokens,
            )
            seconds = time.perf_counter() - start
            if seconds > _LONG_UPDATE_S:
                break
    except torch.OutOfMemoryError as e:
        progress.warn(f"an update of one microbatch runs out of memory: {e}")
        return None
    progress.advance(1, tokens=tokens)
    return tokens / seconds


def _checked(options: Options) -> Options:
    if options.num_tasks < 1:
        raise UserError(f"--tasks {options.num_tasks}: expected at least 1")
    if options.samples is not None and options.samples < 2:
        raise UserError(f"--samples {options.samples}: expected at least 2, or no task's rewards could vary")
    if options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: expected at least 1")
    check_option("--gpu-hour-price", options.gpu_hour_price, least=0.0)
    if options.adapter is not None and not (options.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"--adapter {options.adapter}: holds no adapter_model.safetensors")
    check_writable(options.out, "--out", is_folder=True)
    return options


def _samples(config: RunConfig, options: Options) -> int:
    return options.samples or config.rollout.group_size


def _policy_in_words(config: RunConfig, options: Options) -> str:
    if options.adapter is not None:
        return f"{config.model.name} under the adapter {options.adapter}"
    if config.warmstart is not None:
        return f"{config.model.name} after the warm start of {config.warmstart.num_steps} steps"
    return f"{config.model.name}, untrained"
