"""The prompts of the user's rows are rendered before any model is loaded; the template of a config is one that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from envs.types import Message
from tests.support.configs import scripted_config
from tests.support.template_families import FAMILIES, family_chat, play, prompts_differ, template_files
from tests.support.template_play import model_with
from trainer.config import RunConfig
from trainer.prepare import prepare
from trainer.templates.chat import Chat

NO_SYSTEM = """
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- set asks = m.role in ('user', 'tool') -%}
{%- if asks != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
<|im_start|>{{ m.role }}
{% if loop.first and tools %}{{ tools | tojson }}
{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": """
NO_SYSTEM += """{{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def job_of(tiny_model: Path, tmp_path: Path, rows: list[dict[str, Any]], **rollout: Any) -> RunConfig:
    path, template = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(NO_SYSTEM)
    config = scripted_config(tmp_path / "run", tiny_model, rollout=rollout)
    config["model"]["chat_template"] = str(template)  # type: ignore[index]
    return RunConfig.model_validate(config | {"data": {"train": str(path), "eval": str(path)}})


USER = {"role": "user", "content": "How much?"}
GOOD = {"task_id": "good", "messages": [USER], "answer": "1"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, USER], "System role not supported"),
        ([USER, USER], "roles must alternate"),
    ],
)
def test_a_row_that_the_template_refuses_is_named_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path, messages: list[dict[str, str]], reason: str
) -> None:
    config = job_of(tiny_model, tmp_path, [GOOD, {"task_id": "odd", "messages": messages, "answer": "1"}])
    with pytest.raises(UserError, match=rf"line 2: task 'odd': model\.chat_template: it refuses .*{reason}"):
        prepare(config)


def test_a_prompt_that_leaves_no_room_for_a_turn_is_named(tiny_model: Path, tmp_path: Path) -> None:
    long = {"task_id": "long", "messages": [{"role": "user", "content": "How much? " * 400}], "answer": "1"}
    with pytest.raises(
        UserError, match=r"line 2: rollout\.max_episode_tokens: the prompt of task 'long' alone has [\d,]+ tok"
    ):
        prepare(job_of(tiny_model, tmp_path, [GOOD, long]))


@pytest.mark.parametrize("name", ["qwen3", "gemma", "qwen3_5_think"])
def test_trls_training_template_keeps_earlier_turns_and_is_exported(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Gemma's knows no tools: it is wrapped as the model's own is."""
    chat = family_chat(smollm2, tmp_path / "model", name, chat_template="training")
    own = template_files()[name].with_name(f"{name}_training.jinja").read_text()
    saved = chat.save_template(tmp_path)
    assert saved is not None
    assert saved.read_text().endswith(own)
    for episode in ("reasoning", "second user turn"):
        rollout = play(chat, FAMILIES[name], episode)
        assert prompts_differ(chat, rollout) == ""
        assert len(rollout.ledgers) == 1


def test_a_template_kwarg_that_the_template_does_not_read_is_refused(smollm2: Path, tmp_path: Path) -> None:
    kwargs = {"enable_thinkin": False}
    with pytest.raises(UserError, match=r"enable_thinkin: the chat template does not .*mean 'enable_thinking'\?"):
        family_chat(smollm2, tmp_path / "misspelt", "qwen3", template_kwargs=kwargs)
    family_chat(smollm2, tmp_path / "right", "qwen3", template_kwargs={"enable_thinking": False})


def test_a_template_of_which_trl_has_no_training_template_is_refused(smollm2: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.chat_template: training: trl knows no training template"):
        Chat(smollm2, chat_template="training")


def test_a_model_without_a_template_gets_chatml_where_its_tokenizer_has_the_tokens(
    smollm2: Path, tmp_path: Path
) -> None:
    assert Chat(model_with(smollm2, tmp_path / "chatml", None)).uses_fallback
    bare = model_with(smollm2, tmp_path / "bare", None, stops=["</s>"], eos_token="</s>")
    path = bare / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|start|>"))
    config = bare / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_start|>", "<|start|>"))
    with pytest.raises(
        UserError, match=r"the model has no chat template, and its tokenizer lacks the tokens <\|im_start"
    ):
        Chat(bare)


def test_a_wrapped_template_holds_tools_calls_and_results_in_the_models_own_turns(
    smollm2: Path, tmp_path: Path
) -> None:
    """Gemma has no system role: system and tools stand in the first user message, results are one user message."""
    chat = family_chat(smollm2, tmp_path / "gemma", "gemma")
    rollout = play(chat, FAMILIES["gemma"], "two calls")
    text = chat.decode(rollout.ledgers[0].prompt_ids)
    assert text == (
        "<bos><start_of_turn>user\nTools:\nsearch(query: string): Find reports.\n"
        'Call a tool: <tool_call>{"name": "tool", "arguments": {"parameter": "value"}}</tool_call>\n\nHow much?'
        "<end_of_turn>\n<start_of_turn>model\n"
        '<tool_call>{"name": "search", "arguments": {"query": "Acme 0"}}</tool_call>\n'
        '<tool_call>{"name": "search", "arguments": {"query": "Acme 1"}}</tool_call><end_of_turn>\n'
        "<start_of_turn>user\n<tool_response>\nrevenue of Acme 0: 42\n</tool_response>\n"
        "<tool_response>\nrevenue of Acme 1: 42\n</tool_response><end_of_turn>\n"
        "<start_of_turn>model\nIt is 42.<end_of_turn>"
    )
    system = Message(role="system", content="Be brief.")
    asked = chat.decode(chat.open([system, *rollout.episode.messages[:1]]))
    assert asked == "<bos><start_of_turn>user\nBe brief.\n\nHow much?<end_of_turn>\n<start_of_turn>model\n"
