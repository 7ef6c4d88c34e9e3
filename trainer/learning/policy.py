"""The policy under training: log-probabilities and updates, the same whatever the microbatches and processes.

Shape suffixes: B rows of a microbatch, T positions, H hidden size, N trainable tokens of a microbatch.

Gradients are summed over processes once per update, by hand. DistributedDataParallel would sum them at every backward
pass unless told otherwise, would want the same number of backward passes on every process, and divides by the number
of processes, which invariant 6 (one global denominator) forbids. LoRA's gradients are a few megabytes: one all-reduce.
Each process holds the whole frozen base; sharding it (FSDP, tensor parallel) is not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from trainer import processes
from trainer.config import LossConfig, LossSettings, ModelConfig, OptimConfig
from trainer.config.advantages import CriticConfig
from trainer.learning import adapter as lora
from trainer.learning.critic import Critic
from trainer.learning.losses.base import Loss, LossInputs, reduce_metrics
from trainer.learning.losses.entropy import EntropyBonus
from trainer.learning.losses.kl import kl_estimate
from trainer.learning.losses.registry import loss_of
from trainer.learning.optimizer import Optimizer, learning_rate
from trainer.learning.packing.choice import why_padded, why_unproved
from trainer.learning.packing.layouts import Layout, pack
from trainer.learning.packing.rows import FixedRow, Microbatch, TokenRow, used_length
from trainer.learning.packing.shares import minibatches_of, share_out
from trainer.learning.reader import Reader
from trainer.learning.samples import Sample, has_gradient
from trainer.learning.work import Work, gradient_scale, share_of
from trainer.templates.grammar import Grammar

_IMITATION = LossConfig(normalisation="token", kl_coef=0.0)
"""Every trainable token of a batch weighs the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is known of one step's training, the same on every process."""

    metrics: dict[str, float]
    """Means per trainable token that took part, over all processes and updates; see `losses.base.Loss`."""
    logprobs: list[list[float] | None]
    """For each sample: what the trainer gave its trainable tokens before the first optimizer step; None where the row
    had no gradient and was not computed."""


@dataclass(slots=True)
class _Done:
    """What one process has gathered of a step's updates."""

    parts: list[dict[str, Tensor]] = field(default_factory=list)
    """The metrics of each microbatch."""
    old: dict[int, Tensor] = field(default_factory=dict)
    """Log-probabilities from before the step's first update, by the identity of the sample."""
    norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)


class Policy:
    """A causal LM whose LoRA adapter learns. Draws no random numbers once it is built."""

    def __init__(
        self,
        model_path: str | Path,
        model_config: ModelConfig,
        optim: OptimConfig,
        accelerator: Accelerator,
        seed: int,
        *,
        max_length: int = 1,
        grammar: Grammar | None = None,
        critic: CriticConfig | None = None,
    ) -> None:
        """`max_length`: tokens of the longest row, see `trainer.learning.layers.rotations`. `grammar` is that of the
        run's answers; without one no row may be constrained. `critic`: it has one."""
        self.accelerator = accelerator
        self.num_updates = 0
        """Optimizer updates that the adapter has seen since its warm start: the policy version."""
        self.num_steps = 0
        """Calls of `update`; the learning-rate schedule goes by it."""
        self._reference: list[Tensor] | None = None
        self._model_path = model_path
        self._optim = optim
        self._seed = seed
        self._loss: tuple[LossSettings, Loss] | None = None
        self._entropy: EntropyBonus | None = None
        self._entropy_state: tuple[float, float] | None = None
        """A checkpoint's, until the bonus is made."""
        device = accelerator.device
        self.model = lora.load_model(model_path, model_config, device=device, seed=seed, max_length=max_length)
        """The PEFT model."""
        self.reader = Reader(self.model, device, grammar)
        self._parameters = list(lora.trainable_parameters(self.model).values())
        # Loading may keep one process longer than NCCL waits for it.
        processes.wait_for_all()
        self.padded_because = self._why_padded(model_config)
        """What keeps the rows from sharing prefixes; empty: nothing."""
        self.layout: Layout = "padded" if self.padded_because else "tree"
        for parameter in self._parameters:
            broadcast(parameter.data)
        self._optimizer = self._new_optimizer(optim.learning_rate, weight_decay=optim.weight_decay)

        self.critic: Critic | None = None
        if critic is not None:
            limit = optim.max_grad_norm
            self.critic = Critic(self.model, self.reader, critic, accelerator, seed=seed + 1, max_grad_norm=limit)

    def _why_padded(self, config: ModelConfig) -> str:
        if self._optim.layout == "padded":
            return "optim.layout is padded"
        own = why_padded(self.model, config) or why_unproved(self.model, lora.hidden_states)
        # The processes share the rows out by what they cost, and have to agree on that.
        return next(filter(None, processes.gather([own])), "")

    def _new_optimizer(self, rate: float, *, weight_decay: float) -> Optimizer:
        return Optimizer(
            self._parameters,
            self.accelerator,
            learning_rate=rate,
            weight_decay=weight_decay,
            max_grad_norm=self._optim.max_grad_norm,
        )

    def logprobs(self, rows: Sequence[TokenRow], *, temperature: float, adapter: bool = True) -> list[Tensor]:
        """Each row's log-probabilities of its trainable tokens, float32 on the CPU; no gradient.

        They are log softmax(logits / temperature), over the allowed tokens only where a grammar constrained the answer:
        what vLLM returns under `logprobs_mode="processed_logprobs"`, as long as top_p, top_k and penalties are off
        (they change the sampler's distribution, not this one).
        Computes what it is given on the calling process; no collective calls.
        """
        out = [torch.empty(0)] * len(rows)
        with torch.no_grad():
            for microbatch in pack(rows, self._optim.max_microbatch_tokens, self.layout):
                logprobs_N = self.reader.logprobs(microbatch, temperature, adapter=adapter).cpu()
                parts = torch.split(logprobs_N, list(microbatch.num_trainable_B))
                for i, part in zip(microbatch.row_indices, parts, strict=True):
                    out[i] = part
        return out

    def score(
        self, token_ids: Sequence[Sequence[int]], *, temperature: float = 1.0, adapter: bool = True
    ) -> list[Tensor]:
        """Log-probabilities of every token but the first, given those before it: `len(row) - 1` a row."""
        return self.logprobs([FixedRow(token_ids=ids) for ids in token_ids], temperature=temperature, adapter=adapter)

    def keep_as_reference(self) -> None:
        """From here on the KL is measured from the policy as it is now; until then from the base model."""
        self._reference = [p.detach().clone() for p in self._parameters]

    def divergences(self, samples: Sequence[Sample], loss: LossSettings, temperature: float) -> list[list[float]]:
        """`loss.kl`'s estimate of the KL to the reference at each trainable token of each sample; no gradient.

        Every process passes the same samples, all of them; the work is split here.
        """

        def divergence(microbatch: Microbatch) -> Tensor:
            logprobs_N = self.reader.logprobs(microbatch, temperature, adapter=True)
            ref_N = self._reference_logprobs(microbatch, temperature, loss)
            return kl_estimate(logprobs_N, ref_N, loss.kl.estimator)

        return self._figures(samples, divergence)

    def values(self, samples: Sequence[Sample]) -> list[list[float]]:
        """The critic's value of the state before each trainable token of each sample; likewise."""
        assert self.critic is not None, "the policy has no critic"
        return self._figures(samples, self.critic.values)

    def _figures(self, samples: Sequence[Sample], figure: Callable[[Microbatch], Tensor]) -> list[list[float]]:
        """(N,) figures of each sample's trainable tokens, without a gradient, shared out over the processes."""
        place = {id(sample): i for i, sample in enumerate(samples)}
        shares = share_out(samples, self.accelerator.num_processes, cost=lambda rows: sum(map(used_length, rows)))
        mine = shares[self.accelerator.process_index]
        found: list[tuple[int, list[float]]] = []
        for microbatch in pack(mine, self._optim.max_microbatch_tokens, self.layout):
            with torch.no_grad():
                parts = torch.split(figure(microbatch), list(microbatch.num_trainable_B))
            rows = [mine[i] for i in microbatch.row_indices]
            found += [(place[id(row)], part.tolist()) for row, part in zip(rows, parts, strict=True)]
        everyone = dict(processes.gather(found))
        return [everyone[i] for i in range(len(samples))]

    def imitate(
        self, batches: Sequence[Sequence[Sample]], *, learning_rate: float, on_step: Callable[[float], None]
    ) -> None:
        """The supervised updates of a warm start, one a batch, before the first `update`.

        The loss, which `on_step` gets as it was before its update, is the mean of -log-probability over the batch's
        trainable tokens, nats. Every process passes the same batches, all of them, with advantage 1; the work is split
        here, and the denominator is that of all processes. AdamW without weight decay at a constant rate; its moments
        end with it, and none of it counts as an update: policy version 0 is what it leaves.
        """
        optimizer = self._new_optimizer(learning_rate, weight_decay=0.0)
        for batch in batches:
            self._assert_same_everywhere(batch)
            scale = gradient_scale(batch)
            loss = 0.0
            for work in self._work(batch, _IMITATION, 1.0, 0, needs_old=False):
                logprobs_N = self.reader.logprobs(work.microbatch, 1.0, adapter=True)
                value = -(work.weights_N * logprobs_N).sum()
                (value * scale).backward()  # type: ignore[no-untyped-call]
                loss += float(value.detach())
            optimizer.step(scale)
            on_step(sum(processes.gather([loss])))

    def update(
        self, samples: Sequence[Sample], loss: LossSettings, *, temperature: float, constant_tokens: int
    ) -> Update:
        """Train on one step's samples: `num_epochs` passes of `minibatches` optimizer updates.

        Every process passes the same samples, all of them; the work is split here. `temperature` is the sampler's.
        `constant_tokens` is the constant of normalisation `constant`.

        A minibatch in which nothing has a gradient (all advantages 0 or all tokens masked, no KL term, no bonus for
        entropy at work) makes no update of the policy and is counted in `skipped_updates`: momentum and decay would
        else move the adapter without any evidence. A critic learns from it all the same. A step without samples makes
        none. Where `loss.kl.refresh_steps` says so, what the step leaves is the reference from here on.
        """
        assert all(s.num_trainable for s in samples), "samples without trainable tokens"
        assert all(p.dtype == torch.float32 and p.requires_grad for p in self._parameters), "the adapter was recast"
        self._assert_same_everywhere(samples)
        rate = learning_rate(self._optim, self.num_steps)
        self._optimizer.set_learning_rate(rate)
        minibatches = minibatches_of(samples, self._optim.minibatches, seed=f"{self._seed}:{self.num_steps}")
        needs_old = self._optim.num_epochs * len(minibatches) > 1
        work = [list(self._work(m, loss, temperature, constant_tokens, needs_old=needs_old)) for m in minibatches]
        function = self._made(loss)
        done = _Done()
        for _ in range(self._optim.num_epochs):
            for minibatch, works in zip(minibatches, work, strict=True):
                if any(has_gradient(s, loss) for s in minibatch):
                    self._learn_from(works, function, temperature, gradient_scale(minibatch), done)
        self.num_steps += 1
        if loss.has_reference and loss.kl.refresh_steps and self.num_steps % loss.kl.refresh_steps == 0:
            self.keep_as_reference()
        local = [{name: value.tolist() for name, value in part.items()} for part in done.parts]
        means = reduce_metrics(processes.gather(local)) | {
            "grad_norm": sum(done.norms) / max(len(done.norms), 1),
            "learning_rate": rate,
            "skipped_updates": float(self._optim.num_epochs * len(minibatches) - len(done.norms)),
        }
        if done.critic_norms:
            means["critic_grad_norm"] = sum(done.critic_norms) / len(done.critic_norms)
        if self._entropy is not None and "entropy" in means:
            means["entropy_coef"] = self._entropy.applied
            self._entropy.learn(means["entropy"])
        return Update(metrics=means, logprobs=self._of_all_processes(samples, done.old))

    def _learn_from(self, works: Sequence[Work], loss: Loss, temperature: float, scale: float, done: _Done) -> None:
        """One minibatch's updates, of the critic and, once that has warmed up, of the policy."""
        learns = self.critic is None or self.num_steps >= self.critic.config.warmup_steps
        for work in works:
            metrics: dict[str, Tensor] = {}
            if learns:
                metrics, old_N = self._accumulate(work, loss, temperature, scale)
                done.old |= work.by_row(old_N)
            if self.critic is not None:
                metrics |= self.critic.accumulate(work, scale)
                metrics["num_tokens"] = torch.tensor(float(len(work.weights_N)))
            done.parts.append(metrics)
        if learns and (norm := self._optimizer.step(scale)):
            done.norms.append(norm)
            self.num_updates += 1
        if self.critic is not None:
            done.critic_norms.append(self.critic.step(scale))

    def _made(self, config: LossSettings) -> Loss:
        """Made once: one of the user's own may keep what it learns of earlier updates."""
        if self._loss is None or self._loss[0] != config:
            self._loss = config, loss_of(config)
            self._entropy = None if config.entropy is None else EntropyBonus(config.entropy)
            if self._entropy is not None and self._entropy_state is not None:
                self._entropy.coef, self._entropy.last_entropy = self._entropy_state
        return self._loss[1]

    def _work(
        self, minibatch: Sequence[Sample], loss: LossSettings, temperature: float, constant_tokens: int, needs_old: bool
    ) -> Iterator[Work]:
        """This process's share of a minibatch, with the log-probabilities of earlier policies that its loss needs."""
        share = share_of(
            minibatch,
            loss,
            constant_tokens=constant_tokens,
            layout=self.layout,
            max_microbatch_tokens=self._optim.max_microbatch_tokens,
            accelerator=self.accelerator,
        )
        for work in share:
            old_N = ref_N = None
            with torch.no_grad():
                if needs_old:
                    old_N = self.reader.logprobs(work.microbatch, temperature, adapter=True)
                if loss.kl_in_loss:
                    ref_N = self._reference_logprobs(work.microbatch, temperature, loss)
            staleness_N = self.num_updates - work.versions_N
            yield replace(work, old_logprobs_N=old_N, ref_logprobs_N=ref_N, staleness_N=staleness_N)

    def _reference_logprobs(self, microbatch: Microbatch, temperature: float, loss: LossSettings) -> Tensor:
        if self._reference is None or loss.kl.reference == "base":
            return self.reader.logprobs(microbatch, temperature, adapter=False)
        current = [p.data for p in self._parameters]
        self._load_weights(self._reference)
        logprobs_N = self.reader.logprobs(microbatch, temperature, adapter=True)
        self._load_weights(current)
        return logprobs_N

    def _load_weights(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight

    def _accumulate(self, work: Work, loss: Loss, temperature: float, scale: float) -> tuple[dict[str, Tensor], Tensor]:
        """Add one microbatch's gradient, times `scale`, to the parameters' gradients.

        Returns the loss's metrics and the (N,) log-probabilities from before the step's first update.
        """
        value, metrics, old_N = self._value(work, loss, temperature)
        (value * scale).backward()  # type: ignore[no-untyped-call]
        return metrics, old_N

    def _value(self, work: Work, loss: Loss, temperature: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a microbatch, the bonus for entropy included, and what `_accumulate` returns."""
        logprobs_N, entropy_N = self.reader.of_tokens(
            work.microbatch, temperature, wants_entropy=self._entropy is not None
        )
        old_N = logprobs_N.detach() if work.old_logprobs_N is None else work.old_logprobs_N
        value, metrics = loss(
            LossInputs(
                logprobs_N=logprobs_N,
                old_logprobs_N=old_N,
                sampler_logprobs_N=work.sampler_logprobs_N,
                ref_logprobs_N=work.ref_logprobs_N,
                advantages_N=work.advantages_N,
                weights_N=work.weights_N,
                row_of_N=work.row_of_N,
                staleness_N=work.staleness_N,
            )
        )
        if self._entropy is not None and entropy_N is not None:
            value = value + self._entropy.term(entropy_N, work.weights_N)
            metrics = metrics | {"entropy": entropy_N.detach().sum()}
        return value, metrics, old_N

    def _of_all_processes(self, samples: Sequence[Sample], old: dict[int, Tensor]) -> list[list[float] | None]:
        """In the order of `samples`, the log-probabilities that each process noted of its own rows."""
        mine = [(i, old[id(s)].tolist()) for i, s in enumerate(samples) if id(s) in old]
        everyone = dict(processes.gather(mine))
        return [everyone.get(i) for i in range(len(samples))]

    def _assert_same_everywhere(self, samples: Sequence[Sample]) -> None:
        digest = (len(samples), sum(sum(s.token_ids) for s in samples), sum(sum(s.advantages) for s in samples))
        digests = processes.gather([digest])
        assert all(d == digest for d in digests), f"processes were given different samples: {digests}"

    def save_adapter(self, folder: Path) -> None:
        """See `adapter.save_adapter`. Call it on one process."""
        lora.save_adapter(self.model, folder)

    def save_merged(self, folder: Path) -> None:
        """See `adapter.save_merged`. Call it on one process."""
        lora.save_merged(self.model, folder, model_path=self._model_path)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs, as copies: adapter, reference, Adam's moments, the entropy's weight and
        two counters."""
        bonus = self._entropy
        return {
            "adapter": lora.adapter_state(self.model),
            "reference": None if self._reference is None else [t.cpu().clone() for t in self._reference],
            "moments": self._optimizer.moments(),
            "num_updates": self.num_updates,
            "num_steps": self.num_steps,
            "entropy": self._entropy_state if bonus is None else (bonus.coef, bonus.last_entropy),
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises `UserError` when the adapter does not fit."""
        lora.load_adapter_state(self.model, state["adapter"])
        if state["reference"] is not None:
            self._reference = [t.to(self.accelerator.device, copy=True) for t in state["reference"]]
        self._optimizer.load_moments(state["moments"])
        self.num_updates = state["num_updates"]
        self.num_steps = state["num_steps"]
        self._loss, self._entropy_state = None, state.get("entropy")
        if self.critic is not None and state.get("critic") is not None:
            self.critic.load_state_dict(state["critic"])
