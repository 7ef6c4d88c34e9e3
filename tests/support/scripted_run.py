"""A run with the scripted engine: `-m tests.support.scripted_run CONFIG` trains, also as one of several processes.

`--serve MODEL` loads everything first, then forks as many processes as each line of its standard input asks for, `1
CONFIG`; it answers with the first one's id and, when they have ended, with the exit status: 2 after a `UserError`,
whose text then lies beside the config in a file `.error`. A run so starts in a moment instead of the twenty seconds
that imports take, and is a process of its own, which can be killed.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path

import torch

from envs.errors import UserError
from envs.finance.world import FinanceWorld
from tests.support.scripted_engine import engine_starter, finance_script
from tests.support.servers import free_port
from trainer.config import load_config
from trainer.train import train


def run(path: Path) -> None:
    torch.set_num_threads(1)
    config = load_config(path)
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world))))


def serve() -> None:
    # What a run imports on its way.
    import accelerate
    import peft  # noqa: F401
    import tensorboard  # noqa: F401
    import transformers  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    from trainer import session  # noqa: F401
    from trainer.engines import publish  # noqa: F401
    from trainer.exports import at_end  # noqa: F401
    from trainer.learning import checkpoint  # noqa: F401
    from trainer.reports import run_report  # noqa: F401
    from trainer.templates.chat import Chat

    Chat(Path(sys.argv[2]))
    assert not accelerate.PartialState._shared_state, "every run sets up accelerate itself"
    # Or each run's first collection would look at all that was loaded here.
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        count, _, path = line.strip().partition(" ")
        pids = [fork(Path(path), place) for place in places(int(count))]
        print(pids[0], flush=True)
        print(max((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), key=abs), flush=True)


def places(count: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a run in its environment; nothing where there is but one."""
    if count == 1:
        return [{}]
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    everyone |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def fork(config: Path, environment: dict[str, str]) -> int:
    """The id of the process that does the run."""
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    code = 1
    try:
        run(config)
        code = 0
    except UserError as e:
        config.with_suffix(".error").write_text(str(e))
        code = 2
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        run(Path(sys.argv[1]))
