"""Advantages of single tokens by a critic: generalised advantage estimation over a rollout's sampled tokens.

Shape suffixes: N sampled tokens of a rollout, in the order of time, over all of its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from envs.types import StopReason
from trainer.config.advantages import GaeConfig
from trainer.learning.advantages.base import Attempt, normalised
from trainer.learning.samples import Sample
from trainer.types import UNTRAINABLE_VERSION, Ledger, Rollout


def gae(
    rewards_N: Sequence[float], values_N: Sequence[float], *, last_value: float, gamma: float, lam: float
) -> list[float]:
    """(N,) A_t = Σ_{l ≥ 0} (gamma · lam)^l · δ_{t+l} with δ_t = r_t + gamma · V_{t+1} - V_t, V_N = `last_value`.

    Schulman et al. 2016, arXiv:1506.02438. V_t is the value of the state before the sampled token t. What tools and
    users say is no step: V_{t+1} of a turn's last token is the value of the state that the next turn begins in, with
    their words in it, so that time runs over sampled tokens alone.
    """
    advantages, after = [], 0.0
    following = [*values_N[1:], last_value]
    for reward, value, then in zip(reversed(rewards_N), reversed(values_N), reversed(following), strict=True):
        after = reward + gamma * then - value + gamma * lam * after
        advantages.append(after)
    return advantages[::-1]


def token_rewards(attempt: Attempt, turns_N: Sequence[int]) -> list[float]:
    """(N,) each turn's own reward at its last sampled token, the outcome at the rollout's last.

    A turn that sampled nothing leaves its reward to the last token before it, else to the first.
    """
    rewards = [0.0] * len(turns_N)
    last_of = {turn: place for place, turn in enumerate(turns_N)}
    for turn, reward in enumerate(attempt.turn_rewards_T):
        before = [place for t, place in last_of.items() if t <= turn]
        rewards[max(before, default=0)] += reward
    rewards[-1] += attempt.outcome
    return rewards


def whitened(advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    """`normalised` over all tokens of the step: PPO's usual batch. A single token keeps its own.

    What it adds to the spread keeps the noise of a critic that is right from being blown up to what would be learned.
    """
    flat = list(itertools.chain.from_iterable(advantages))
    if len(flat) < 2:
        return [list(of) for of in advantages]
    white = (x for x in normalised(flat) if x is not None)
    return [list(itertools.islice(white, len(of))) for of in advantages]


_ENDED_BY_A_LIMIT = {
    StopReason.MAX_TURNS,
    StopReason.MAX_TOOL_CALLS,
    StopReason.MAX_TURN_TOKENS,
    StopReason.MAX_EPISODE_TOKENS,
    StopReason.MAX_USER_TURNS,
    StopReason.WALL_CLOCK,
}

ValuesOf = Callable[[Sequence[Sample]], list[list[float]]]
"""The critic's of each trainable token of each sample; every process passes the same samples."""


def with_critics_advantages(
    rows: Sequence[Sequence[Sample]],
    attempts: Sequence[Attempt],
    rollouts: Sequence[Rollout],
    config: GaeConfig,
    values_of: ValuesOf,
    *,
    max_tokens: int,
) -> list[Sample]:
    """The rows of each rollout with advantage, value and return at every trainable token. `rows` have no advantage.

    `rows[i]`, `attempts[i]` and `rollouts[i]` belong together; a rollout without rows gives none. No value is asked for
    behind more than `max_tokens` tokens.
    """
    asked = [sample for of in rows for sample in of]
    ends = [i for i, of in enumerate(rows) if of and config.bootstrap and _was_cut(rollouts[i])]
    answers = values_of([*asked, *(_after(rollouts[i].ledgers[-1], rows[i][-1], max_tokens) for i in ends)])
    values = iter(answers[: len(asked)])
    last_value = {i: of[-1] for i, of in zip(ends, answers[len(asked) :], strict=True)}
    figures: list[tuple[Sample, list[float]]] = []
    advantages: list[list[float]] = []
    for i, of in enumerate(rows):
        if not of:
            continue
        own = [next(values) for _ in of]
        flat = [value for row in own for value in row]
        turns = [int(t) for sample in of for t in sample.trained(rollouts[i].ledgers[sample.row].turns)]
        rewards = token_rewards(attempts[i], turns)
        found = gae(rewards, flat, last_value=last_value.get(i, 0.0), gamma=config.gamma, lam=config.lam)
        for sample, row in zip(of, own, strict=True):
            figures.append((sample, row))
            advantages.append(found[: len(row)])
            found = found[len(row) :]
    returns = [
        [a + v for a, v in zip(a_N, v_N, strict=True)] for a_N, (_, v_N) in zip(advantages, figures, strict=True)
    ]
    used = whitened(advantages) if config.whiten else advantages
    return [
        replace(sample, advantages=_spread(sample, a_N), values=_spread(sample, v_N), returns=_spread(sample, r_N))
        for (sample, v_N), a_N, r_N in zip(figures, used, returns, strict=True)
    ]


def _was_cut(rollout: Rollout) -> bool:
    return rollout.episode.stop_reason in _ENDED_BY_A_LIMIT


def _after(ledger: Ledger, row: Sample, max_tokens: int) -> Sample:
    """The state in which a rollout was cut: its last ledger, which may hold what followed the last turn, and one more
    token, whichever, before which the value is read. `row` is any of the rollout's.

    A tool's output that ended the episode may be longer than any row: what is beyond `max_tokens` is left out, as the
    model may have no places for it, and the machine no memory.
    """
    token_ids = tuple(ledger.prompt_ids[:max_tokens])
    nothing = (0.0,) * (len(token_ids) + 1)
    return replace(
        row,
        token_ids=(*token_ids, token_ids[-1]),
        trainable=(*[False] * len(token_ids), True),
        logprobs=nothing,
        versions=(*[UNTRAINABLE_VERSION] * len(token_ids), 0),
        advantages=nothing,
        constrained=(),
    )


def _spread(sample: Sample, values_N: Sequence[float]) -> tuple[float, ...]:
    """One a token, 0.0 where untrainable, of those of the trainable ones."""
    own = iter(values_N)
    return tuple(next(own) if trainable else 0.0 for trainable in sample.trainable)
