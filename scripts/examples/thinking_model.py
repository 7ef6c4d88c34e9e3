"""A small model that thinks before it acts: the embedded one under Qwen3's chat template, and episodes to imitate.

    python scripts/examples/thinking_model.py --write runs/thinking-model
    python scripts/train.py --config configs/thinking.yaml

The first writes `model/` and `conversations.jsonl`. The model's weights are the embedded default's. Four tokens that
it was never trained on are renamed to <think>, </think>, <tool_call> and </tool_call>, and take the embeddings of the
four rarest words, since LoRA trains none: with an embedding that stands out from nothing (the mean of those that
spell the marker was tried) the model goes on spelling the markers out. The template is the one that the package trl
ships for Qwen3, byte for byte. The conversations are the finance world's expert episodes, which reason before each
turn.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld
from trainer.config import load_config
from trainer.models.cache import DEFAULT_MODEL, resolve_model

RENAMED = {
    "<repo_name>": "<think>",
    "<reponame>": "</think>",
    "<file_sep>": "<tool_call>",
    "<filename>": "</tool_call>",
}
"""Tokens of SmolLM2's vocabulary that its instruct data does not use, and what they are called here."""
NUM_DEMONSTRATIONS = 160


def write_model(folder: Path) -> None:
    """A copy of the embedded model that has Qwen3's markers as tokens of their own, and its template."""
    source = resolve_model(DEFAULT_MODEL)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    _embed_as_rare_words(folder)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token.update(_renamed(token))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {RENAMED.get(text, text): token_id for text, token_id in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for token in settings.get("added_tokens_decoder", {}).values():
        token.update(_renamed(token))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(qwen3_template())


def qwen3_template() -> str:
    """Qwen3's chat template as the installed trl has it."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None, "trl is installed with the project"
    return (Path(spec.origin).parent / "chat_templates" / "qwen3.jinja").read_text()


def _renamed(token: dict[str, Any]) -> dict[str, Any]:
    """As Qwen3's own: tokens of their own, but text that a decoder shows."""
    name = RENAMED.get(token["content"])
    return {} if name is None else {"content": name, "special": False}


def _embed_as_rare_words(folder: Path) -> None:
    """The last words of the vocabulary give up theirs for the mean of all, so that each stands for one token only."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    embedding_VH = weights["model.embed_tokens.weight"]
    mean_H = embedding_VH.float().mean(0).to(embedding_VH.dtype)
    for rare, marker in zip(range(len(tokenizer) - len(RENAMED), len(tokenizer)), RENAMED, strict=True):
        embedding_VH[tokenizer.convert_tokens_to_ids(marker)] = embedding_VH[rare].clone()
        embedding_VH[rare] = mean_H
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def conversations(config: FinanceConfig, num: int) -> Iterator[dict[str, Any]]:
    """Expert episodes of training tasks, as rows of the supervised format with `reasoning_content`."""
    from trainer.tasks.expert import play_expert

    world = FinanceWorld(config.model_copy(update={"detour_thoughts": 0.0}))
    tasks = world.tasks("train")
    for seed in range(num):
        task = tasks[seed % len(tasks)]
        played = asyncio.run(play_expert(task, world.expert_episode(task, seed), world=world))
        yield {"messages": [m.to_openai() for m in played.messages], "tools": list(played.tools)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("configs/thinking.yaml"), help="its world is demonstrated")
    parser.add_argument("--write", type=Path, required=True, help="the folder that the config names")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if not isinstance(config.world, FinanceConfig):
        parser.error(f"--config {arguments.config}: its world is {config.world.type!r}; expected finance")
    arguments.write.mkdir(parents=True, exist_ok=True)
    write_model(arguments.write / "model")
    rows = conversations(config.world, NUM_DEMONSTRATIONS)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (arguments.write / "conversations.jsonl").write_text(lines, encoding="utf-8")
    print(f"{arguments.write}: model/ and conversations.jsonl ({NUM_DEMONSTRATIONS} rows)")


if __name__ == "__main__":
    main()
