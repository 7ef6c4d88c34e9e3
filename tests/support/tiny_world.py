"""A world of turns for a random model of two layers, which learns it in seconds: its optimum is known, a reward of 1.

A turn is one token. Tokens fall into four kinds; of each turn of a task one kind is right, and earns its share. The
tool's answer is the kind, so that a conversation may be looked at. Sampled from the policy itself, on this thread.

`python -m tests.support.tiny_world` prints what every algorithm makes of it, for docs/results/proofs.md; with names of
`ALGORITHMS`, `UNCORRECTED` or `ADVANTAGES` behind it, what these do.
"""

from __future__ import annotations

import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from envs.types import Episode, Message, StopReason, Task, Turn
from graders.types import Grade
from tests.support.policy_worker import save_tiny_llama, tiny_policy
from trainer.config import RunConfig
from trainer.learning.adapter import adapter_state, load_weights
from trainer.rollouts.collect import to_samples
from trainer.types import Ledger, Rollout

NUM_KINDS, NUM_TASKS, GROUP_SIZE = 4, 4, 16
NUM_STEPS, NUM_NOISY_STEPS, NUM_SEEDS = 150, 40, 3
NEAR = 0.9
"""Of the optimum; a random policy has 1 / NUM_KINDS."""
_SAID = Message(role="assistant", content="x")
_TURN = Turn(message=_SAID, num_tokens=1)

LAGS = (1, 2, 8)
"""Updates by which the sampler's adapter is behind."""
_TWO_UPDATES = {"minibatches": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "clipped, grpo": {},
    "clipped, dr_grpo": {"advantage": "dr_grpo"},
    "clipped, delta 3, two updates": {"delta": 3.0, "optim": _TWO_UPDATES},
    "gspo, two updates": {"type": "gspo", "optim": _TWO_UPDATES},
    "cispo, rloo, two updates": {"type": "cispo", "advantage": "rloo", "optim": _TWO_UPDATES},
    "reinforce, reinforce_pp_baseline": {"type": "reinforce", "advantage": "reinforce_pp_baseline"},
    "clipped, reinforce_pp": {"advantage": "reinforce_pp"},
    "clipped, gdpo": {"advantage": "gdpo"},
    "clipped, mt_grpo": {"advantage": "mt_grpo"},
    "clipped, gigpo": {"advantage": "gigpo"},
    "clipped, turn_discounted": {"advantage": "turn_discounted"},
    "clipped, gae (PPO)": {"advantage": {"type": "gae", "critic": {"learning_rate": 0.01}}},
    "KL in the loss, refreshed": {"kl_coef": 0.001, "kl": {"refresh_steps": 5}},
    "KL in the reward": {"kl_coef": 0.001, "kl": {"place": "reward", "estimator": "k1"}},
    "bonus for entropy": {"entropy": {"coef": 0.001, "floor": 0.5, "step": 0.001, "max_coef": 0.01}},
    **{f"clipped, grpo, sampled {lag} updates before": {"lag": lag} for lag in LAGS},
    "all corrections, an engine 0.2 nats off": {
        "correction": {"level": "sequence", "ratio_range": [0.67, 1.5], "mean_range": [0.7, 1.4]},
        "jitter": 0.2,
    },
}
"""Settings of `loss`, and of `optim` and the world."""
UNCORRECTED = {f"the same {lag} before, uncorrected": {"lag": lag, "tis_cap": None} for lag in LAGS}
BY_TURN = ("mt_grpo", "gigpo", "turn_discounted")
ADVANTAGES: dict[str, Any] = {"grpo": "grpo"} | {name: {"type": name, "gamma": 0.0} for name in BY_TURN}
"""By episode, and by turn where what a turn earns is its own."""


def config_of(**loss: object) -> RunConfig:
    data = {"output_dir": "x", "grader": {"type": "numeric"}, "rollout": {"group_size": GROUP_SIZE}, "loss": loss}
    return RunConfig.model_validate(data)


def rewards_of(model: Path, name: str, seed: int, *, last_step: int = NUM_STEPS) -> list[float]:
    """The mean reward of each step of a run of two turns by one of `ALGORITHMS`, which may end early."""
    loss = dict((ALGORITHMS | UNCORRECTED)[name])
    optim = {"learning_rate": 0.01, "schedule": "linear", "num_steps": NUM_STEPS} | loss.pop("optim", {})
    jitter, lag = loss.pop("jitter", 0.0), loss.pop("lag", 0)
    config = config_of(**loss)
    critic = None if config.loss.gae is None else config.loss.gae.critic
    world = TinyWorld(tiny_policy(model, critic=critic, **optim), num_turns=2, seed=seed, jitter=jitter, lag=lag)
    return [world.step(config) for _ in range(last_step)]


def first_right_of(model: Path, name: str, seed: int) -> list[float]:
    """The share of right first turns at each step of a run of three turns in which the others earn chance."""
    world = TinyWorld(tiny_policy(model, learning_rate=0.01), num_turns=3, seed=seed, noise=1.0)
    config = config_of(advantage=ADVANTAGES[name])
    for _ in range(NUM_NOISY_STEPS):
        world.step(config)
    return world.first_right


def steps_until(shares: Sequence[float], share: float) -> int | None:
    """The first step at which the mean of five has come so far; None where none has."""
    means = [sum(shares[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(shares))]
    return next((i + 1 for i, mean in enumerate(means) if i >= 4 and mean >= share), None)


def end_of(shares: Sequence[float]) -> float:
    """The mean of the last ten steps."""
    return sum(shares[-10:]) / 10


class TinyWorld:
    """Of `num_turns` turns. With `noise` only the first matters, and the others earn chance, that large.

    With `jitter` the sampler's logits differ from the policy's by a normal variable of that spread. With `lag` it
    samples under the adapter of so many updates before.
    """

    def __init__(
        self, policy, *, num_turns: int, seed: int, noise: float = 0.0, jitter: float = 0.0, lag: int = 0
    ) -> None:
        self._policy = policy
        self._num_turns = num_turns
        self._noise = noise
        self._jitter = jitter
        self._adapters: deque[dict[str, torch.Tensor]] = deque(maxlen=lag + 1)
        self._draws = torch.Generator().manual_seed(seed)
        self.first_right: list[float] = []
        """Share of rollouts whose first turn was right, by step."""

    def step(self, config: RunConfig) -> float:
        """One step of training; the mean reward of its rollouts."""
        self._adapters.append(adapter_state(self._policy.model))
        load_weights(self._policy.model, self._adapters[0])
        rollouts = self.rollouts([task for task in range(NUM_TASKS) for _ in range(GROUP_SIZE)])
        load_weights(self._policy.model, self._adapters[-1])
        samples, _ = to_samples(rollouts, config, self._policy)
        self._policy.update(samples, config.loss, temperature=1.0, constant_tokens=self._num_turns)
        return sum(r.reward for r in rollouts) / len(rollouts)

    def rollouts(self, tasks: Sequence[int]) -> list[Rollout]:
        """One of each task named, all of them sampled at once."""
        ledgers = [Ledger() for _ in tasks]
        rewards: list[list[float]] = [[] for _ in tasks]
        for ledger, task in zip(ledgers, tasks, strict=True):
            ledger.append_context([1, 5 + task])
        for turn in range(self._num_turns):
            with torch.no_grad():
                logits_BV = self._policy.model(input_ids=torch.tensor([x.prompt_ids for x in ledgers])).logits[:, -1]
            if self._jitter:
                logits_BV = logits_BV + self._jitter * torch.randn(logits_BV.shape, generator=self._draws)
            logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
            tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=self._draws)[:, 0].tolist()
            for i, (ledger, token) in enumerate(zip(ledgers, tokens_B, strict=True)):
                version = self._policy.num_updates - max(0, len(self._adapters) - 1)
                ledger.append_sampled([token], [float(logprobs_BV[i, token])], version, turn=turn)
                ledger.append_context([80 + token % NUM_KINDS])
                rewards[i].append(self._reward(tasks[i], turn, token))
        if self._noise:
            self.first_right.append(sum(of[0] for of in rewards) / len(rewards))
        return [self._rollout(i, *of) for i, of in enumerate(zip(tasks, ledgers, rewards, strict=True))]

    def _reward(self, task: int, turn: int, token: int) -> float:
        if self._noise and turn:
            return self._noise * float(torch.randn((), generator=self._draws))
        return float(token % NUM_KINDS == (task + turn) % NUM_KINDS) / (1 if self._noise else self._num_turns)

    def _rollout(self, number: int, task: int, ledger: Ledger, rewards: Sequence[float]) -> Rollout:
        return Rollout(
            episode=Episode(
                rollout_id=f"{task}-{number}",
                task_id=str(task),
                messages=(_SAID,),
                turns=(_TURN,) * self._num_turns,
                stop_reason=StopReason.ANSWERED,
            ),
            task=Task(task_id=str(task), messages=(_SAID,)),
            ledgers=(ledger,),
            grade=Grade(reward=sum(rewards), parts={"turns": sum(rewards)}, turn_rewards=tuple(rewards)),
        )


def _table(model: Path, names: Sequence[str]) -> Iterator[str]:
    yield f"| algorithm | steps to {NEAR} of the optimum, seeds 0 to {NUM_SEEDS - 1} | share at the end |"
    yield "|---|---|---|"
    for name in filter((ALGORITHMS | UNCORRECTED).__contains__, names):
        runs = [rewards_of(model, name, seed) for seed in range(NUM_SEEDS)]
        steps, ends = [steps_until(run, NEAR) for run in runs], [end_of(run) for run in runs]
        yield f"| {name} | {', '.join(map(str, steps))} | {', '.join(f'{x:.3f}' for x in ends)} |"
    yield f"\n| advantage | right first turns, mean of {NUM_NOISY_STEPS} steps | at the end |"
    yield "|---|---|---|"
    for name in filter(ADVANTAGES.__contains__, names):
        runs = [first_right_of(model, name, seed) for seed in range(NUM_SEEDS)]
        means, ends = [sum(run) / len(run) for run in runs], [end_of(run) for run in runs]
        yield f"| {name} | {', '.join(f'{x:.3f}' for x in means)} | {', '.join(f'{x:.3f}' for x in ends)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in _table(save_tiny_llama(Path(folder)), sys.argv[1:] or [*ALGORITHMS, *UNCORRECTED, *ADVANTAGES]):
            print(line, flush=True)
