"""The critic of PPO: what a state is worth, learned on the same frozen base under an adapter of its own.

Shape suffixes: N trainable tokens of a microbatch, H hidden size.

A value is read where a log-probability is: at the position before a sampled token, so that it knows the state and not
the token. PPO: Schulman et al. 2017, arXiv:1707.06347.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from trainer.config import LoraConfig
from trainer.config.advantages import CriticConfig
from trainer.learning import adapter as lora
from trainer.learning.optimizer import Optimizer
from trainer.learning.packing.rows import Microbatch
from trainer.learning.reader import Reader
from trainer.learning.work import Work

_ADAPTER = "critic"


class Critic:
    """Values in float32. Begins at 0 everywhere: its adapter changes nothing yet, its head gives nothing."""

    def __init__(
        self,
        model: Any,
        reader: Reader,
        config: CriticConfig,
        accelerator: Accelerator,
        *,
        seed: int,
        max_grad_norm: float,
    ) -> None:
        """`reader` reads `model`, under the critic's adapter while that is at work."""
        self.config = config
        self._reader = reader
        self._model = model
        lora.add_adapter(model, _ADAPTER, LoraConfig(r=config.r, alpha=2 * config.r), seed=seed)
        hidden_size = model.get_base_model().config.get_text_config().hidden_size
        self._head = nn.Linear(hidden_size, 1).to(accelerator.device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        adapter = lora.adapter_parameters(model, _ADAPTER)
        self._parameters = [*(p for _, p in sorted(adapter.items())), *self._head.parameters()]
        for parameter in self._parameters:
            broadcast(parameter.data)
        self._optimizer = Optimizer(
            self._parameters,
            accelerator,
            learning_rate=config.learning_rate,
            weight_decay=0.0,
            max_grad_norm=max_grad_norm,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that learns: its adapter's and its head's."""
        return self._parameters

    def values(self, microbatch: Microbatch) -> Tensor:
        """(N,) of the states before the trainable tokens; no gradient."""
        with lora.as_adapter(self._model, _ADAPTER), torch.no_grad():
            return self._values(microbatch)

    def accumulate(self, work: Work, scale: float) -> dict[str, Tensor]:
        """Add one microbatch's gradient of `value_loss`, times `scale`; returns metrics, sums over its tokens."""
        with lora.as_adapter(self._model, _ADAPTER):
            values_N = self._values(work.microbatch)
            loss_N = value_loss(values_N, work.values_N, work.returns_N, self.config.value_clip)
            ((loss_N * work.weights_N).sum() * scale).backward()  # type: ignore[no-untyped-call]
        now_N = values_N.detach()
        return {
            "critic_loss": loss_N.detach().sum(),
            "critic_value": now_N.sum(),
            "critic_error": (now_N - work.returns_N).abs().sum(),
            "critic_return": work.returns_N.sum(),
        }

    def step(self, scale: float) -> float:
        """One update; the gradient's norm. Collective, see `Optimizer.step`."""
        return self._optimizer.step(scale)

    def _values(self, microbatch: Microbatch) -> Tensor:
        values_N1: Tensor = self._head(self._reader.hidden(microbatch).float())
        return values_N1[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """Copies on the CPU of all that an exact continuation needs."""
        return {
            "weights": [p.detach().cpu().clone() for p in self._parameters],
            "moments": self._optimizer.moments(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, state["weights"], strict=True):
                parameter.copy_(weight)
        self._optimizer.load_moments(state["moments"])


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float | None) -> Tensor:
    """(N,) max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²) / 2; without `clip` (V - R)² / 2.

    Clipped as in PPO's reference implementation (OpenAI baselines, ppo2): an update gains nothing by moving a value
    further than `clip` away from the one before the step.
    """
    loss_N = (values_N - returns_N).square()
    if clip is not None:
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (near_N - returns_N).square())
    return loss_N / 2
