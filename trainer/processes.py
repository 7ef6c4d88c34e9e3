"""The processes of one run: whether they were started as asked, and what they tell each other.

Objects and waiting go over a gloo group of their own. NCCL carries gradients only: it gives a process up that comes ten
minutes late, as one does whose episodes are long, and who waits in it hears no signal.

Imports torch when it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from envs.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S")
T = TypeVar("T")

TIMEOUT = timedelta(days=7)
"""How long one process waits for the slowest. One that has died is noticed at once: its connections are closed."""

_POLL_S = 0.02
_ASKED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where torchrun, MPI and Slurm say how many processes they start."""

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def start(**options: Any) -> Accelerator:
    """Join the run's other processes; `options` are Accelerator's. Writes nothing.

    Raises `UserError` for what accelerate was told to do and would not do here, and where the launcher was asked for
    other processes than accelerate sees: each would take itself for the only one.
    *Not covered:* launchers that tell the processes nothing of each other, such as a loop in a shell.
    """
    _check_options(os.environ)
    from accelerate import Accelerator

    accelerator = Accelerator(**options)
    asked, where = _asked_for(os.environ)
    if asked not in (0, accelerator.num_processes):
        on_cpu = accelerator.device.type == "cpu"
        command = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node" if on_cpu else "accelerate launch --num_processes"
        raise UserError(
            f"the launcher was asked for {asked} processes ({where}), but accelerate sees {accelerator.num_processes}: "
            f"each would take itself for the whole run; start them with `{command} {asked} scripts/train.py ...`"
        )
    return accelerator


def _check_options(environment: Mapping[str, str]) -> None:
    for name, what in _SHARDING.items():
        if environment.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate was told to use {what} ({name}): every process holds the whole base model here, and it "
                "would not be sharded; start with `accelerate launch --num_processes N` and a config file without it"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no"):
        raise UserError(
            f"accelerate was told to use mixed precision {precision}, which has no effect here: model.dtype is the "
            "base's, and the adapter is float32; start with `accelerate launch --mixed_precision no`"
        )


def _asked_for(environment: Mapping[str, str]) -> tuple[int, str]:
    """How many processes the launcher was asked for, and who says so; 0 where nobody does."""
    told = {name: int(environment[name]) for name in _ASKED if environment.get(name, "").isdigit()}
    if told:
        name = max(told, key=told.__getitem__)
        return told[name], name
    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents():
            if (asked := _accelerate_asked(ancestor.cmdline())) > 1:
                # It starts several processes on GPUs only, and one in their place without a word.
                return asked, "accelerate launch --num_processes"
    return 0, ""


def _accelerate_asked(command: Sequence[str]) -> int:
    """The number of processes in the command line of an `accelerate launch`; 0 for another command."""
    # Behind the interpreter and its -m.
    names = [Path(word).name for word in command[:4]]
    if "accelerate" in names and "launch" in names:
        own = command[names.index("launch") + 1 :]
    elif "accelerate-launch" in names or "accelerate.commands.launch" in names:
        own = command[next(i for i, n in enumerate(names) if n.startswith("accelerate")) + 1 :]
    else:
        return 0
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            arguments = launch_command_parser().parse_args(own)
    except SystemExit:  # another version's
        return 0
    if arguments.num_processes is not None:
        return int(arguments.num_processes)
    if arguments.config_file is None and (arguments.cpu or not Path(default_config_file).is_file()):
        return 0
    # A config for SageMaker has no such number.
    return int(getattr(load_config_from_file(arguments.config_file), "num_processes", None) or 0)


# ---- what they tell each other


def gather(mine: Sequence[T]) -> list[T]:
    """Every process's objects, in the order of processes, on each of them."""
    if not _are_several():
        return list(mine)
    import torch.distributed as dist

    wait_for_all()
    everyone: list[Sequence[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine, group=_control_group())
    return [x for theirs in everyone for x in theirs]


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main process, where alone it is called; its `UserError` is every process's."""
    if not _are_several():
        return make()
    import torch.distributed as dist

    (value,) = _gather_made(lambda: [make()] if dist.get_rank() == 0 else [])
    return value


def share_out(items: Sequence[S], do: Callable[[Sequence[S]], Sequence[T]]) -> list[T]:
    """What `do` makes of each item, in their order, on every process: each does its share, a result an item.

    A `UserError` of one is every process's.
    """
    if not _are_several():
        return list(do(items))
    import torch.distributed as dist

    size = dist.get_world_size()
    shares = _gather_made(lambda: [do(items[dist.get_rank() :: size])])
    return [shares[i % size][i // size] for i in range(len(items))]


def _gather_made(make: Callable[[], Sequence[T]]) -> list[T]:
    """What `make` returns on each process, as `gather`; the first `UserError` is raised on all."""
    made: Sequence[T] = []
    failed: list[UserError] = []
    try:
        made = make()
    except UserError as e:
        failed = [e]
    if errors := gather(failed):
        raise errors[0]
    return gather(made)


def wait_for_all() -> None:
    """Return when every process has come here. Ctrl-C and SIGTERM are heard while it waits."""
    if not _are_several():
        return
    import torch.distributed as dist

    work = dist.barrier(group=_control_group(), async_op=True)
    assert work is not None
    # A blocking wait returns to Python, which handles signals, only with the last process.
    while not work.is_completed():
        time.sleep(_POLL_S)
    work.wait()


def _are_several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _control_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=TIMEOUT)
