"""Merged weights of families whose checkpoints name their layers otherwise than transformers, or hold experts apart."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.support.families import adapted, class_of, random_adapter
from trainer.config import ModelConfig
from trainer.learning import adapter as lora


@pytest.mark.parametrize("name", ["gemma3-vision", "qwen2-moe", "glm4", "deepseek-v3"])
def test_an_exported_adapter_is_read_back_and_merged_into_all_of_the_base(name, tiny_model, tmp_path, one_thread):
    base, adapter = random_adapter(name, tmp_path, tiny_model)
    fits = adapted(name, "lora").model_copy(update={"r": 12})
    config = ModelConfig(name=str(base), dtype="float32", lora=fits)
    model = lora.load_model(base, config, device=torch.device("cpu"), seed=1)
    lora.load_adapter(model, adapter)
    token_ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        trained = model(input_ids=token_ids).logits
    lora.merged_model(model, torch.float32).save_pretrained(tmp_path / "merged")
    merged = class_of(AutoConfig.from_pretrained(tmp_path / "merged")).from_pretrained(tmp_path / "merged")
    untrained = class_of(AutoConfig.from_pretrained(base)).from_pretrained(base)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=token_ids).logits, trained, atol=2e-4, rtol=2e-4)
        assert (untrained(input_ids=token_ids).logits - trained).abs().max() > 0.01
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
