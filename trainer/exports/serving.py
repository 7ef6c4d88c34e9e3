"""A policy of a run behind vLLM, on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from envs.errors import UserError
from envs.terminal import say
from trainer.config import EngineConfig, cpu_cache_gib
from trainer.exports.artefact import servable
from trainer.exports.commands import adapter_command, server
from trainer.exports.trained import Trained
from trainer.models.machines import has_gpu
from trainer.runs.about import serve_command_of


def serve(trained: Trained, more: Sequence[str]) -> NoReturn:
    """Become the server; `more` are arguments of vLLM's. Raises `UserError`."""
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


def serve_words(trained: Trained) -> list[str]:
    """The command that serves a policy of the run on this machine. Raises `UserError`."""
    return _noted(trained) if trained.is_final else _of_step(trained)


def _noted(trained: Trained) -> list[str]:
    """What the run noted at its end, which may have been on another machine."""
    words = shlex.split(serve_command_of(trained.about, trained.adapter))
    if "--dtype" not in words:
        raise UserError(f"{trained.run / 'run.json'}: notes no serve_command; the command that made the run does anew")
    return [*server(trained.model_path), *words[words.index("--dtype") :]]


def _of_step(trained: Trained) -> list[str]:
    from trainer.prepare import build_chat

    folder = servable(trained)
    template = folder / "chat_template.jinja"
    arguments = build_chat(trained.config, trained.model_path).serve_arguments(template if template.exists() else None)
    rank = trained.config.model.lora.r
    return adapter_command(trained.model_path, folder, dtype=trained.dtype, rank=rank, chat=arguments)
