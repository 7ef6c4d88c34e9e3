"""A bonus for the policy's entropy, and the floor below which it works."""

from __future__ import annotations

import math

from torch import Tensor

from trainer.config.learning import EntropyConfig


class EntropyBonus:
    """loss - coef · Σ weight · H, with H the entropy (nats) of the policy at each trained token.

    With a floor the bonus works only after a step whose mean entropy was at the floor or below, and `coef` is adapted:
    it rises by `step` after such a step, up to `max_coef`, and falls by as much after any other, down to 0. Before the
    first step it does not work. He et al. 2025, Skywork-OR1, arXiv:2505.22312; trl 1.16's
    `use_adaptive_entropy`, which adapts at each update where this does at each step, and has a lower bound besides.

    The weights are the loss's, so that the bonus is the same whatever the microbatches and processes (invariant 6);
    trl's is the mean over tokens. `coef` and `last_entropy` are in the checkpoint: resume is exact.
    """

    def __init__(self, config: EntropyConfig) -> None:
        self._config = config
        self.coef = config.coef
        self.last_entropy = math.inf
        """Mean of the last step, nats a token."""

    @property
    def applied(self) -> float:
        """The weight that the next update gives it."""
        floor = self._config.floor
        return self.coef if floor is None or self.last_entropy <= floor else 0.0

    def term(self, entropy_N: Tensor, weights_N: Tensor) -> Tensor:
        """What is added to a microbatch's loss."""
        return -self.applied * (entropy_N * weights_N).sum()

    def learn(self, mean_entropy: float) -> None:
        """After a step, from the mean over all its tokens; every process calls it with the same."""
        self.last_entropy = mean_entropy
        if self._config.floor is not None:
            up = mean_entropy <= self._config.floor
            self.coef = min(
                max(self.coef + (self._config.step if up else -self._config.step), 0.0), self._config.max_coef
            )
