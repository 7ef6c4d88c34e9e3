"""Which samples go into which optimizer update, and which process takes which of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from trainer.learning.samples import Sample


def minibatches_of(samples: Sequence[Sample], num_minibatches: int, *, seed: str) -> list[list[Sample]]:
    """Cut the samples into minibatches of about as many rollouts; the rows of a rollout stay together.

    Rollouts are shuffled first, so that a minibatch mixes groups.
    """
    rollout_ids = list(dict.fromkeys(s.rollout_id for s in samples))
    if num_minibatches > 1:
        random.Random(seed).shuffle(rollout_ids)
    place = {rollout_id: i * num_minibatches // len(rollout_ids) for i, rollout_id in enumerate(rollout_ids)}
    minibatches: list[list[Sample]] = [[] for _ in range(num_minibatches)]
    for sample in samples:
        minibatches[place[sample.rollout_id]].append(sample)
    return [m for m in minibatches if m]


def split(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of each part, so that parts have about equal sums: longest first, each to the lightest part so far.

    A part may be empty. That does no harm: gradients are summed once an update, not at every backward pass.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num_parts), key=lambda p: (loads[p], p))
        parts[lightest].append(i)
        loads[lightest] += costs[i]
    return [sorted(part) for part in parts]


def share_out(
    samples: Sequence[Sample], num_parts: int, *, cost: Callable[[Sequence[Sample]], int]
) -> list[list[Sample]]:
    """The samples of each part, of about equal `cost`.

    A group stays whole, because what its rows share is computed once, unless it costs more than a part should; then its
    rollouts do, whose rows share even more.
    """
    units = _together(samples, lambda s: s.task_id)
    if num_parts > 1:
        most = sum(map(cost, units)) / num_parts
        units = [
            part
            for unit in units
            for part in (_together(unit, lambda s: s.rollout_id) if cost(unit) > most else [unit])
        ]
    shares = split([cost(unit) for unit in units], num_parts)
    place = {id(sample): i for i, sample in enumerate(samples)}
    return [sorted((s for u in share for s in units[u]), key=lambda s: place[id(s)]) for share in shares]


def _together(samples: Sequence[Sample], key: Callable[[Sample], str]) -> list[list[Sample]]:
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(key(sample), []).append(sample)
    return list(by_key.values())
