"""A policy of a run behind vLLM, on this machine."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from envs.clients.ports import check_free
from envs.errors import UserError
from envs.terminal import say
from trainer.config import EngineConfig, cpu_cache_gib
from trainer.exports.artefact import servable
from trainer.exports.commands import adapter_command, chat_arguments
from trainer.exports.trained import Trained, chat_of
from trainer.models.machines import has_gpu

_PORT = 8000
"""vLLM's own."""


def serve(trained: Trained, more: Sequence[str]) -> NoReturn:
    """Become the server; `more` are arguments of vLLM's, as `check_address` has looked at them. Raises `UserError`."""
    words = [*serve_words(trained), *more]
    engine = trained.config.engine
    if not has_gpu():
        # Without it vLLM asks for 92 % of the machine's memory, and does not start where others have some of it.
        cache_gib = cpu_cache_gib(engine) if isinstance(engine, EngineConfig) else 2.0
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(cache_gib))))
    say(shlex.join(words), file=sys.stderr)
    try:
        os.execvp(words[0], words)
    except OSError as e:
        raise UserError(f"{words[0]}: {e.strerror or e}; is vLLM installed here?") from e


def check_address(more: Sequence[str]) -> None:
    """Raise `UserError` where vLLM could not listen at the host and port that its arguments, or its defaults, name.

    *Not covered*: what else it may open; ports in a file that it is given (`--config`); arguments that it will refuse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int)
    # Under these it listens elsewhere, or nowhere.
    for name in ("--uds", "--config"):
        parser.add_argument(name)
    parser.add_argument("--headless", action="store_true")
    try:
        asked, _ = parser.parse_known_args(list(more))
    except argparse.ArgumentError:
        return
    if asked.uds is not None or asked.headless or (asked.config is not None and asked.port is None):
        return
    # By name it takes IPv4 only.
    family = socket.AF_INET6 if ":" in asked.host else socket.AF_INET
    check_free(asked.host or "0.0.0.0", _PORT if asked.port is None else asked.port, "--port", family=family)


def serve_words(trained: Trained) -> list[str]:
    """The command that serves a policy of the run on this machine, made of its config. Raises `UserError`.

    What run.json notes is not run: whoever can write a run folder could have it start anything.
    """
    folder = servable(trained)
    template = folder / "chat_template.jinja"
    chat = chat_of(trained)
    arguments = chat_arguments(chat, template if template.exists() else None, trained.model_path, trained.config)
    rank = trained.config.model.lora.r
    return adapter_command(trained.model_path, folder, dtype=trained.dtype, rank=rank, chat=arguments)
