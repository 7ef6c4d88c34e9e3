"""The spine: tasks → rollouts → advantages → update → publish → checkpoint → report, read from top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.canary import Canary
from trainer.collect import Collector, to_samples, watch_for_no_ops
from trainer.config import RunConfig
from trainer.evaluate import evaluate_if_due
from trainer.job import prepare
from trainer.progress import Progress
from trainer.rollout import RolloutWorker
from trainer.runs import RunFolder
from trainer.summary import Stopwatch, prefixed, summarise
from trainer.tasks import tasks_of_step, train_requests

if TYPE_CHECKING:
    from trainer.setup import StartEngine


def train(config: RunConfig, *, start_engine: StartEngine | None = None) -> Path:
    """Run or resume the run that `config` describes; returns its folder.

    `start_engine` takes the arguments of `VllmEngine.start`, its default.
    Raises `UserError` before anything is loaded, `PublishError` when the engine does not run the trained policy.
    """
    if RunFolder.is_finished(config):
        return config.output_dir
    job = prepare(config)
    from accelerate import Accelerator

    from trainer.checkpoint import keep_checkpoint, write_checkpoint
    from trainer.export import export_adapter
    from trainer.publish import Publisher
    from trainer.report import write_report
    from trainer.setup import canary_ids, load_policy, open_engine

    accelerator = Accelerator(log_with=list(config.trackers), project_dir=str(config.output_dir))
    if accelerator.is_main_process:
        RunFolder.create(config)
    accelerator.wait_for_everyone()
    run = RunFolder.open(config, rank=accelerator.process_index)
    accelerator.init_trackers("agent-rft")
    num_steps = config.optim.num_steps

    with contextlib.ExitStack() as stack:
        first_step = run.resume_step
        log_path = run.path / ("run.log" if run.is_main else f"run.rank{accelerator.process_index}.log")
        progress = stack.enter_context(Progress(log_path, num_steps, first_step=first_step, show=run.is_main))
        loop = stack.enter_context(asyncio.Runner())
        policy = load_policy(job, run, accelerator, progress)
        progress.phase("starting the engine")
        engine = loop.run(open_engine(job, accelerator, start_engine, first_step=first_step))
        stack.callback(engine.shutdown)
        canary = Canary(canary_ids(job), tolerance=config.engine.canary_mean_tolerance)
        publisher = stack.enter_context(Publisher(policy, engine, canary))
        worker = RolloutWorker(world=job.world, grader=job.grader, chat=job.chat, engine=engine, config=config.rollout)
        progress.phase("publishing")
        loop.run(publisher.note_base())
        loop.run(publisher.publish())
        collector = Collector(run, worker, accelerator, progress, loop)

        evaluate_if_due(job, run, collector, progress, step=first_step)
        for step in range(first_step + 1, num_steps + 1):
            clock = Stopwatch()
            tasks = tasks_of_step(
                job.train_tasks, seed=config.seed, step=step - 1, num_tasks=config.rollout.tasks_per_step
            )
            requests = train_requests(config, tasks, run_id=run.run_id, step=step)
            progress.phase("rollouts", total=len(requests))
            rollouts = collector.collect("rollouts", step, requests, temperature=config.rollout.temperature)
            clock.lap("rollouts")

            progress.phase("training")
            samples, group_metrics = to_samples(rollouts, config)
            watch_for_no_ops(rollouts, group_metrics, run, progress)
            loss_metrics = policy.update(
                samples,
                config.loss,
                temperature=config.rollout.temperature,
                constant_tokens=config.rollout.max_episode_tokens,
            )
            clock.lap("training")

            progress.phase("publishing")
            canary_metrics = loop.run(publisher.publish())
            clock.lap("publish")

            checkpoint = None
            if run.is_main and (step % config.checkpoint.every_steps == 0 or step == num_steps):
                checkpoint = write_checkpoint(run, policy, step=step)
            clock.lap("checkpoint")
            metrics = {
                **prefixed("train", summarise(rollouts)),
                **group_metrics,
                **prefixed("loss", loss_metrics),
                **canary_metrics,
                **clock.metrics(
                    num_sampled_tokens=sum(r.episode.num_tokens for r in rollouts),
                    # Rows without an advantage cost the trainer nothing.
                    num_trained_tokens=sum(len(s.token_ids) for s in samples if s.advantage),
                ),
            }
            run.log({"step": step, **metrics})
            if checkpoint is not None:
                keep_checkpoint(checkpoint, keep=config.checkpoint.keep)
            accelerator.log(metrics, step=step)
            progress.step_done(step, metrics)
            evaluate_if_due(job, run, collector, progress, step=step)

        progress.phase("exporting")
        if run.is_main:
            export_adapter(job, run, policy)
            write_report(run.path)
            run.note(finished_steps=num_steps)
    accelerator.end_training()
    return run.path
