"""Held-out evaluation: the same tasks with the same seeds each time, so that two evaluations are paired."""

from __future__ import annotations

from collections.abc import Sequence

from envs.types import Task
from trainer import processes
from trainer.config import RunConfig
from trainer.measures.summary import prefixed, summarise
from trainer.prepare import Prepared
from trainer.rollouts.collect import Collector
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.seeds import derive_seed
from trainer.types import Kind, Phase, RolloutRequest


def eval_requests(config: RunConfig, tasks: Sequence[Task], *, run_id: str, step: int) -> list[RolloutRequest]:
    """The requests of one evaluation. The step enters the rollout ids only, not the seeds."""
    return [
        RolloutRequest(
            task=task,
            rollout_id=f"{run_id}-eval{step}-{task.task_id}-{k}",
            seed=derive_seed(config.seed, "eval", task.task_id, k),
        )
        for task in tasks[: config.eval.num_tasks]
        for k in range(config.eval.samples_per_task)
    ]


def is_due(config: RunConfig, step: int) -> bool:
    """Before the first step, after the last, and every `eval.every_steps` between."""
    every = config.eval.every_steps
    return step in (0, config.optim.num_steps) or (every > 0 and step % every == 0)


def evaluate_if_due(prepared: Prepared, run: RunFolder, collector: Collector, progress: Progress, *, step: int) -> None:
    """Evaluate the policy after `step`, unless it is not due or the metrics hold it already."""
    if not is_due(prepared.config, step):
        return
    # Only its writer knows for sure what stands in a file that nodes share, and all have to decide alike.
    if processes.from_main(lambda: any(r["step"] == step and "eval/rollouts" in r for r in run.metrics())):
        return
    requests = eval_requests(prepared.config, prepared.eval_tasks, run_id=run.run_id, step=step)
    at_the_ends = {0: Phase.EVALUATING_BEFORE, prepared.config.optim.num_steps: Phase.EVALUATING_AFTER}
    progress.phase(at_the_ends.get(step, Phase.EVALUATING), total=len(requests))
    rollouts = collector.collect(Kind.EVAL, step, requests, temperature=prepared.config.eval.temperature)
    run.log({"step": step, **prefixed("eval", summarise(rollouts))})
    run.vouch_for(step)
