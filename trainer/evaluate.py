"""Held-out evaluation: the same tasks with the same seeds each time, so that two evaluations are paired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from envs.types import Task
from trainer import processes
from trainer.config import RunConfig
from trainer.measures.summary import prefixed, summarise
from trainer.seeds import derive_seed
from trainer.types import Kind, Phase, RolloutRequest, ids_begin_with

if TYPE_CHECKING:
    from trainer.session import Session


def eval_requests(config: RunConfig, tasks: Sequence[Task], *, run_id: str, step: int) -> list[RolloutRequest]:
    """The requests of one evaluation. The step enters the rollout ids only, not the seeds."""
    begins = ids_begin_with(run_id, Kind.EVAL, step)
    return [
        RolloutRequest(
            task=task,
            rollout_id=f"{begins}{task.task_id}-{k}",
            seed=derive_seed(config.seed, "eval", task.task_id, k),
        )
        for task in tasks[: config.eval.num_tasks]
        for k in range(config.eval.samples_per_task)
    ]


def is_due(config: RunConfig, step: int) -> bool:
    """Before the first step, after the last, and every `eval.every_steps` between."""
    every = config.eval.every_steps
    return step in (0, config.optim.num_steps) or (every > 0 and step % every == 0)


def evaluate_if_due(s: Session, *, step: int) -> None:
    """Evaluate the policy after `step`, unless it is not due or the metrics hold it already."""
    config = s.prepared.config
    if not is_due(config, step):
        return
    # Only its writer knows for sure what stands in a file that nodes share, and all have to decide alike.
    if processes.from_main(lambda: any(r["step"] == step and "eval/rollouts" in r for r in s.run.metrics())):
        return
    requests = eval_requests(config, s.prepared.eval_tasks, run_id=s.run.run_id, step=step)
    at_the_ends = {0: Phase.EVALUATING_BEFORE, config.optim.num_steps: Phase.EVALUATING_AFTER}
    phase = at_the_ends.get(step, Phase.EVALUATING)
    # Nothing is published before it is over, so that all of it is of one version, whatever goes on beside it.
    rollouts = s.collect(Kind.EVAL, step, requests, temperature=config.eval.temperature, phase=phase)
    s.run.log({"step": step, **prefixed("eval", summarise(rollouts))})
    s.run.vouch_for(step)
