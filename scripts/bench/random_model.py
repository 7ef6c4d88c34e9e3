"""Random weights with the default model's tokenizer: `python scripts/bench/random_model.py FOLDER --json FIGURES`.

Of the shape of Qwen2.5-1.5B, on the GPU in bf16; with --cpu of the smallest shape, in float32. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from envs.terminal import run
from trainer.models.cache import DEFAULT_MODEL, resolve_model

QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
"""As its config.json says."""
SMALLEST = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 49_280,
}
"""More words than the tokenizer has, as above."""


def write_random_model(folder: Path, *, on_cpu: bool) -> int:
    """A checkpoint that transformers and vLLM load; its log-probabilities vary. Returns the number of weights."""
    shape = SMALLEST if on_cpu else QWEN_1_5B
    config = Qwen2Config(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.8 / shape["hidden_size"] ** 0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device("cpu" if on_cpu else "cuda"):
        model = Qwen2ForCausalLM(config).to(torch.float32 if on_cpu else torch.bfloat16)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for file in resolve_model(DEFAULT_MODEL).iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    return sum(p.numel() for p in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the weights go, in place of what is there")
    parser.add_argument("--cpu", action="store_true", help="the smallest shape")
    parser.add_argument("--json", type=Path, required=True, help="where their number goes")
    given = parser.parse_args()
    given.json.write_text(json.dumps({"weights": float(write_random_model(given.folder, on_cpu=given.cpu))}))
    return 0


if __name__ == "__main__":
    run(main)
