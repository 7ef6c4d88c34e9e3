"""The spine: tasks → rollouts → advantages → update → publish → checkpoint → report, read from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from envs.reading.documents import check_writable
from trainer.config import RunConfig
from trainer.config.idle import idle_settings
from trainer.evaluate import evaluate_if_due
from trainer.learning.samples import num_trained_tokens
from trainer.measures.exporter import check_port
from trainer.measures.summary import prefixed, summarise
from trainer.measures.timing import Lap, Stopwatch
from trainer.prepare import prepare
from trainer.reachable import PATIENCE_S
from trainer.rollouts.collect import fresh_samples, to_samples, watch_for_no_ops
from trainer.runs.folder import RunFolder
from trainer.tasks.curriculum import Curriculum

if TYPE_CHECKING:
    from trainer.session import StartEngine


def train(
    config: RunConfig, *, start_engine: StartEngine | None = None, beside: Mapping[str, str] | None = None
) -> Path:
    """Run or resume the run that `config` describes; returns its folder.

    `start_engine` takes the place of the config's engine. `beside` are texts to leave in the folder.
    Raises `UserError` before anything is loaded, `PublishError` when the engine does not run the trained policy.
    """
    if RunFolder.is_finished(config):
        return config.output_dir
    check_writable(config.output_dir, "output_dir", is_folder=True)
    check_port(config)
    prepared = prepare(config, patience_s=PATIENCE_S)
    from trainer.exports.at_end import export_run
    from trainer.reports.running import RunningReport
    from trainer.reports.transcripts.write import write_token_figures
    from trainer.session import open_run

    with open_run(prepared, start_engine, beside=beside) as s:
        for told in idle_settings(config):
            s.progress.warn(f"no effect: {told}")
        curriculum = Curriculum(config, prepared.train_tasks, s.run, prepared.preflight)
        report = RunningReport(s.run, s.progress)
        evaluate_if_due(s, step=s.first_step)
        report.write()
        for step in range(s.first_step + 1, config.optim.num_steps + 1):
            clock = Stopwatch()
            rollouts = s.roll_out(curriculum, step=step)
            clock.lap(Lap.ROLLOUTS)

            samples, groups = to_samples(rollouts, config, s.policy)
            samples, ages = fresh_samples(samples, config, version=s.policy.num_updates)
            watch_for_no_ops(rollouts, groups, s.run, s.progress)
            update = s.update(samples)
            clock.lap(Lap.TRAINING)

            proof = s.publish()
            clock.lap(Lap.PUBLISH)

            if s.run.is_main:
                write_token_figures(s.run.path, step, samples, update.logprobs)
            with s.checkpoint_if_due(step):
                clock.lap(Lap.CHECKPOINT)
                # What the parts count comes first, so that none of theirs takes the place of one of ours.
                metrics = s.counted() | prefixed("train", summarise(rollouts)) | groups
                metrics |= prefixed("loss", update.metrics) | proof | curriculum.learn(step, rollouts) | ages
                metrics |= clock.metrics(
                    num_sampled_tokens=s.stream.take_num_sampled_tokens(),
                    num_trained_tokens=num_trained_tokens(samples, config.loss),
                    overlaps=config.overlap.max_staleness > 0,
                )
                s.run.log({"step": step} | metrics | {"step": step})
            s.show(step, metrics)
            evaluate_if_due(s, step=step)
            report.write()
        export_run(s)
    return config.output_dir
