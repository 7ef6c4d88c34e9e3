"""What vLLM is started with: its arguments, the environment of its processes, and what of it a machine can't have.

Imports vllm when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from trainer.config import EngineConfig, ModelConfig, RunConfig, cpu_cache_gib, publishes_merged
from trainer.models.machines import GIB

if TYPE_CHECKING:
    from trainer.models.family import Family

_VLLM_QUANTIZATION = {"fp8": "fp8_per_block"}
"""vLLM's names for quantising 16-bit weights while they are loaded, here with one scale for 128 × 128 of them. Its own
`fp8` means a checkpoint that holds fp8 weights; of others vLLM 0.31 refuses it."""

_SHARED = Path("/dev/shm")
_SHARED_MIB = 240
"""The larger of vLLM's two rings of messages between its engine and its worker, which a GPU's engine does without."""

_ANY_SHARE = 0.01

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"

_RELEASES_THE_CACHE = "release_kv_cache_memory"
"""Of vLLM's AsyncLLM since 0.31: the cache's memory goes and the weights stay where they are."""


def seeds_requests(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """Whether every request carries a seed of its own."""
    return not on_cpu if engine.seeded_requests == "auto" else engine.seeded_requests


def shared_memory_is_short() -> bool:
    """Whether this machine's shared memory has no room for what vLLM's processes want of it on a CPU."""
    return _SHARED.is_dir() and shutil.disk_usage(_SHARED).free < _SHARED_MIB << 20


def check_engine(engine: EngineConfig, *, on_cpu: bool) -> None:
    """What depends on the machine and not on the config alone. Raises `UserError`."""
    if on_cpu and shared_memory_is_short():
        raise UserError(
            f"{_SHARED}: {shutil.disk_usage(_SHARED).free >> 20} MiB free, and on a CPU vLLM's processes talk through "
            f"{_SHARED_MIB} MiB of it; give the container more (docker run --shm-size=1g)"
        )
    if engine.sleep != "none" and on_cpu:
        raise UserError(
            f"engine.sleep: {engine.sleep} gives a GPU's memory to the trainer, and this machine has none; leave it out"
        )


def check_vllm(engine: EngineConfig) -> None:
    """What depends on the vLLM that is installed. Raises `UserError`."""
    if engine.sleep == "kv":
        import vllm
        from vllm.v1.engine.async_llm import AsyncLLM

        if not hasattr(AsyncLLM, _RELEASES_THE_CACHE):
            raise UserError(
                f"engine.sleep: kv needs vLLM 0.31 or newer, and vLLM {vllm.__version__} is installed; set it to "
                "weights"
            )


def check_cache(config: RunConfig, engine: EngineConfig, folder: Path) -> None:
    """Whether the cache on a CPU can be had and holds one episode, or vLLM would refuse to start. Raises `UserError`.

    `folder` holds the model's config.json.
    """
    import psutil

    from trainer.models.memory import kv_token_bytes, read_shape

    gib = cpu_cache_gib(engine)
    given, memory = gib * GIB, psutil.virtual_memory().total
    if given > memory:
        raise UserError(f"engine.kv_cache_gib: {gib:g} GiB are more than this machine has")
    shape = read_shape(folder)
    of_token = 0 if shape is None else kv_token_bytes(config, shape, on_cpu=True)
    if (needed := of_token * config.rollout.max_episode_tokens) > given:
        raise UserError(
            f"engine.kv_cache_gib: {gib:g} GiB hold less than one episode of "
            f"rollout.max_episode_tokens = {config.rollout.max_episode_tokens:,}, which takes {needed / GIB:.2f} GiB"
        )


def engine_arguments(
    model_path: Path,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    max_model_len: int,
    device: str,
    seed: int = 0,
    num_versions: int = 1,
) -> dict[str, Any]:
    """What vLLM's engine is started with, as its `AsyncEngineArgs` name it."""
    from vllm.config import StructuredOutputsConfig

    from trainer.models.family import read_family, weights_dtype

    merged = publishes_merged(engine, on_cpu=device == "cpu")
    family = read_family(model_path, model.lora)
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": weights_dtype(model, on_cpu=device == "cpu"),
        "quantization": _VLLM_QUANTIZATION[engine.quantization] if engine.quantization else None,
        "max_model_len": max_model_len,
        "seed": seed,
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enforce_eager": engine.enforce_eager,
        "enable_sleep_mode": engine.sleep != "none",
        "enable_prefix_caching": True,
        "enable_lora": not merged,
        "max_lora_rank": lora_rank_bucket(model.lora.r),
        "max_loras": num_versions,
        # Log-probabilities of the distribution that was sampled from: the trainer divides by the same temperature.
        "logprobs_mode": "processed_logprobs",
        # The model's own sampling defaults must not change the policy that is trained.
        "generation_config": "vllm",
        # The trainer masks by xgrammar, too. A grammar begins where the reasoning ends, as in `vllm serve`.
        "structured_outputs_config": StructuredOutputsConfig(
            backend="xgrammar", reasoning_parser=model.reasoning_parser or ""
        ),
        "disable_log_stats": True,
    }
    if family.is_wrapper:
        arguments["language_model_only"] = True
    if not merged and (family.has_experts or num_versions > 1):
        # Or vLLM gives every expert buffers for an adapter, which leaves the experts alone. And it gives the head an
        # adapter's place, whose kernels fail on prompt log-probabilities, the proof's, beside other requests.
        arguments["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in family.targets})
    if device != "cpu":
        # As a server has it: agents read more than they write. An AsyncLLM made in process would get 2,048.
        arguments["max_num_batched_tokens"] = max(8192, engine.max_num_seqs)
        if engine.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = round(engine.kv_cache_gib * GIB)
            # All that it is used for then is to refuse a GPU on which less is free.
            arguments["gpu_memory_utilization"] = _ANY_SHARE
    else:
        arguments |= _on_a_cpu(family, max_model_len)
    return arguments


def _on_a_cpu(family: Family, max_model_len: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        # A seeded request that is prefilled in chunks crashes vLLM 0.31 there ("CPU Generator does not use offset"), so
        # every prompt is prefilled whole.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
        # The default there, 128, is longer than most turns: nothing of a conversation would be found in the cache.
        "block_size": 32,
        # The state of recurrent layers is cached at the ends of chunks.
        "enable_prefix_caching": not family.is_recurrent,
    }
    if family.is_latent:
        # vLLM 0.31's rotary kernel for a CPU takes every head of latent attention's queries for a token: it turns it by
        # another's position, and reads and writes past the ends. vLLM's own code in torch is right.
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def lora_rank_bucket(r: int) -> int:
    """vLLM takes certain maximal ranks only; the smallest that holds `r`."""
    return next(b for b in (1, 8, 16, 32, 64, 128, 256, 320, 512) if b >= r)


@contextlib.contextmanager
def engine_environment(engine: EngineConfig, *, device: str, local_rank: int) -> Iterator[None]:
    """The environment that vLLM's processes inherit; put back afterwards.

    The launcher's variables (RANK, WORLD_SIZE, ...) would make vLLM join the trainer's process group, so they are
    hidden; each rank's engine sees its own GPU only, or its share of the cores.
    """
    changes: dict[str, str | None] = {
        name: None
        for name in os.environ
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    changes["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    changes["VLLM_NO_USAGE_STATS"] = "1"
    if device == "cpu":
        changes["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cpu_cache_gib(engine))))
        # All cores that this process may use: by default vLLM leaves one idle, half of a small machine. Processes that
        # a launcher started together share them out, or their engines would wait for each other's threads.
        cores = sorted(os.sched_getaffinity(0))
        together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if together <= len(cores):
            cores = cores[local_rank::together]
        changes["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        changes["CUDA_VISIBLE_DEVICES"] = visible[local_rank] if visible != [""] else str(local_rank)
        # vLLM forks where it believes CUDA untouched, and does not see that whoever asks for a card touches it: the
        # fork then fails ("Cannot re-initialize CUDA in forked subprocess").
        changes[_START_METHOD] = os.environ.get(_START_METHOD, "spawn")
    former = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(former)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
