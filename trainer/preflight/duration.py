"""How long the run that a config describes will take, and what that costs, from measured speeds.

Without any measurement, for a GPU that is not at hand: `trainer.preflight.computed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.config.advantages import WITHOUT_TIES, advantage_settings
from trainer.preflight.figures import Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the preflight has measured on this machine."""

    sampled_tokens_per_s: float
    """Generated tokens of all rollouts together."""
    num_rollouts: int
    """Rolled out at once; fewer than a step's leave the engine with room."""
    trained_tokens_per_s: float | None
    """Of rows, by a whole update (all its epochs) of one microbatch; None where it was not measured."""
    publish_s: float
    start_s: float
    """Loading, warm start and the engine's start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Seconds of the whole run. Linear in the number of GPUs, which the parts that are not split do not profit of."""

    start_s: float
    rollouts_s: float
    training_s: float | None
    """None: not estimated."""
    publish_s: float
    evaluation_s: float
    gpus: int
    notes: Sequence[str]

    @property
    def total_s(self) -> float:
        return self.start_s + self.rollouts_s + (self.training_s or 0.0) + self.publish_s + self.evaluation_s

    def cost(self, gpu_hour_price: float) -> float:
        return self.total_s / 3600 * self.gpus * gpu_hour_price


def time_estimate(config: RunConfig, figures: Figures, speeds: Speeds, *, gpus: int) -> TimeEstimate:
    """The configured run, should its rollouts stay as long as the preflight's.

    rollouts     steps · rollouts a step · a · tokens a rollout / (sampled tokens/s · GPUs)
    training     steps · rollouts a step · t · row tokens a rollout / (trained tokens/s · GPUs)
    publishing   steps · seconds of one publish
    evaluation   evaluations · tasks · samples · tokens a rollout / (sampled tokens/s · GPUs)

    a and t, groups asked for and trained on for each of a step: see `_groups`.
    """
    steps, num_graded = config.optim.num_steps, len(figures.tokens)
    tokens, row_tokens = sum(figures.tokens) / num_graded, sum(figures.episode_tokens) / num_graded
    per_step = config.rollout.num_rollouts
    per_evaluation = config.eval.num_tasks * config.eval.samples_per_task
    sampled_per_s = max(speeds.sampled_tokens_per_s, 1e-9) * gpus
    asked_for, trained_on = _groups(config, figures.varied_share)
    training_s = None
    if speeds.trained_tokens_per_s is not None:
        trained = steps * per_step * trained_on * row_tokens
        training_s = trained / (speeds.trained_tokens_per_s * gpus)
    notes = ["rollouts are taken to stay as long as now; where training shortens them, the run is faster"]
    if speeds.num_rollouts < per_step:
        notes.append(
            f"measured with {speeds.num_rollouts} rollouts at once, a step has {per_step}: "
            "a fuller engine samples faster, so rollouts may take less"
        )
    if training_s is None:
        notes.append("training was not measured and is not in the total")
    if config.overlap.max_staleness:
        notes.append(
            "rollouts and training are added up; with overlap.max_staleness they go on at once, and the run takes less"
        )
    if gpus > 1:
        notes.append(f"measured on one process; rollouts and training are taken to split evenly over {gpus}")
    return TimeEstimate(
        start_s=speeds.start_s,
        rollouts_s=steps * per_step * asked_for * tokens / sampled_per_s,
        training_s=training_s,
        publish_s=steps * speeds.publish_s,
        evaluation_s=num_evaluations(config) * per_evaluation * tokens / sampled_per_s,
        gpus=gpus,
        notes=notes,
    )


def _groups(config: RunConfig, varied: float) -> tuple[float, float]:
    """Groups asked for and groups trained on, for each group of a step, where a share `varied` of groups varies.

    keep, skip   1 asked for, `varied` trained on; all of them where tied ones have a gradient as well
    replace      expected over R rounds, each of which asks for as many as are tied still:
                 Σ_{k ≤ R} (1 - varied)^k asked for, 1 - (1 - varied)^(R + 1) trained on
    """
    tied, rule = 1 - varied, config.rollout.tied_groups
    if rule == "replace":
        rounds = config.rollout.replacement_rounds
        return math.fsum(tied**k for k in range(rounds + 1)), 1 - tied ** (rounds + 1)
    tied_teach = advantage_settings(config.loss.advantage).type in WITHOUT_TIES
    return 1.0, 1.0 if tied_teach or (rule == "keep" and config.loss.trains_without_advantage) else varied


def num_evaluations(config: RunConfig) -> int:
    """Before training, every so many steps, and after it."""
    every, steps = config.eval.every_steps, config.optim.num_steps
    return len({0, steps, *(range(every, steps + 1, every) if every else ())})
