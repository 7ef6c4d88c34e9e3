"""GGUF by llama.cpp itself, where that is: LLAMA_CPP names its source, see docs/exports.md."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from envs.errors import UserError
from trainer.exports.gguf import Converter

needs_source = pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no source of llama.cpp")
needs_library = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python")
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid."
MOST = {None: 0.02, "q8_0": 0.05, "q4_k_m": 0.4}
"""Mean difference of log-probabilities, nats a token, from the bf16 weights in transformers."""


def test_without_the_source_it_is_told_what_is_needed(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match=r"--form gguf: needs llama.cpp's source.*docs/exports.md"):
        Converter.found(None, None)


def test_a_variable_that_names_no_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match=rf"LLAMA_CPP {tmp_path}: holds no convert_hf_to_gguf.py"):
        Converter.found(None, None)


@needs_library
def test_an_unknown_quantisation_is_told_with_those_that_there_are(tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").touch()
    with pytest.raises(UserError, match=r"--quantise q4_k_n: llama.cpp knows .*q4_k_m.*; did you mean 'q4_k_"):
        Converter.found(tmp_path, "q4_k_n")
    assert Converter.found(tmp_path, "Q4_K_M").quantise == "q4_k_m"


def test_a_converter_that_fails_is_told_in_its_last_line(tmp_path):
    """Any program in its place does: what it says is passed on."""
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('a tokenizer that is not known')\n")
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py failed: a tokenizer that is not known$"):
        Converter.found(tmp_path, "q8_0").convert(tmp_path, tmp_path / "model.gguf", name="x", dtype="bfloat16")


@needs_source
@needs_library
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quantise", [None, "q8_0", "q4_k_m"])
def test_the_file_says_in_llama_cpp_what_the_weights_say_in_transformers(smollm2, tmp_path, quantise, capfd):
    import llama_cpp
    from transformers import AutoTokenizer

    file = tmp_path / "model.gguf"
    Converter.found(None, quantise).convert(smollm2, file, name="agent", dtype="bfloat16")
    out = capfd.readouterr()
    assert not out.out and not out.err, "nothing on the terminal"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    token_ids = AutoTokenizer.from_pretrained(smollm2).encode(TEXT, add_special_tokens=False)
    model = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False)
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == token_ids
    assert model.metadata["general.name"] == "agent"
    assert model.metadata["tokenizer.chat_template"] == Path(smollm2 / "chat_template.jinja").read_text()
    model.eval(token_ids)
    own_TV = torch.tensor(np.array(model.scores[: len(token_ids)])).log_softmax(-1)
    with torch.no_grad():
        theirs_TV = AutoModelForCausalLM.from_pretrained(smollm2)(torch.tensor([token_ids])).logits[0].float()
    taken = torch.tensor(token_ids[1:])
    own, theirs = (x[torch.arange(len(taken)), taken] for x in (own_TV[:-1], theirs_TV.log_softmax(-1)[:-1]))
    assert (own - theirs).abs().mean() < MOST[quantise]
