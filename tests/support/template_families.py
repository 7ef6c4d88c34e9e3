"""The chat templates that the installed trl and vLLM ship, the family of each, and episodes through them.

`python tests/support/template_families.py` prints the table of docs/models.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from envs.errors import UserError
from envs.tools import tool
from envs.types import Message
from tests.support.template_play import QUESTION, model_with, roll
from trainer.templates.chat import FALLBACK_TEMPLATE, Chat
from trainer.types import Rollout

IM_END = ("<|im_end|>",)
_TOKEN = re.compile(
    r"<\|[^|<>\s{}]+\|>|<｜[^｜]+｜>|</?(?:think|tool_call|tool_response|arg_key|arg_value|image)>|<\|[a-z_]+>|<[a-z_]+\|>"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What goes with a template: parsers as `vllm serve` names them, tokens at which the model stops."""

    tool_parser: str = "hermes"
    reasoning_parser: str | None = None
    stops: tuple[str, ...] = IM_END
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    """What opens and closes reasoning."""
    tokens: tuple[str, ...] = ()
    special: dict[str, str] = field(default_factory=dict)
    call_end: str = ""
    """What the model stops at after calls, where that is not the first of `stops`."""
    refused: str = ""
    """A part of the refusal's text, where the template is refused."""


GEMMA4 = Family(
    tool_parser="gemma4",
    reasoning_parser="gemma4",
    stops=("<turn|>", "<|tool_response>"),
    thought=("<|channel>thought\n", "\n<channel|>"),
    call_end="<|tool_response>",
)
GEMMA = Family(stops=("<end_of_turn>",), tokens=("<start_of_turn>",), special={"bos_token": "<bos>"})
COHERE = Family(stops=("<|END_OF_TURN_TOKEN|>",))
DEEPSEEK = Family(
    reasoning_parser="deepseek_r1",
    tokens=("<think>", "</think>"),
    stops=("<｜end▁of▁sentence｜>",),
    special={"bos_token": "<｜begin▁of▁sentence｜>"},
)
DEEPSEEK_VL = Family(stops=DEEPSEEK.stops, special={**DEEPSEEK.special, "eos_token": "<｜end▁of▁sentence｜>"})
LLAMA = Family(stops=("<|eot_id|>",), tokens=("<|python_tag|>",), special={"bos_token": "<|begin_of_text|>"})
LLAMA_JSON = Family(tool_parser="llama3_json", stops=LLAMA.stops, tokens=LLAMA.tokens, special=LLAMA.special)
LFM2 = Family(tool_parser="lfm2", tokens=("<|tool_call_start|>", "<|tool_call_end|>"))
LFM25 = Family(tool_parser="lfm2", reasoning_parser="qwen3", tokens=LFM2.tokens)
NEMOTRON = Family(tool_parser="qwen3_coder", reasoning_parser="nemotron_v3", thought=("<think>\n", "\n</think>\n"))
PHI3 = Family(stops=("<|end|>", "<|endoftext|>"))
QWEN35 = Family(tool_parser="qwen3_coder", reasoning_parser="qwen3")
FAMILIES = {
    "cohere": COHERE,
    "cohere2": COHERE,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": GEMMA4,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "gemma4_v2": GEMMA4,
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": GEMMA4,
    "glm4moe": Family(
        tool_parser="glm45",
        reasoning_parser="glm45",
        stops=("<|user|>", "<|observation|>", "<|endoftext|>"),
        call_end="<|observation|>",
        thought=("\n<think>", "</think>\n"),
        tokens=("[gMASK]", "<sop>"),
    ),
    "gptoss": Family(
        tool_parser="openai",
        stops=("<|return|>", "<|call|>"),
        refused="gpt-oss is not supported: `vllm serve` does not",
    ),
    "idefics3": Family(stops=("<end_of_utterance>",)),
    "lfm2": Family(tool_parser="lfm2", tokens=LFM2.tokens, refused="renders tools, but drops the calls"),
    "lfm2_2_5": LFM25,
    "lfm2_2_5_v2": LFM25,
    "lfm2_2_5_vl": LFM25,
    "lfm2_v2": LFM2,
    "llama3": LLAMA,
    "llama3_1": LLAMA_JSON,
    "llama3_2": LLAMA_JSON,
    "llava_next": Family(stops=("</s>",), special={"bos_token": "<s>", "eos_token": "</s>"}),
    "muse_glimmer": Family(
        tool_parser="muse_glimmer",
        reasoning_parser="muse_glimmer",
        stops=("<|eot|>",),
        thought=(" to=self<|message|>", "<|eom|><|start|>assistant"),
    ),
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": Family(),
    "qwen2_5_vl": Family(),
    "qwen3": Family(reasoning_parser="qwen3"),
    "qwen3_5_nothink": Family(tool_parser="qwen3_coder"),
    "qwen3_5_think": QWEN35,
    "qwen3_6": QWEN35,
    "qwen3_8": QWEN35,
    "qwen3_instruct_2507": Family(),
    "qwen3_vl": Family(),
    "smolvlm": Family(stops=("<end_of_utterance>",)),
    "vllm: basic": Family(refused="ends an assistant's turn with no special token"),
    "vllm: blip2": Family(refused="ends an assistant's turn with no special token"),
    "vllm: chatml": Family(),
    "vllm: deepseek_ocr": Family(special=DEEPSEEK_VL.special, refused="ends an assistant's turn with no special token"),
    "vllm: deepseek_vl2": DEEPSEEK_VL,
    "vllm: kimi_audio": Family(refused="renders no tools, nor does it write them where they stand in the text"),
    "vllm: minicpmv45": Family(),
}


def template_files() -> dict[str, Path]:
    """The templates of the installed trl and vLLM by name, trl's training templates left out."""
    trl, vllm = _folder("trl", "chat_templates"), _folder("vllm", "transformers_utils", "chat_templates")
    files = {path.stem: path for path in sorted(trl.glob("*.jinja")) if not path.stem.endswith("_training")}
    return files | {f"vllm: {path.stem.removeprefix('template_')}": path for path in sorted(vllm.glob("*.jinja"))}


def _folder(package: str, *below: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.joinpath(*below)


def family_chat(smollm2: Path, folder: Path, name: str, **settings: Any) -> Chat:
    """The chat of a family: SmolLM2's tokenizer with the tokens that its template names."""
    family = FAMILIES[name]
    text = template_files()[name].read_text()
    special = {"eos_token": family.stops[0], **family.special}
    model = model_with(smollm2, folder, text, [*_TOKEN.findall(text), *family.tokens], family.stops, **special)
    settings = {"tool_parser": family.tool_parser, "reasoning_parser": family.reasoning_parser, **settings}
    return Chat(model, **settings)


@tool
def search(query: str) -> str:
    """Find reports.

    Args:
        query: words
    """
    return f"revenue of {query}: 42"


TOOLS = [search.schema()]
_CALL = {
    "hermes": '<tool_call>\n{{"name": "search", "arguments": {{"query": "{}"}}}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=search>\n<parameter=query>\n{}\n</parameter>\n</function>\n</tool_call>",
    "gemma4": '<|tool_call>call:search{{query:<|"|>{}<|"|>}}<tool_call|>',
    "glm45": "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
    "lfm2": "search(query='{}')",
    "llama3_json": '{{"name": "search", "parameters": {{"query": "{}"}}}}',
    "muse_glimmer": ' to=search<|message|><atem:function_calls>\n<atem:invoke name="search">\n<atem:parameter '
    'name="query">{}</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
}
_BETWEEN = {"gemma4": "", "lfm2": ", ", "llama3_json": "; ", "muse_glimmer": "<|eom|><|start|>assistant"}
_BROKEN = {
    "qwen3_coder": "<tool_call>\nsearch Acme\n</tool_call>",
    "gemma4": "<|tool_call>search Acme<tool_call|>",
    "glm45": "<tool_call>\n</tool_call>",
}
"""Where the parser makes a call even of one that is cut off; elsewhere a call that is cut off is broken."""
_ANSWERED = "It is 42."
EPISODES = ("one call", "two calls", "reasoning", "malformed", "second user turn")


def calls_in(parser: str, num_calls: int) -> str:
    """What a model writes to call `search` once or more often, in the dialect that `parser` reads."""
    text = _BETWEEN.get(parser, "\n").join(_CALL[parser].format(f"Acme {i}") for i in range(num_calls))
    return f"<|tool_call_start|>[{text}]<|tool_call_end|>" if parser == "lfm2" else text


def turns_of(family: Family, chat: Chat, episode: str) -> list[str]:
    """The turns that a model of the family writes in an episode of this kind."""
    opening, closing = family.thought
    opened = chat.decode(chat.open([QUESTION], TOOLS)).endswith(opening)
    call = calls_in(chat.tool_parser, 2 if episode == "two calls" else 1)
    if chat.uses_fallback:
        call = call.replace("\n{", "{").replace("}\n<", "}<")
    # These parsers take a turn that closes no reasoning for nothing but reasoning: such models write an empty block.
    thinks = opened or family.reasoning_parser in ("qwen3", "deepseek_r1", "glm45", "nemotron_v3")
    thought = "I look." if episode == "reasoning" else ""
    head = ("" if opened else opening) + thought + closing if thought or thinks else ""
    to_user = " to=user<|message|>" if chat.tool_parser == "muse_glimmer" else ""
    call_end, answer_end = family.call_end or family.stops[0], family.stops[0]
    answer = head + to_user + _ANSWERED + answer_end
    if episode == "malformed":
        return [head + _BROKEN.get(chat.tool_parser, call[: call.index("Acme")]) + answer_end, answer]
    turns = [head + call + call_end, answer]
    return turns * 2 if episode == "second user turn" else turns


def served(chat: Chat, messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """The prompt as vLLM's own code makes it of a client's request."""
    from vllm.entrypoints.chat_utils import parse_chat_messages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template

    body = {"model": "policy", "messages": [m.to_openai() for m in messages], "tools": list(tools)}
    request = ChatCompletionRequest.model_validate(body)
    dumped = [t.model_dump() for t in request.tools or []]
    template = chat._renderer.template or chat._tokenizer.get_chat_template(tools=dumped)
    config: Any = SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False)
    content_format = _detect_content_format(template, default="string")
    conversation, _, _ = parse_chat_messages(request.messages, config, content_format)
    return safe_apply_chat_template(
        config,
        chat._tokenizer,
        conversation,
        tools=dumped,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )


def play(chat: Chat, family: Family, episode: str) -> Rollout:
    """One episode of this kind through the real rollout worker."""
    user = ["And of Beta?"] if episode == "second user turn" else []
    (rollout,) = roll(chat, turns_of(family, chat, episode), search, user=user, max_turns=6)
    return rollout


def prompts_differ(chat: Chat, rollout: Rollout) -> str:
    """How what the model was given differs from what serving renders of the messages; empty where it does not.

    A turn that drifted stands in the ledger as the model wrote it: compared are then the first prompt and all that
    follows the last message before the answer.
    """
    messages = rollout.episode.messages
    first, last = chat.decode(rollout.ledgers[0].prompt_ids), chat.decode(rollout.ledgers[-1].prompt_ids)
    begins, expected = served(chat, messages[:1], TOOLS), served(chat, messages[:-1], TOOLS)
    if not first.startswith(begins):
        return f"ledger {first!r}, served {begins!r}"
    if rollout.num_drifted_turns:
        expected = expected.rpartition(messages[-2].content)[2]
        return "" if expected and expected in last else f"ledger {last[-400:]!r}, served {expected!r}"
    return "" if last.startswith(expected) else f"ledger {last[-400:]!r}, served {expected[-400:]!r}"


def row(smollm2: Path, folder: Path, name: str) -> list[str]:
    """The template's row of the table."""
    family = FAMILIES[name]
    parsers = f"{family.tool_parser}, {family.reasoning_parser}" if family.reasoning_parser else family.tool_parser
    try:
        chat = family_chat(smollm2, folder / name, name)
    except UserError as e:
        return [name, parsers, *["–"] * 6, f"refused: {str(e).partition(': ')[2]}"]
    cells, rows, forks = [], 0, 0
    for episode in EPISODES:
        rollout = play(chat, family, episode)
        turns = rollout.episode.turns
        verdict = "ok" if rollout.episode.answer and not prompts_differ(chat, rollout) else "FAILS"
        if episode == "two calls" and turns[0].malformed:
            verdict = "refused turn"
        if rollout.num_drifted_turns:
            verdict += ", drift"
        cells.append(verdict)
        rows += len(rollout.ledgers)
        forks += len(rollout.ledgers) - 1
    how = "fallback around its own" if chat.uses_fallback else "its own"
    if chat.uses_fallback and chat._renderer.template == FALLBACK_TEMPLATE.read_text():
        how = "ChatML fallback"
    return [name, parsers, *cells, f"{rows} / {forks}", how]


if __name__ == "__main__":
    from trainer.models.cache import DEFAULT_MODEL, resolve_model

    head = ["template", "parsers", *EPISODES, "rows / forks", "verdict"]
    print(f"trl {metadata.version('trl')}\n")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in sys.argv[1:] or template_files():
            print(f"| {' | '.join(row(resolve_model(DEFAULT_MODEL), Path(temporary), name))} |")
