"""Settings that are allowed and change nothing in this run, so that a person may see it before the run and in its log.

What can't be meant is refused instead, where it stands. These may be: a config that is tried for two steps keeps its
warm-up of ten.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.run import RunConfig


def idle_settings(config: RunConfig) -> list[str]:
    """A line for each, which begins with its key."""
    return [*_beyond_the_run(config), *_beyond_a_step(config), *_beyond_an_episode(config)]


def _beyond_the_run(config: RunConfig) -> Iterator[str]:
    steps = config.optim.num_steps
    if 0 < steps < config.optim.warmup_steps:
        yield (
            f"optim.warmup_steps {config.optim.warmup_steps}: the learning rate does not come to its peak in a run of "
            f"optim.num_steps = {steps}"
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
