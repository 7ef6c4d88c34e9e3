"""The losses, by the `type` that a config names: one line each; and the user's own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from envs.errors import UserError
from envs.user_code import load_target, looked_at, make, raised_by, required
from trainer.config.learning import CorrectionConfig, CustomLossConfig, LossSettings
from trainer.learning.losses.base import EFFECTIVE, HISTOGRAM, SQUARES, Loss, LossInputs, token_sums
from trainer.learning.losses.correction import correction
from trainer.learning.losses.kl import kl_term

LOSSES = {
    "clipped": "clipped:clipped_loss",
    "gspo": "gspo:gspo_loss",
    "cispo": "cispo:cispo_loss",
    "reinforce": "reinforce:reinforce_loss",
}
"""Where each stands below this folder; called with the inputs and its settings."""
_OF_EVERY_UPDATE = {"grad_norm", "learning_rate", "skipped_updates", SQUARES, EFFECTIVE}
_OF_ENTROPY = {"entropy", "entropy_coef"}
_OF_CRITIC = {"critic_loss", "critic_value", "critic_error", "critic_return", "critic_grad_norm"}
"""Figures that stand beside the loss's, see `Policy.update`."""


def loss_of(config: LossSettings) -> Loss:
    """The loss that the config names, made anew: one of the user's own may keep what it learns of earlier updates.

    What all have in common is added here: the correction that each is given as `correction_N`, what is told of the
    tokens, and, but to the user's own, the KL term  kl_coef · Σ weight · `kl_term`.
    Raises `UserError` for a target that can't be had, or can't be called with a `LossInputs` alone.
    """
    if isinstance(config, CustomLossConfig):
        return _told_of(_with_what_all_have(_custom(config), config), _where(config))
    function = resolve_name(f"trainer.learning.losses.{LOSSES[config.type]}")
    return _with_what_all_have(lambda inputs: function(inputs, config), config)


def _with_what_all_have(own: Loss, config: LossSettings) -> Loss:
    def loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        weight_N, corrections = correction(inputs, config.correction, config.tis_cap)
        inputs = replace(inputs, correction_N=weight_N)
        value, metrics = own(inputs)
        sums = token_sums(inputs) | corrections
        if config.kl_in_loss and not isinstance(config, CustomLossConfig):
            kl_N = kl_term(inputs, config.kl.estimator)
            value = value + config.kl_coef * (kl_N * inputs.weights_N).sum()
            sums["kl_to_reference"] = kl_N.detach().sum()
        if isinstance(config, CustomLossConfig):
            _check_names(metrics, sums, config)
        return value, sums | metrics

    return loss


def _check_names(metrics: Iterable[str], sums: Iterable[str], config: CustomLossConfig) -> None:
    """Raise `UserError` for one that another figure has, or that `reduce_metrics` would take for something else."""
    reserved = {*sums, *_OF_EVERY_UPDATE, *(() if config.entropy is None else _OF_ENTROPY)}
    reserved |= set() if config.gae is None else _OF_CRITIC
    for name in sorted(metrics):
        if name in reserved or name.startswith("num_tokens") or "/staleness_" in name or name.endswith(HISTOGRAM):
            raise UserError(f"{_where(config)}: metrics: {name!r} is a name of the trainer's own; expected another")


def check_loss(config: CustomLossConfig) -> None:
    """Try it on a few tokens. Raises `UserError` where it does not work.

    What is tried is not what the run gets, so that the run's has learned nothing of the trial.
    """
    loss, where = _with_what_all_have(_custom(config), config), _where(config)
    for num_tokens in (4, 7):
        inputs = _example(num_tokens, has_reference=config.kl_in_loss)
        with looked_at(where), _told_of_none(where, config):
            value, metrics = loss(inputs)
            (gradient_N,) = torch.autograd.grad(value, inputs.logprobs_N, allow_unused=True)
        if gradient_N is None:
            raise UserError(f"{where}: has no gradient to logprobs_N: nothing would be learned by it")
        for name, number in {"the loss": value, "its gradient": gradient_N, **metrics}.items():
            if not number.isfinite().all():
                raise UserError(f"{where}: {name} is {number.detach().tolist()} on the tokens that it is tried on")


@contextlib.contextmanager
def _told_of_none(where: str, config: CustomLossConfig) -> Iterator[None]:
    """What a loss makes of an input that is None says nothing of the key which would fill it."""
    try:
        yield
    except (TypeError, AttributeError) as e:
        none = {} if config.kl_in_loss else {"ref_logprobs_N": "loss.kl_coef, with loss.kl.place loss,"}
        none |= {} if config.tis_cap is not None or config.correction != CorrectionConfig() else _WITHOUT_CORRECTION
        if "None" not in str(e) or not none:
            raise
        told = "; ".join(f"inputs.{name} is None unless {key} is set" for name, key in none.items())
        frame = traceback.extract_tb(e.__traceback__)[-1]
        raise UserError(
            f"{where}: raised {type(e).__name__}: {e} ({frame.filename}, line {frame.lineno}); {told}"
        ) from e


_WITHOUT_CORRECTION = {"correction_N": "loss.tis_cap"}


def forgotten(config: LossSettings) -> list[str]:
    """What a run that goes on has to say of its loss: no checkpoint holds what an object of the user's keeps."""
    if not isinstance(config, CustomLossConfig) or inspect.isfunction(load_target(config.target, key="loss.target")):
        return []
    return [f"{_where(config)}: is made anew; what it has kept of the updates before is in no checkpoint"]


def _where(config: CustomLossConfig) -> str:
    return f"loss.target {config.target!r}"


def _custom(config: CustomLossConfig) -> Loss:
    where = _where(config)
    target = load_target(config.target, key="loss.target")
    with looked_at(where):
        if isinstance(target, type) or config.kwargs:
            target = make(target, copy.deepcopy(config.kwargs), where=where)
        if not callable(target) or not _takes_inputs_alone(target):
            takes = f"one that takes {', '.join(required(target)) or 'nothing'}" if callable(target) else _told(target)
            raise UserError(f"{where}: expected a function of one argument, a LossInputs; got {takes}")

    def loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        given = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        versions = {name: tensor._version for name, tensor in given.items() if tensor is not None}
        value, metrics = _checked(target(inputs), where)
        for name, version in versions.items():
            if given[name]._version != version:
                raise UserError(f"{where}: changes {name} in place; expected new tensors")
        return value, metrics

    return loss


def _told_of(loss: Loss, where: str) -> Loss:
    """What goes wrong with it while the run trains names it; `UserError` for a loss that is no number."""

    def told(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        with raised_by(where):
            value, metrics = loss(inputs)
        if not value.isfinite():
            raise UserError(f"{where}: the loss is {value.item()} on a microbatch of {len(inputs.logprobs_N)} tokens")
        return value, metrics

    return told


def _takes_inputs_alone(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True


def _checked(answer: Any, where: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss alone has no metrics."""
    value, metrics = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise UserError(f"{where}: expected a tensor without axes, with a gradient to logprobs_N; got {_told(value)}")
    if not isinstance(metrics, dict):
        raise UserError(f"{where}: expected a dict of sums over tokens for metrics; got {_told(metrics)}")
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor | float | int) or (isinstance(metric, Tensor) and metric.numel() != 1):
            raise UserError(f"{where}: metrics: {name!r}: expected a sum over tokens, one number; got {_told(metric)}")
    return value, {str(name): torch.as_tensor(metric).detach() for name, metric in metrics.items()}


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
    return type(value).__name__


def _example(num_tokens: int = 4, *, has_reference: bool) -> LossInputs:
    """A few tokens of two rows, with which a loss is tried before the run."""
    logprobs_N = -torch.arange(1.0, num_tokens + 1) / 4
    is_second_N = torch.arange(num_tokens) >= num_tokens // 2
    return LossInputs(
        logprobs_N=logprobs_N.clone().requires_grad_(),
        old_logprobs_N=logprobs_N,
        sampler_logprobs_N=logprobs_N - 0.01,
        ref_logprobs_N=logprobs_N - 0.1 if has_reference else None,
        advantages_N=1.0 - 2.0 * is_second_N,
        weights_N=torch.full((num_tokens,), 1.0 / num_tokens),
        row_of_N=is_second_N.long(),
        staleness_N=torch.zeros(num_tokens, dtype=torch.int64),
    )
