"""Whether a server runs the policy of a step is told through the noise of two implementations, or not claimed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from envs.errors import UserError
from trainer.exports.proof import Proof, check_base, prove
from trainer.runs.canary_record import CanaryRecord

NUM_TOKENS = 440
Scores = NDArray[np.float64]


class Run:
    """Versions 1 to 4, each `size` nats a token from the one before, and engines that serve them with `noise`."""

    def __init__(self, *, size: float, noise: float, seed: int) -> None:
        self._draws = np.random.default_rng(seed)
        self.noise = noise
        # Differences of two implementations that every version shows alike.
        self._constant = self._draws.normal(0, 0.04, NUM_TOKENS)
        versions = [self._draws.normal(-2, 0.5, NUM_TOKENS)]
        for _ in range(4):
            versions.append(versions[-1] + self._draws.normal(0, size, NUM_TOKENS))
        self.true = dict(enumerate(versions))
        rounded = {step: self._rounded(scores).tolist() for step, scores in self.true.items()}
        self.record = CanaryRecord(token_ids=[[0] * (NUM_TOKENS + 1)], base=rounded.pop(0), policies=rounded)

    def _rounded(self, scores: Scores) -> Scores:
        return scores + self._draws.normal(0, self.noise, NUM_TOKENS)

    def served(self, step: int) -> list[float]:
        scores: list[float] = (self._rounded(self.true[step]) + self._constant).tolist()
        return scores

    def proved(self, served: list[float], *, step: int, base: int = 0) -> Proof:
        return prove(self.record, served, self.served(base), step=step, name="policy", tolerance=0.15)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(5))
def test_a_server_of_the_step_is_proved_and_told_from_all_others(seed, noise):
    run = Run(size=0.05, noise=noise, seed=seed)
    proof = run.proved(run.served(3), step=3)
    assert proof.step == 3 and proof.num_tokens == NUM_TOKENS and not proof.alike
    assert proof.mismatch < 0.15 and proof.share_of_base > 0.7


@pytest.mark.parametrize("other", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_server_of_another_step_is_refused_with_figures(other, noise):
    run = Run(size=0.05, noise=noise, seed=other)
    with pytest.raises(UserError, match=rf"policy answers as step {other} of the run, not as step 3: .* nats a token"):
        run.proved(run.served(other), step=3)


def test_a_server_that_answers_as_the_base_is_refused():
    run = Run(size=0.05, noise=0.03, seed=0)
    with pytest.raises(UserError, match=r"answers as its base model, not as step 2"):
        run.proved(run.served(0), step=2)


@pytest.mark.parametrize("seed", range(20))
def test_steps_that_differ_by_less_than_the_noise_are_never_held_against_a_right_server(seed):
    run = Run(size=0.05, noise=0.03, seed=seed)
    last = np.array(run.true[4])
    for step in range(5, 9):
        last = last + np.random.default_rng(seed + step).normal(0, 0.001, NUM_TOKENS)
        run.true[step] = last
        run.record.policies[step] = run._rounded(last).tolist()
    proof = run.proved(run.served(6), step=6)
    assert {5, 7} & {*proof.alike} and not {1, 2} & {*proof.alike}


@pytest.mark.parametrize("seed", range(10))
def test_an_adapter_that_changes_next_to_nothing_is_not_said_to_be_proved(seed):
    run = Run(size=0.0005, noise=0.03, seed=seed)
    with pytest.raises(
        UserError, match=r"can't be proved to be step 1: .* differs from the base model by 0\.0\d+ nats"
    ):
        run.proved(run.served(1), step=1)


def test_another_runs_adapter_is_no_policy_of_this_run():
    run, other = Run(size=0.3, noise=0.03, seed=1), Run(size=0.3, noise=0.03, seed=2)
    moved = (np.array(run.served(0)) + other.true[4] - other.true[0]).tolist()
    with pytest.raises(UserError, match=r"is no policy of this run: .* the nearest"):
        run.proved(moved, step=4)


def test_another_base_model_is_refused_with_its_name():
    run, other = Run(size=0.05, noise=0.03, seed=1), Run(size=0.05, noise=0.03, seed=2)
    check_base(run.record, run.served(0), name="base", tolerance=0.15)
    with pytest.raises(
        UserError, match=r"base, the server's base model, is not the one .* by 0\.[3-9]\d+ nats a token"
    ):
        check_base(run.record, other.served(0), name="base", tolerance=0.15)


def test_scores_that_are_no_numbers_prove_nothing():
    run = Run(size=0.05, noise=0.03, seed=1)
    nothing = [float("nan")] * NUM_TOKENS
    with pytest.raises(UserError):
        run.proved(nothing, step=1)
    with pytest.raises(UserError):
        check_base(run.record, nothing, name="base", tolerance=0.15)
