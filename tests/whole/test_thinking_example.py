"""The example that thinks: the embedded model under the template that trl ships for Qwen3, and what it imitates."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.finance.config import FinanceConfig
from envs.types import Message, ToolCall
from tests.support import ROOT
from trainer.config import load_config
from trainer.learning.warmstart import demonstration_ledgers
from trainer.tasks.load import load_demonstrations
from trainer.templates.chat import Chat
from trainer.types import Demonstration

SCRIPT = ROOT / "scripts/examples/thinking_model.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("thinking_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinking") / "model"
    example.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat(model: Path) -> Chat:
    return Chat(model, tool_parser="hermes", reasoning_parser="qwen3")


@pytest.fixture(scope="module")
def rows(example: Any) -> list[dict[str, Any]]:
    config = FinanceConfig(num_companies=8, num_train_tasks=4, num_eval_tasks=2, question_mix={"value": 1})
    return list(example.conversations(config, 4))


def test_its_markers_are_tokens_of_their_own_with_the_embeddings_of_rare_words(model: Path, smollm2: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    before_VH, after_VH = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (smollm2, model))
    for rare, marker in enumerate(("<think>", "</think>", "<tool_call>", "</tool_call>"), start=len(tokenizer) - 4):
        (token_id,) = tokenizer.encode(marker, add_special_tokens=False)
        assert tokenizer.decode([token_id], skip_special_tokens=True) == marker
        assert (after_VH[token_id] == before_VH[rare]).all()
        assert (after_VH[rare] != before_VH[rare]).any()


def test_every_turn_of_a_demonstration_thinks_and_is_trained_on_as_qwen3_renders_it(
    chat: Chat, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(ROOT / "configs/thinking.yaml", [f"warmstart.data={path}"])
    for demonstration in load_demonstrations(config):
        ledger = demonstration_ledgers(demonstration, chat=chat)[-1]
        turns = [chat.decode(ledger.prompt_ids[start:end]) for start, end, _ in ledger.to_json()["sampled"]]
        assert len(turns) == sum(m.role == "assistant" for m in demonstration.messages)
        assert all(turn.startswith("<think>\n") and turn.count("</think>\n\n") == 1 for turn in turns)
        whole = chat.open([*demonstration.messages, replace(demonstration.messages[1], content="And now?")])
        # A further question makes Qwen3's template drop the reasoning before it: the ledger holds what was written.
        assert "<think>" in chat.decode(ledger.prompt_ids)
        assert "<think>" not in chat.decode(whole)


def test_an_answer_after_its_reasoning_is_the_answer(chat: Chat) -> None:
    tools = [{"type": "function", "function": {"name": "search", "description": "Find.", "parameters": {}}}]
    text = "<think>\nI have read what I need. The value is 42.\n</think>\n\n42 million<|im_end|>"
    turn = chat.parse(chat._encode(text), tools)
    assert not turn.malformed
    assert turn.message.content.strip() == "42 million"
    assert turn.message.reasoning.strip() == "I have read what I need. The value is 42."
    assert turn.num_reasoning_tokens > 5


def test_a_demonstration_whose_earlier_turns_the_template_rewrites_is_several_rows(chat: Chat) -> None:
    question = Message(role="user", content="How much?")
    call = ToolCall(call_id="call00000", name="search", arguments='{"query": "Acme"}')
    result = Message(role="tool", content="42", call_id="call00000", name="search")
    thinking = Message(role="assistant", content="43", reasoning="It says 43 elsewhere.")
    messages = (
        question,
        # Finished turns begin with an empty think block, which the template takes out again when the turn has passed.
        Message(role="assistant", tool_calls=(call,)),
        result,
        Message(role="assistant", content="42"),
        replace(question, content="Are you sure?"),
        thinking,
    )
    tools = ({"type": "function", "function": {"name": "search", "description": "Find.", "parameters": {}}},)
    ledgers = demonstration_ledgers(Demonstration(messages=messages, tools=tools), chat=chat)
    written = [
        chat.decode(ledger.prompt_ids[start:end]) for ledger in ledgers for start, end, _ in ledger.to_json()["sampled"]
    ]
    assert len(ledgers) == 3
    assert [turn.partition("</think>\n\n")[2][:11] for turn in written] == [
        "<tool_call>",
        "42<|im_end|>"[:11],
        "43<|im_end|>"[:11],
    ]
    assert chat.decode(ledgers[-1].prompt_ids).startswith(chat.decode(chat.open(messages[:5], tools)))
