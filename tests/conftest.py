"""Fixtures shared by all tests."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded default model, converted on first use (some 10 s) and cached for later runs."""
    from trainer.model_cache import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two narrow layers in float32, under the default model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(AutoTokenizer.from_pretrained(smollm2)),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            # Large enough for log-probabilities to vary.
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for file in smollm2.iterdir():
        if file.name.startswith("tokenizer") or file.name in ("generation_config.json", "special_tokens_map.json"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def one_thread():
    """Torch on one thread: tests of tiny models are faster so, and exact."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
