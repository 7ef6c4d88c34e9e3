"""What is made of a step's rollouts: its samples, and what has to be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol

from envs.errors import UserError, WorldError
from graders.types import GraderErrorKind
from trainer import processes
from trainer.config import LossSettings, RunConfig
from trainer.config.advantages import WITHOUT_TIES, advantage_settings
from trainer.learning.advantages import Attempt, estimator_of
from trainer.learning.advantages.attempts import attempt_of, with_costs
from trainer.learning.advantages.base import Advantages
from trainer.learning.advantages.gae import with_critics_advantages
from trainer.learning.samples import Sample, rollout_samples
from trainer.measures.masked import WHY_MASKED, Masked, masked_causes
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.tasks.difficulty import stats_of
from trainer.types import Metrics, Rollout

_MOST_TIED_STEPS = 3
"""So many steps in a row in which no group had variance are no accident."""


class Measures(Protocol):
    """What a policy says of each trainable token of each sample; every process passes the same samples."""

    def divergences(self, samples: Sequence[Sample], loss: LossSettings, temperature: float) -> list[list[float]]:
        """The estimated KL to the reference."""
        ...

    def values(self, samples: Sequence[Sample]) -> list[list[float]]:
        """The critic's."""
        ...


def to_samples(
    rollouts: Sequence[Rollout], config: RunConfig, policy: Measures | None = None
) -> tuple[list[Sample], Metrics]:
    """Advantages by group, spread over the rollouts' rows; masked rollouts give no sample.

    `rollouts` come group after group. `policy` is asked where the KL to the reference stands in the reward, and
    where a critic makes the advantages. Returns the samples and figures of the groups.
    """
    size = config.rollout.group_size
    attempts = _attempts(rollouts, config)
    # The user's own is asked once a step, since it may keep what it learns; it sees the KL taken off.
    asked_later = advantage_settings(config.loss.advantage).type in {"gae", "custom"}
    is_tied = [] if asked_later else _tied(attempts, config)
    metrics: Metrics = {}
    if config.loss.kl_in_reward:
        assert policy is not None, "a KL in the reward needs the policy"
        attempts, metrics = _charged(rollouts, attempts, config, policy)
    groups = [attempts[i : i + size] for i in range(0, len(attempts), size)]
    stats = [stats_of([attempt.reward for attempt in group]) for group in groups]
    # A group of which no two rollouts have a reward says nothing of how far rewards differ.
    if spreads := [of.std for of in stats if of.n > 1]:
        metrics["groups/reward_std"] = fmean(spreads)
    if config.loss.gae is not None:
        assert policy is not None, "a critic's advantages need the policy"
        rows = [[] if r.reward is None else _rows(r, 0.0) for r in rollouts]
        samples = with_critics_advantages(
            rows, attempts, rollouts, config.loss.gae, policy.values, max_tokens=config.rollout.max_episode_tokens
        )
        return samples, metrics
    skips = config.rollout.tied_groups != "keep"
    # What is left out counts in no mean and spread of the step either.
    asked = [g for g in range(len(groups)) if not (skips and is_tied and is_tied[g])]
    advantages = estimator_of(config.loss.advantage)([groups[g] for g in asked])
    is_tied = is_tied or _without_advantage(advantages)
    samples = [
        sample
        for g, group in zip(asked, advantages, strict=True)
        if not (skips and is_tied[g])
        for i, of in enumerate(group, g * size)
        if of is not None
        for sample in _rows(rollouts[i], of)
    ]
    metrics["groups/tied_share"] = fmean(is_tied)
    if skips:
        metrics["groups/skipped"] = float(sum(is_tied))
    if config.rollout.tied_groups == "replace":
        metrics["groups/replacements"] = float(len(groups) - config.rollout.tasks_per_step)
    return samples, metrics


def with_fresh_groups(
    rollouts: list[Rollout], config: RunConfig, more: Callable[[int, int], list[Rollout]]
) -> list[Rollout]:
    """Where tied groups are replaced: with groups of fresh tasks after them, until as many as a step has are not tied
    or the rounds are used up; the tied ones are among them still.

    `more` rolls out so many groups (the second number) beside those that the step has (the first).
    """
    if config.rollout.tied_groups != "replace":
        return rollouts
    for _ in range(config.rollout.replacement_rounds):
        is_tied = _tied(_attempts(rollouts, config), config)
        missing = config.rollout.tasks_per_step - is_tied.count(False)
        if missing <= 0:
            break
        rollouts = rollouts + more(len(is_tied), missing)
    return rollouts


def _attempts(rollouts: Sequence[Rollout], config: RunConfig) -> list[Attempt]:
    """What the rewards are before a KL is taken off: a part `kl` of 0, where one is going to be."""
    attempts = [attempt_of(rollout) for rollout in rollouts]
    if not config.loss.kl_in_reward:
        return attempts
    return [with_costs(attempt, [0.0] * len(attempt.turn_rewards_T)) for attempt in attempts]


def _tied(attempts: Sequence[Attempt], config: RunConfig) -> list[bool]:
    """Of each group whether it has no advantage: what the reward gives it, before a KL is taken off.

    Estimators that whiten over the step move a tied group's zeros off 0; so they are asked for each group by itself,
    but for those that compare groups, or may: to them an equal group is none that teaches nothing.
    """
    size, estimator = config.rollout.group_size, estimator_of(config.loss.advantage)
    groups = [attempts[i : i + size] for i in range(0, len(attempts), size)]
    if advantage_settings(config.loss.advantage).type in {*WITHOUT_TIES, "custom"}:
        advantages = estimator(groups)
    else:
        advantages = [estimator([group])[0] for group in groups]
    return _without_advantage(advantages)


def _without_advantage(advantages: Advantages) -> list[bool]:
    return [not any(x for of in group for x in of or ()) for group in advantages]


def _rows(rollout: Rollout, advantage: float | Sequence[float]) -> list[Sample]:
    return rollout_samples(
        rollout.ledgers,
        advantage=advantage,
        rollout_id=rollout.episode.rollout_id,
        task_id=rollout.task.task_id,
    )


def _charged(
    rollouts: Sequence[Rollout], attempts: Sequence[Attempt], config: RunConfig, policy: Measures
) -> tuple[list[Attempt], Metrics]:
    """The attempts with kl_coef · KL taken off the reward of the turn that sampled the token."""
    rows = [(i, sample) for i, r in enumerate(rollouts) if r.reward is not None for sample in _rows(r, 0.0)]
    divergences = policy.divergences([sample for _, sample in rows], config.loss, config.rollout.temperature)
    costs = [[0.0] * len(attempt.turn_rewards_T) for attempt in attempts]
    for (i, sample), of_tokens in zip(rows, divergences, strict=True):
        turns = rollouts[i].ledgers[sample.row].turns
        for turn, divergence in zip(sample.trained(turns), of_tokens, strict=True):
            costs[i][int(turn)] += config.loss.kl_coef * divergence
    flat = [x for of_tokens in divergences for x in of_tokens]
    charged = [with_costs(attempt, cost) for attempt, cost in zip(attempts, costs, strict=True)]
    return charged, {"groups/kl_in_reward": fmean(flat)} if flat else {}


def fresh_samples(samples: Sequence[Sample], config: RunConfig, *, version: int) -> tuple[list[Sample], Metrics]:
    """Without rollouts that have a token older than `overlap.max_staleness` steps, where that is above 0.

    `version` is that of the policy which learns from them. Returns the others, and figures of how old they are.
    """
    if config.overlap.max_staleness == 0:
        return list(samples), {}
    oldest = version - config.overlap.max_staleness * config.optim.num_epochs * config.optim.minibatches
    stale = {s.rollout_id for s in samples if min(s.trained(s.versions), default=oldest) < oldest}
    fresh = [s for s in samples if s.rollout_id not in stale]
    ages = [version - v for s in fresh for v in s.trained(s.versions)] or [0]
    return fresh, {"staleness/mean": fmean(ages), "staleness/max": max(ages), "staleness/dropped": len(stale)}


def warn_of_unclosed(rollouts: Sequence[Rollout], progress: Progress) -> None:
    """What an environment holds on to when it does not close costs no rollout, but may fill the machine."""
    if causes := Counter(cause for r in rollouts for cause in r.unclosed):
        progress.warn(f"{causes.total()} environments did not close: {causes.most_common(1)[0][0]}")


def warn_of_mismatch(loss: Metrics, config: RunConfig, progress: Progress) -> None:
    """Say aloud what an update's metrics tell of an engine whose log-probabilities are not the trainer's."""
    # What was sampled under earlier weights differs by what was learned since.
    has_stale = any("/staleness_" in name for name in loss)
    mismatch = loss.get("mismatch_abs/staleness_0" if has_stale else "mismatch_abs", 0.0)
    tolerance = config.engine.canary_mean_tolerance
    if mismatch > tolerance:
        # The canary is scored, and never sampled.
        progress.warn(
            f"the step's tokens were sampled with other log-probabilities than the trainer's, by {mismatch:.3f} "
            f"nats a token (engine.canary_mean_tolerance is {tolerance:g}): does the engine sample with the "
            "weights that it was given?"
        )
    if loss.get("mismatch_masked_share") == 1:
        progress.warn(
            "loss.correction masks every token of this step: nothing was learned from its rewards; its ranges are too "
            "narrow for how far the trainer's log-probabilities are from the engine's (loss/mismatch_ratio_p95)"
        )


def refuse_if_none_graded(rollouts: Sequence[Rollout], which: str) -> None:
    """Raise where no rollout has a grade: `UserError` if the user's functions gave none, else `WorldError`."""
    if any(r.grade is not None for r in rollouts):
        return
    causes = masked_causes(rollouts)
    told = "; ".join(
        f"{counts.total()} {WHY_MASKED[kind]}, most often: {counts.most_common(1)[0][0]}"
        for kind, counts in causes.items()
    )
    raise (UserError if causes.keys() == {Masked.NO_REWARD} else WorldError)(f"no rollout {which} has a grade: {told}")


def watch_for_no_ops(rollouts: Sequence[Rollout], groups: Metrics, run: RunFolder, progress: Progress) -> None:
    """Say aloud what makes a step teach nothing; stop where it cannot be meant (invariant 8).

    Raises as `refuse_if_none_graded`, and `UserError` when no reward varied for several steps in a row.
    """
    refuse_if_none_graded(rollouts, "of the step")
    if not any(r.episode.num_tokens for r in rollouts):
        raise UserError(
            "no prompt of the step leaves room to generate: all are as long as rollout.max_episode_tokens; raise it"
        )
    if not any(r.episode.num_tokens for r in rollouts if r.grade is not None):
        progress.warn("no rollout of this step that has a grade holds a generated token: nothing was learned from it")
    for kind, causes in masked_causes(rollouts).items():
        often = causes.most_common(1)[0][0]
        progress.warn(f"{causes.total()} of {len(rollouts)} rollouts {WHY_MASKED[kind]}: {often}")
    graded = [r.grade for r in rollouts if r.grade is not None]
    if all(set(grade.errors) - {GraderErrorKind.TRUNCATED_OBSERVATION} for grade in graded):
        raise UserError(f"the grader failed on every rollout of the step: {graded[-1].explanation}")
    if not any(turn.message.tool_calls for r in rollouts for turn in r.episode.turns):
        progress.warn(
            "no rollout of this step made a tool call that parsed; check model.tool_parser and the chat template, "
            "or add a warmstart section"
        )
    if "groups/tied_share" not in groups:
        if stats_of([r.reward for r in rollouts]).tied:
            progress.warn("all rewards of this step are the same: only the critic learned of it")
        return
    if groups["groups/tied_share"] < 1:
        return
    progress.warn("no group of this step had rewards that vary: nothing was learned from it")
    # Only its writer knows for sure what stands in a file that nodes share, and all have to decide alike.
    metrics = processes.from_main(run.metrics)
    recent = [r["groups/tied_share"] for r in metrics if "groups/tied_share" in r][1 - _MOST_TIED_STEPS :]
    if len(recent) == _MOST_TIED_STEPS - 1 and min(recent) == 1:
        raise UserError(
            f"rewards did not vary within any group for {_MOST_TIED_STEPS} steps: there is nothing to learn from. "
            "The tasks are too hard or too easy for this model, or the grader gives one value to all; "
            "a warmstart section, other tasks, a grader with partial credit or a larger rollout.group_size may help"
        )
