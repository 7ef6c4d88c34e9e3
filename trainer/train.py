"""The spine: tasks → rollouts → advantages → update → publish → checkpoint → report, read from top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import processes
from trainer.config import RunConfig
from trainer.evaluate import evaluate_if_due
from trainer.learning.samples import num_trained_tokens
from trainer.measures.summary import prefixed, summarise
from trainer.measures.timing import Lap, Stopwatch
from trainer.models.machines import hardware
from trainer.prepare import prepare
from trainer.reachable import PATIENCE_S
from trainer.rollouts.collect import Collector, to_samples, watch_for_no_ops
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.tasks.curriculum import Curriculum
from trainer.tasks.load import train_requests
from trainer.types import Kind, Phase

if TYPE_CHECKING:
    from trainer.session import StartEngine


def train(
    config: RunConfig, *, start_engine: StartEngine | None = None, beside: Mapping[str, str] | None = None
) -> Path:
    """Run or resume the run that `config` describes; returns its folder.

    `start_engine` takes the arguments of `VllmEngine.start`, its default. `beside` are texts to leave in the folder.
    Raises `UserError` before anything is loaded, `PublishError` when the engine does not run the trained policy.
    """
    if RunFolder.is_finished(config):
        return config.output_dir
    prepared = prepare(config, patience_s=PATIENCE_S)
    from trainer.export import export_adapter
    from trainer.learning.checkpoint import keep_checkpoint, write_checkpoint
    from trainer.reports.run_report import write_report
    from trainer.reports.transcripts.write import write_token_figures, write_transcripts
    from trainer.session import open_session, release_left_open

    accelerator = processes.start(log_with=list(config.trackers) or None, project_dir=str(config.output_dir))
    num_steps = config.optim.num_steps

    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunFolder.held(config, rank=accelerator.process_index, beside=beside))
        accelerator.init_trackers("agent-rft")
        first_step = run.resume_step
        progress = stack.enter_context(Progress(run.log_path, num_steps, first_step=first_step, show=run.is_main))
        loop = stack.enter_context(asyncio.Runner())
        stack.callback(lambda: loop.run(prepared.aclose()))
        run.note(resolved=prepared.resolved(), hardware=hardware(accelerator.num_processes))
        loop.run(release_left_open(prepared, run, progress))
        s = stack.enter_context(
            open_session(prepared, run, accelerator, progress, loop, start_engine, first_step=first_step)
        )
        collector = Collector(run, s.worker, accelerator, progress, loop)
        curriculum = Curriculum(config, prepared.train_tasks, run, prepared.preflight)

        evaluate_if_due(prepared, run, collector, progress, step=first_step)
        for step in range(first_step + 1, num_steps + 1):
            clock = Stopwatch()
            requests = train_requests(config, curriculum.choose(step), run_id=run.run_id, step=step)
            progress.phase(Phase.ROLLOUTS, total=len(requests))
            rollouts = collector.collect(Kind.TRAIN, step, requests, temperature=config.rollout.temperature)
            loop.run(s.engine.sleep())
            clock.lap(Lap.ROLLOUTS)

            progress.phase(Phase.TRAINING)
            samples, group_metrics = to_samples(rollouts, config)
            watch_for_no_ops(rollouts, group_metrics, run, progress)
            update = s.policy.update(
                samples,
                config.loss,
                temperature=config.rollout.temperature,
                constant_tokens=config.rollout.max_episode_tokens,
            )
            clock.lap(Lap.TRAINING)

            progress.phase(Phase.PUBLISHING)
            loop.run(s.engine.wake_up())
            canary_metrics = loop.run(s.publisher.publish())
            clock.lap(Lap.PUBLISH)

            if run.is_main:
                write_token_figures(run.path, step, samples, update.logprobs)
            checkpoint = None
            if run.is_main and (step % config.checkpoint.every_steps == 0 or step == num_steps):
                checkpoint = write_checkpoint(run, s.policy, step=step)
            clock.lap(Lap.CHECKPOINT)
            metrics = {
                **prefixed("train", summarise(rollouts)),
                **group_metrics,
                **prefixed("loss", update.metrics),
                **canary_metrics,
                **prepared.metrics(),
                **curriculum.learn(step, rollouts),
                **clock.metrics(
                    rollouts, num_trained_tokens=num_trained_tokens(samples, has_kl=config.loss.kl_coef > 0)
                ),
            }
            run.log({"step": step, **metrics})
            if checkpoint is not None:
                keep_checkpoint(run, checkpoint, keep=config.checkpoint.keep)
            accelerator.log(metrics, step=step)
            progress.step_done(step, metrics)
            evaluate_if_due(prepared, run, collector, progress, step=step)

        progress.phase(Phase.EXPORTING)
        if run.is_main:
            export_adapter(prepared, run, s.policy)
            write_transcripts(run.path, lambda token_id: prepared.chat.decode([token_id]))
            write_report(run.path)
            run.note(finished_steps=num_steps)
    accelerator.end_training()
    return run.path
