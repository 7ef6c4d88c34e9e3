"""What a run would need on a GPU that is not at hand: memory and time by formula alone. Nothing here is measured.

Legend: P weights, W bytes of the engine's weights, kv bytes of a token in the KV cache, F and B operations and bytes
that the GPU computes and reads in a second, g generated tokens, r row tokens and k turns of a rollout, n rollouts that
fall to one GPU, s of them decoded at once.

    decoding     g · (n/s + λ - 1) steps, each of max((W + m · kv · r/2) / (β · B), m · 2P / (φ · F)) + o seconds
    prefill      n · (r - g) · 2P / (φ · F); n · k · r/2 tokens where the cache can't hold all n rows
    training     n · r · c · P / (μ · F), c = epochs · (4 + 2 checkpointed) + 2 if it needs old log-probabilities
                 + 2 if it needs those of the base model
    publishing   published bytes / D + a constant
    start        2 · P · b / D + a constant, b bytes of a base weight

with m = n / (n/s + λ - 1) sequences live on average: the last ones of a step run alone, the longest of them λ times
the mean. s is what `engine.max_num_seqs`, n and the KV cache's room for whole rows allow. A forward pass takes 2P
operations a token, the backward pass through frozen weights another 2P, and checkpointing a second forward pass.

Covered: one trainer and one engine on each GPU, rollouts split evenly, every group trained on. All n episodes are
open at once; if their rows do not fit the cache together, each turn is taken to find its conversation gone and reads it
anew. *Not covered:* attention's own operations (about a fifth of 2P at a context of 4,000 tokens of a 1.5B), faster fp8
arithmetic, padding, checkpoints, gradients on their way between GPUs, warm starts, what tools and graders take,
rollouts lost and repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envs.errors import UserError
from trainer.config import EngineConfig, RunConfig, check_publish, publishes_merged
from trainer.engines.arguments import check_engine
from trainer.models.cache import resolve_config
from trainer.models.machines import GIB, Gpu, Machine, check_option, this_machine
from trainer.models.memory import (
    MemoryRow,
    ModelShape,
    engine_weight_bytes,
    gpu_bytes,
    kv_token_bytes,
    memory_rows,
    num_lora_weights,
    num_weights_of,
    read_shape,
    weight_bytes,
)
from trainer.preflight.advice import Advice, advise_memory
from trainer.preflight.duration import TimeEstimate, num_evaluations

TRAINING_UTILISATION = 0.2
"""μ: share of the GPU's bf16 peak that forward and backward passes reach. 0.23 (checkpointed 0.13 and 0.22) was
measured on an H200 with a model of 1.5B in rows of 520 tokens."""
PREFILL_UTILISATION = 0.5
"""φ: the same of the engine's matrix products."""
BANDWIDTH_UTILISATION = 0.6
"""β: share of the memory bandwidth that decoding reaches."""
DECODING_OVERHEAD_S = 0.008
"""o: scheduling, sampling and adapter kernels of one decoding step; measured likewise, 128 sequences at once."""
LONGEST_ROLLOUT = 2.0
"""λ: the longest rollout of a step against the mean."""
DISK_BYTES_PER_S = 1e9
"""D: reading and writing weights."""
PUBLISH_S = 1.0
"""Loading the adapter and scoring the canary on both sides; 0.25 to 0.9 measured likewise."""
START_S = 120.0
"""Compilation and CUDA graphs of the engine (84 measured likewise), and the world's start."""

GENERATED_TOKENS = 2000.0
"""Of a rollout: the published demo went from about 2,500 to 1,500."""
TOOL_CALLS = 5.55
"""Of a rollout: the demo went from 6.9 to 4.2."""
PROMPT_TOKENS = 1000.0
"""System prompt, tools and question; assumed."""
TOOL_RESULT_TOKENS = 800.0
"""A search's snippets are some hundred tokens, a page of figures 2,000; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedRollout:
    """A rollout of middling length, as the estimate takes it."""

    tool_calls: float
    turns: float
    generated_tokens: float
    row_tokens: float
    """Prompt, generated tokens and tool results: what training reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the command line says; None where it says nothing."""

    gpu: Gpu | None = None
    """None: memory only, of this machine."""
    gpus: int = 1
    gpu_hour_price: float | None = None
    tool_calls: float | None = None
    generated_tokens: float | None = None
    row_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Everything computed."""

    where: str
    """In words: which GPUs, or this machine."""
    engine_share_bytes: float | None
    """What the engine takes of a GPU, whatever it needs; None on a CPU, and where it is the user's own."""
    memory: Sequence[MemoryRow]
    advice: Sequence[Advice]
    time: TimeEstimate | None
    """None without the GPU's speeds, and where the engine is the user's own."""
    gpu_hour_price: float | None


def estimate_only(config: RunConfig, assumptions: Assumptions) -> Estimate:
    """Needs the model's `config.json` and nothing else. Raises `UserError`."""
    _check(assumptions)
    gpu = assumptions.gpu
    machine = Machine(on_cpu=False, memory_bytes=gpu.memory_bytes) if gpu else this_machine()
    # What an engine of the user's own takes, and how fast it is, no formula says.
    engine = config.engine if isinstance(config.engine, EngineConfig) else None
    if engine:
        check_engine(engine, on_cpu=machine.on_cpu)
    check_publish(config, on_cpu=machine.on_cpu)
    folder = resolve_config(config.model.name)
    shape = read_shape(folder)
    if shape is None:
        raise UserError(f"model.name {config.model.name}: its config.json is of a kind that the formulas do not cover")
    num_weights = num_weights_of(folder, shape)
    rows = memory_rows(config, shape, num_weights, on_cpu=machine.on_cpu)
    time = None
    if engine and gpu and gpu.flops and gpu.bandwidth:
        episode = episode_of(config, assumptions)
        time = computed_time(config, shape, num_weights, gpu, episode, gpus=assumptions.gpus)
    return Estimate(
        where=f"{assumptions.gpus} × {gpu.name}" if gpu else "this machine",
        engine_share_bytes=_share_bytes(config, shape, num_weights, machine),
        memory=rows,
        advice=advise_memory(rows, config, total_bytes=machine.memory_bytes, on_cpu=machine.on_cpu),
        time=time,
        gpu_hour_price=assumptions.gpu_hour_price,
    )


def _share_bytes(config: RunConfig, shape: ModelShape, num_weights: int, machine: Machine) -> float | None:
    if machine.on_cpu or not isinstance(engine := config.engine, EngineConfig):
        return None
    return gpu_bytes(
        engine, engine_weight_bytes(config, engine, shape, num_weights, on_cpu=False), machine.memory_bytes
    )


def episode_of(config: RunConfig, assumptions: Assumptions) -> AssumedRollout:
    """The assumed rollout, cut to the config's limits as a real one would be."""
    limits = config.rollout
    calls = TOOL_CALLS if assumptions.tool_calls is None else assumptions.tool_calls
    calls = min(calls, limits.max_tool_calls)
    turns = min(calls + 1, limits.max_turns)
    generated = GENERATED_TOKENS if assumptions.generated_tokens is None else assumptions.generated_tokens
    generated = min(generated, turns * limits.max_turn_tokens, limits.max_episode_tokens)
    row = assumptions.row_tokens
    if row is None:
        row = PROMPT_TOKENS + generated + calls * TOOL_RESULT_TOKENS
    row = min(max(row, generated), limits.max_episode_tokens)
    return AssumedRollout(tool_calls=calls, turns=turns, generated_tokens=generated, row_tokens=row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one engine gets through its rollouts; see the formulas above."""

    at_once: float
    """s"""
    live: float
    """m"""
    step_s: float
    """Of one decoding step."""
    decoding_s: float
    prefill_s: float
    read_anew: bool
    """The prefix cache is too small for all open episodes."""

    @property
    def total_s(self) -> float:
        return self.decoding_s + self.prefill_s


def decoding_of(
    config: RunConfig, shape: ModelShape, num_weights: int, gpu: Gpu, episode: AssumedRollout, num_rollouts: float
) -> Decoding:
    """Of `num_rollouts` on one GPU."""
    assert gpu.flops and gpu.bandwidth, "asked for the time of a GPU whose speeds are not known"
    engine = _local(config)
    g, r = episode.generated_tokens, episode.row_tokens
    kv_row = kv_token_bytes(config, shape, on_cpu=False) * r
    weights = engine_weight_bytes(config, engine, shape, num_weights, on_cpu=False)
    room = gpu_bytes(engine, weights, gpu.memory_bytes) - weights
    cached = room // kv_row
    at_once = max(1.0, min(config.engine.max_num_seqs, num_rollouts, cached))
    rounds = num_rollouts / at_once + LONGEST_ROLLOUT - 1
    live = num_rollouts / rounds
    forward_s = 2 * num_weights / (PREFILL_UTILISATION * gpu.flops)
    reading_s = (weights + live * kv_row / 2) / (BANDWIDTH_UTILISATION * gpu.bandwidth)
    step_s = max(reading_s, live * forward_s) + DECODING_OVERHEAD_S
    read_anew = cached < num_rollouts
    prefilled = episode.turns * r / 2 if read_anew else r - g
    return Decoding(
        at_once=at_once,
        live=live,
        step_s=step_s,
        decoding_s=g * rounds * step_s,
        prefill_s=num_rollouts * prefilled * forward_s,
        read_anew=read_anew,
    )


def _local(config: RunConfig) -> EngineConfig:
    assert isinstance(config.engine, EngineConfig), "asked for the time of an engine that the formulas do not cover"
    return config.engine


def training_passes(config: RunConfig) -> int:
    """c: multiples of P operations for each row token of a step."""
    each = 4 + 2 * config.model.gradient_checkpointing
    old = 2 * (config.optim.num_epochs > 1 or config.optim.minibatches > 1)
    # In the reward, what the policy itself says is asked for beforehand, too.
    reference = 2 * config.loss.kl_in_loss + 4 * config.loss.kl_in_reward
    return config.optim.num_epochs * each + old + reference


def computed_time(
    config: RunConfig, shape: ModelShape, num_weights: int, gpu: Gpu, episode: AssumedRollout, *, gpus: int
) -> TimeEstimate:
    """Seconds of the configured run by the formulas at the head of this file."""
    assert gpu.flops, "asked for the time of a GPU whose speeds are not known"
    steps, b = config.optim.num_steps, weight_bytes(config.model, on_cpu=False)
    rollouts = config.rollout.num_rollouts / gpus
    held_out = config.eval.num_tasks * config.eval.samples_per_task / gpus
    step = decoding_of(config, shape, num_weights, gpu, episode, rollouts)
    evaluation = decoding_of(config, shape, num_weights, gpu, episode, held_out)
    trained_s = rollouts * episode.row_tokens * training_passes(config) * num_weights
    merged = publishes_merged(_local(config), on_cpu=False)
    published_bytes = num_weights * b if merged else 4 * num_lora_weights(config, shape)
    return TimeEstimate(
        start_s=2 * num_weights * b / DISK_BYTES_PER_S + START_S,
        rollouts_s=steps * step.total_s,
        training_s=steps * trained_s / (TRAINING_UTILISATION * gpu.flops),
        publish_s=steps * (published_bytes / DISK_BYTES_PER_S + PUBLISH_S),
        evaluation_s=num_evaluations(config) * evaluation.total_s,
        gpus=gpus,
        notes=_notes(config, gpu, episode, step, rollouts),
    )


def _notes(config: RunConfig, gpu: Gpu, episode: AssumedRollout, step: Decoding, rollouts: float) -> list[str]:
    assert gpu.flops and gpu.bandwidth
    notes = [
        f"data sheet: {gpu.memory_bytes / GIB:.1f} GiB, {gpu.flops / 1e12:g} dense bf16 TFLOP/s, "
        f"{gpu.bandwidth / 1e9:,.0f} GB/s",
        f"assumed rollout: {episode.tool_calls:.3g} tool calls, {episode.generated_tokens:,.0f} generated tokens, a "
        f"row of {episode.row_tokens:,.0f} tokens (--episode-calls, --episode-generated, --episode-row)",
        f"decoding: {step.at_once:.0f} of {rollouts:g} rollouts of a GPU at once, {step.live:.1f} on average; a step "
        f"of {step.step_s * 1e3:.1f} ms = max(weights and KV cache read at {BANDWIDTH_UTILISATION:g} of the bandwidth, "
        f"2P operations a sequence at {PREFILL_UTILISATION:g} of the peak) + {DECODING_OVERHEAD_S * 1e3:g} ms",
        f"prefill: 2P operations a token of prompt and tool results, at {PREFILL_UTILISATION:g} of the peak; "
        + (
            "the KV cache can't hold all open episodes, so each turn reads its conversation anew"
            if step.read_anew
            else "each is read once"
        ),
        f"training: {training_passes(config)}P operations a row token, at {TRAINING_UTILISATION:g} of the peak; every "
        "group is taken to vary (tied ones are left out and save their share)",
        f"publishing: the weights at {DISK_BYTES_PER_S / 1e9:g} GB/s and {PUBLISH_S:g} s; start: both copies of the "
        f"model at {DISK_BYTES_PER_S / 1e9:g} GB/s and {START_S:g} s",
        "not in it: what tools and graders take, attention's own operations, padding, traffic between GPUs",
    ]
    if config.warmstart is not None:
        notes.append("the warm start is not in it either")
    return notes


def _check(assumptions: Assumptions) -> None:
    if assumptions.gpus < 1:
        raise UserError(f"--gpus {assumptions.gpus}: expected at least 1")
    for option, value, least in (
        ("--episode-calls", assumptions.tool_calls, 0.0),
        ("--episode-generated", assumptions.generated_tokens, 1.0),
        ("--episode-row", assumptions.row_tokens, 1.0),
        ("--gpu-hour-price", assumptions.gpu_hour_price, 0.0),
    ):
        check_option(option, value, least=least)
