"""Settings that are allowed and change nothing in this run, so that a person may see it before the run and in its log.

What can't be meant is refused instead, where it stands. These may be: a config that is tried for two steps keeps its
warm-up of ten.
"""

from __future__ import annotations

from collections.abc import Iterator

from envs.custom.world import CustomEnvConfig
from envs.settings import Settings
from graders.user.custom import CustomConfig
from trainer.config.advantages import GigpoConfig, TurnDiscountedConfig, advantage_settings
from trainer.config.run import RunConfig


def idle_settings(config: RunConfig) -> list[str]:
    """A line for each, which begins with its key."""
    return [
        *_beyond_the_run(config),
        *_beyond_a_step(config),
        *_within_an_update(config),
        *_beyond_an_episode(config),
        *_without_what_an_estimator_reads(config),
        *_of_no_weight(config),
    ]


def _beyond_the_run(config: RunConfig) -> Iterator[str]:
    steps = config.optim.num_steps
    if 0 < steps < config.optim.warmup_steps:
        yield (
            f"optim.warmup_steps {config.optim.warmup_steps}: the learning rate does not come to its peak in a run of "
            f"optim.num_steps = {steps}"
        )
    alone = 0 if config.loss.gae is None else config.loss.gae.critic.warmup_steps
    if 0 < config.optim.warmup_steps <= alone:
        yield (
            f"optim.warmup_steps {config.optim.warmup_steps}: the first {alone} steps train the critic alone "
            "(loss.advantage.critic.warmup_steps), so that the policy begins at the peak"
        )
    if 0 < steps <= config.eval.every_steps:
        yield f"eval.every_steps {config.eval.every_steps}: optim.num_steps = {steps} has no evaluation on the way"


def _beyond_a_step(config: RunConfig) -> Iterator[str]:
    rollouts = config.rollout.num_rollouts
    if config.optim.minibatches > rollouts:
        yield (
            f"optim.minibatches {config.optim.minibatches}: no rollout is cut, so that the {rollouts} of a step "
            "(rollout.tasks_per_step · group_size) make as many minibatches at most"
        )


def _within_an_update(config: RunConfig) -> Iterator[str]:
    """What bounds how far a step's updates go from where it began is idle where it has but one."""
    if config.optim.num_epochs * config.optim.minibatches > 1:
        return
    of_loss: dict[str, Settings] = {"loss": config.loss}
    if config.loss.gae is not None:
        of_loss["loss.advantage.critic"] = config.loss.gae.critic
    for section, settings in of_loss.items():
        for name in ("clip_low", "clip_high", "delta", "ratio_cap", "value_clip"):
            field = type(settings).model_fields.get(name)
            if field is not None and (value := getattr(settings, name)) != field.default:
                yield (
                    f"{section}.{name} {value}: with one update a step (optim.num_epochs · minibatches) policy and "
                    "critic are those of the step's beginning, so that nothing is clipped"
                )


def _without_what_an_estimator_reads(config: RunConfig) -> Iterator[str]:
    parts = config.parts_of_reward
    if advantage_settings(config.loss.advantage).type == "gdpo" and parts is not None and len(parts) == 1:
        yield (
            f"loss.advantage gdpo: the reward has one part, {parts[0]}, so that it is grpo with the step's spread; "
            "parts are a grader's whole score, however many are in it, each penalty, and what a class of your own "
            "gives in Grade.parts"
        )
    if advantage_settings(config.loss.advantage).type != "turn_discounted" or config.loss.kl_in_reward:
        return
    by_turn = any(penalty is not None and penalty.by_turn for _, penalty in config.penalties)
    # No world and no grader but the user's own gives rewards of turns.
    if not (by_turn or isinstance(config.world, CustomEnvConfig) or isinstance(config.grader, CustomConfig)):
        yield "loss.advantage turn_discounted: nothing gives rewards of turns in this run, so that it is grpo"


def _beyond_an_episode(config: RunConfig) -> Iterator[str]:
    rollout, penalties = config.rollout, config.penalties
    if penalties.reasoning_tokens is not None and config.model.reasoning_parser is None:
        yield "penalties.reasoning_tokens: without model.reasoning_parser no token counts as reasoning"
    longest = min(rollout.max_episode_tokens, rollout.max_turns * rollout.max_turn_tokens)
    for name in ("reasoning_tokens", "generated_tokens"):
        penalty = getattr(penalties, name)
        if penalty is not None and penalty.free >= longest:
            yield (
                f"penalties.{name}.free {penalty.free}: no episode has more tokens of its own than {longest} "
                "(rollout.max_episode_tokens, max_turns and max_turn_tokens), so that nothing is ever taken off"
            )


def _of_no_weight(config: RunConfig) -> Iterator[str]:
    advantage = advantage_settings(config.loss.advantage)
    if isinstance(advantage, GigpoConfig | TurnDiscountedConfig) and not advantage.weight:
        of = "episode" if isinstance(advantage, GigpoConfig) else "outcome"
        yield f"loss.advantage.weight 0: {advantage.type} gives no turn an advantage of its own, only the {of}'s"
