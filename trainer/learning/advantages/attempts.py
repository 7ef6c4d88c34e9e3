"""What estimators see, made of rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from graders.penalties import KL
from trainer.learning.advantages.base import Attempt
from trainer.types import NO_TURN, Rollout


def attempt_of(rollout: Rollout) -> Attempt:
    """The rollout's reward and turns; a turn that its grade says nothing of has earned nothing by itself.

    The state before a turn is the prompt that its tokens answered, token for token: two rollouts are in the same state
    where they were shown the same.
    """
    num_turns = len(rollout.episode.turns)
    num_tokens: dict[int, int] = {}
    states: dict[int, int] = {}
    for ledger in rollout.ledgers:
        # Of all tokens before, carried on from one to the next; of whole numbers the same in every process.
        state = 0
        for token_id, turn in zip(ledger.prompt_ids, ledger.turns, strict=True):
            if turn != NO_TURN:
                states.setdefault(turn, state)
                num_tokens[turn] = num_tokens.get(turn, 0) + 1
            state = hash((state, token_id))
    num_turns = max(num_turns, 1 + max(num_tokens, default=-1))
    grade = rollout.grade
    given = None if grade is None else grade.turn_rewards
    return Attempt(
        reward=rollout.reward,
        turn_rewards_T=(0.0,) * num_turns if given is None else given,
        num_tokens_T=tuple(num_tokens.get(turn, 0) for turn in range(num_turns)),
        states_T=tuple(states.get(turn, ("not sampled", turn)) for turn in range(num_turns)),
        parts={} if grade is None else grade.parts,
    )


def with_costs(attempt: Attempt, costs_T: Sequence[float]) -> Attempt:
    """With what each turn costs taken off its reward and so off the whole: a part `kl` of it."""
    if attempt.reward is None:
        return attempt
    return replace(
        attempt,
        reward=attempt.reward - math.fsum(costs_T),
        turn_rewards_T=tuple(r - cost for r, cost in zip(attempt.turn_rewards_T, costs_T, strict=True)),
        parts={**attempt.parts, KL: -math.fsum(costs_T)},
    )
