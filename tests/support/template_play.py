"""Models that are a chat template over SmolLM2's tokenizer with further tokens; episodes written by hand on them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.tools import Tool
from envs.types import Episode, Message, Task
from graders.types import Grade
from tests.support.scripted_engine import Writer
from trainer.config import RolloutConfig
from trainer.rollouts.worker import RolloutWorker
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest

_VOCABULARY = 2048
QUESTION = Message(role="user", content="How much?")

# ChatML turns that always hold a think block, as Qwen3's do; CALL is a dialect of calls.
THINKING = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'assistant' %}<think>
{{ (m.reasoning_content or '') | trim }}
</think>

{% endif %}{{ m.content | trim }}{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
OPENED{% endif %}"""
PLAIN = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content | trim }}{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def model_with(
    smollm2: Path,
    folder: Path,
    template: str | None,
    tokens: Iterable[str] = (),
    stops: Sequence[str] = ("<|im_end|>",),
    **special: str,
) -> Path:
    """A model folder without weights; it stops at `stops`. `tokens`, bos, eos, ... are added to the vocabulary.

    The vocabulary is SmolLM2's first 2048 tokens, which write any text: the whole one takes seconds to load.
    """
    folder.mkdir()
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    bpe = tokenizer["model"]
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < _VOCABULARY}
    bpe["merges"] = [(a, b) for a, b in bpe["merges"] if {a, b, a + b} <= bpe["vocab"].keys()]
    # SmolLM2's, converted from GGUF, also reads ▁ as a space; DeepSeek's tokens hold it.
    tokenizer["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    known = {token["content"] for token in tokenizer["added_tokens"]}
    for i, token in enumerate(
        dict.fromkeys(t for t in [*tokens, *stops, *special.values()] if t not in known), _VOCABULARY
    ):
        # Tags of calls and of reasoning are text to a detokenizer that leaves out special tokens, as in real models.
        is_text = any(part in token for part in ("tool", "think", "THINK", "arg_"))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": i, "content": token, "special": not is_text, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    shutil.copy(smollm2 / "config.json", folder)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[stop] for stop in stops]}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


class World:
    """Its own environment; a user who has `replies` to give, one after the other, answers where there are any."""

    def __init__(self, tools: Sequence[Tool], replies: Sequence[str]) -> None:
        self.tools: Mapping[str, Tool] = {t.name: t for t in tools}
        self._replies = list(replies)

    def make_env(self) -> World:
        return self

    def tasks(self, split: str) -> Sequence[Task]:
        return []

    def expert_episode(self, task: Task, seed: int) -> Sequence[Any]:
        return ()

    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def respond(self, message: Message) -> str | None:
        return self._replies.pop(0) if self._replies else None

    async def close(self, episode: Episode | None) -> None: ...


class AnswerGrader:
    """1 for every episode that ended with an answer."""

    async def grade(self, task: Task, episode: Episode) -> Grade:
        return Grade(reward=float(episode.answer is not None), parts={})


def roll(
    chat: Chat,
    turns: Sequence[str],
    *tools: Tool,
    messages: Sequence[Message] = (QUESTION,),
    user: Sequence[str] = (),
    n: int = 1,
    **config: Any,
) -> list[Rollout]:
    """The rollouts of one task, as the trainer makes them, of turns written by hand; the last again and again."""
    left = iter(turns)
    settings = {"max_turns": 4, "max_turn_tokens": 6000, "max_episode_tokens": 16000, "world_retries": 0, **config}
    worker = RolloutWorker(
        world=World(tools, user),
        grader=AnswerGrader(),
        chat=chat,
        engine=Writer(chat, lambda prompt, seed: next(left, turns[-1])),
        config=RolloutConfig(**settings),
    )
    task = Task(task_id="t", messages=tuple(messages))
    requests = [RolloutRequest(task=task, rollout_id=f"r{i}", seed=i) for i in range(n)]
    return asyncio.run(worker.run(requests, temperature=1.0))


# One ChatML template in four dialects of tool calls; with `thinking`, reasoning before the last question is dropped.
TOY_TEMPLATE = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = messages.index(m) -%}{%- endfor -%}
{%- if tools -%}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > ns.last %}<think>
{{ m.reasoning_content.strip('\\n') }}
</think>

{% endif -%}
{{ m.content }}{% for c in m.tool_calls or [] %}CALL_FORMAT{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

ARGUMENTS = "{{ c.function.arguments | tojson }}"

DIALECTS = {
    "hermes": f'<tool_call>\n{{"name": "{{{{ c.function.name }}}}", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3_json": f'{{"name": "{{{{ c.function.name }}}}", "parameters": {ARGUMENTS}}}',
    "pythonic": "[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{{ ', ' if not loop.last else '' }}{% endfor %})]",
    "qwen3_xml": "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
}
