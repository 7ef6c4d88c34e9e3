"""The machine that a run is for: the one at hand, or a GPU by its data sheet."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from envs.errors import UserError

GIB = 2**30
_MOST_YOUNG = 5_000
"""Objects more than were let go since Python last looked for cycles among the youngest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it was measured."""

    on_cpu: bool
    memory_bytes: float
    """Of one GPU, or of the machine."""


def has_gpu() -> bool:
    """Whether this machine has one that torch can use. Loads torch, which takes seconds."""
    import torch

    return torch.cuda.is_available()


def release_memory() -> None:
    """Give back what this process has reserved on the GPU and no longer holds, before an engine takes its share."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def loaded_set_aside() -> Iterator[None]:
    """What is loaded by now stands out of Python's collections of cycles, each of which would look at all there is.

    Torch, vLLM and a tokenizer are half a second of it, in which no episode goes on. Young objects are looked at once
    there are thousands, for those of the episodes in flight are there to stay (`scripts/bench/tool_calls.py`); an
    update leaves no cycles whose tensors would wait for it.
    """
    youngest, *older = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(max(youngest, _MOST_YOUNG) if youngest else 0, *older)
    try:
        yield
    finally:
        gc.set_threshold(youngest, *older)
        gc.unfreeze()


def gpu_memory() -> tuple[int, int] | None:
    """Bytes in use and bytes in all of this process's GPU, by whomever they are used; None where it has not begun to
    use one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free, total


def memory_metrics() -> dict[str, float]:
    """Of this process's GPU, by their keys in the metrics; empty without one."""
    memory = gpu_memory()
    if memory is None:
        return {}
    peak = sys.modules["torch"].cuda.max_memory_reserved()
    return {"memory/gpu_used_gib": memory[0] / GIB, "memory/trainer_peak_gib": peak / GIB}


def this_machine() -> Machine:
    import psutil
    import torch

    if has_gpu():
        return Machine(on_cpu=False, memory_bytes=float(torch.cuda.get_device_properties(0).total_memory))
    return Machine(on_cpu=True, memory_bytes=float(psutil.virtual_memory().total))


def hardware(num_processes: int) -> str:
    """What a run of so many processes, a card each, runs on: `8 × NVIDIA H200, x86_64, 192 CPU cores`."""
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    return f"{num_processes} × {torch.cuda.get_device_name(0)}, {machine}" if torch.cuda.is_available() else machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as its vendor's data sheet describes it."""

    name: str
    memory_bytes: float
    flops: float | None = None
    """Dense bfloat16 operations a second; None: time is not estimated."""
    bandwidth: float | None = None
    """Of its memory, bytes a second."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H200", memory_bytes=141e9, flops=989e12, bandwidth=4.8e12),
        Gpu(name="H100", memory_bytes=80e9, flops=989e12, bandwidth=3.35e12),
        Gpu(name="A100", memory_bytes=80e9, flops=312e12, bandwidth=2.039e12),
        Gpu(name="L40S", memory_bytes=48e9, flops=362e12, bandwidth=0.864e12),
    )
}
"""SXM modules (the L40S is a card). Gigabytes are taken as 10⁹ bytes, the least that the data sheets can mean."""


def find_gpu(
    name: str | None, *, memory_gib: float | None, tflops: float | None, bandwidth_gb_per_s: float | None
) -> Gpu | None:
    """A GPU by name, numbers given beside it in place of the data sheet's; None when nothing is given."""
    for option, value in (
        ("--gpu-memory-gib", memory_gib),
        ("--gpu-tflops", tflops),
        ("--gpu-bandwidth", bandwidth_gb_per_s),
    ):
        check_option(option, value)
    gpu = None
    if name is not None:
        gpu = GPUS.get(name.upper())
        if gpu is None:
            raise UserError(
                f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; give --gpu-memory-gib, --gpu-tflops and "
                "--gpu-bandwidth instead"
            )
    elif memory_gib is not None:
        gpu = Gpu(name="GPU", memory_bytes=memory_gib * GIB)
    elif tflops is not None or bandwidth_gb_per_s is not None:
        raise UserError("--gpu-memory-gib: required beside --gpu-tflops and --gpu-bandwidth, or a --gpu by name")
    if gpu is None:
        return None
    return replace(
        gpu,
        memory_bytes=gpu.memory_bytes if memory_gib is None else memory_gib * GIB,
        flops=gpu.flops if tflops is None else tflops * 1e12,
        bandwidth=gpu.bandwidth if bandwidth_gb_per_s is None else bandwidth_gb_per_s * 1e9,
    )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def check_option(option: str, value: float | None, *, least: float | None = None) -> None:
    """Raise `UserError` where an option's number is NaN, infinite, or under the `least`; without that, not above 0."""
    if value is None or (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        return
    expected = "a number above 0" if least is None else f"a number of at least {least:g}"
    raise UserError(f"{option} {value:g}: expected {expected}")
