"""Which chat template a model gets: its own, one named in the config, trl's training template, or a fallback.

A model whose own template knows no tools (does not list them, or drops the calls) gets a fallback in its own turn
markers. ChatML models get `fallback_chat_template.jinja`; for the others their own template is wrapped: the wrapper
writes tools, calls and results into plain messages and lets the model's own template write those.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.errors import UserError, nearest
from envs.messages import as_object
from envs.types import Message, ToolCall
from trainer.templates.chat_template import HELLO, Renderer, TemplateRefused
from trainer.templates.turn_parser import ToolSchema, content_is_a_list

FALLBACK_TEMPLATE = Path(__file__).with_name("fallback_chat_template.jinja")
"""Takes the place of a ChatML model's own template where that knows no tools. Its calls are read by `hermes`."""
_WRAPPER = Path(__file__).with_name("wrapped_chat_template.jinja")

PROBE = "probe text"
PROBE_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
PROBE_CALL = Message(
    role="assistant",
    tool_calls=(ToolCall(call_id="call00000", name="probe_tool", arguments=json.dumps({"text": PROBE})),),
)
ANSWER = Message(role="assistant", content="Zebra.")


def added_by_fallback(turn: Message, answers: Sequence[Message], eos_token: str, *, generate: bool) -> str:
    """What the ChatML fallback writes behind a prompt, by hand: in a tenth of the time that Jinja takes.

    Whoever uses it has compared the two (`trainer.templates.local`).
    """
    parts = [_fallback_body(turn)]
    parts += [f"<|im_start|>{answer.role}\n{_fallback_body(answer)}" for answer in answers]
    return f"{eos_token}\n".join([*parts, "<|im_start|>assistant\n" if generate else ""])


def _fallback_body(message: Message) -> str:
    reasoning = f"<think>{message.reasoning}</think>" if message.reasoning else ""
    return reasoning + message.content + "\n".join(map(_fallback_call, message.tool_calls))


def _fallback_call(call: ToolCall) -> str:
    name, arguments = (json.dumps(x, ensure_ascii=False) for x in (call.name, as_object(call.arguments)))
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


def choose_template(tokenizer: Any, setting: str, template_kwargs: Mapping[str, Any]) -> tuple[str | None, str]:
    """The template in use, None where it is the tokenizer's own, and why it is a fallback, empty where it is none.

    `setting` is `model.chat_template`: auto, training or a file. Raises `UserError` naming it.
    """

    def lack(template: str | None) -> str:
        _check_kwargs(template or tokenizer.chat_template, template_kwargs)
        return _lack_of_tools(Renderer(tokenizer, template, template_kwargs))

    if setting not in ("auto", "training"):
        template = _read_template(setting)
        if missing := lack(template):
            raise UserError(f"model.chat_template: {setting} {missing}; the model would never hear of them")
        return template, ""
    own = _training_template(tokenizer) if setting == "training" else None
    if not (own or tokenizer.chat_template):
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
            raise UserError(
                "model.chat_template: the model has no chat template, and its tokenizer lacks the tokens <|im_start|> "
                "and <|im_end|> of the ChatML fallback; name a template that fits its tokens"
            )
        return FALLBACK_TEMPLATE.read_text(), "the model has none of its own"
    missing = lack(own)
    if not missing:
        return own, ""
    template = _fallback_of(tokenizer, own, template_kwargs)
    if lack(template):
        raise UserError(
            f"model.chat_template: the model's own template {missing}, nor does it write them where they stand in the "
            "text of a message; name a template that does"
        )
    return template, f"the model's own template {missing}"


def _check_kwargs(template: str | dict[str, str], kwargs: Mapping[str, Any]) -> None:
    """Raise `UserError` for one that the template does not speak of: it would change nothing."""
    text = template if isinstance(template, str) else " ".join(template.values())
    words = set(re.findall(r"[A-Za-z_]\w*", text))
    for name in kwargs:
        if name not in words:
            raise UserError(
                f"model.chat_template_kwargs.{name}: the chat template does not read it, so it would change nothing; "
                f"leave it out{nearest(name, words)}"
            )


def _lack_of_tools(renderer: Renderer) -> str:
    """What a template does not do with tools; empty where it lists them and writes calls."""
    if PROBE_TOOL["function"]["name"] not in renderer.render([HELLO], [dict(PROBE_TOOL)], generate=True):
        return "renders no tools"
    if PROBE not in renderer.render([HELLO, PROBE_CALL], [dict(PROBE_TOOL)], generate=False):
        return "renders tools, but drops the calls"
    return ""


def _fallback_of(tokenizer: Any, own: str | None, template_kwargs: Mapping[str, Any]) -> str:
    renderer = Renderer(tokenizer, own, template_kwargs)
    if tokenizer.eos_token == "<|im_end|>" and _is_chatml(renderer):
        return FALLBACK_TEMPLATE.read_text()
    own = own or str(tokenizer.get_chat_template())
    macros = FALLBACK_TEMPLATE.read_text()
    macros = macros[macros.index("{%- macro type_of") : macros.rindex("{%- endmacro -%}") + len("{%- endmacro -%}")]
    flags = {"has_system_role": _has_system_role(renderer), "takes_parts": content_is_a_list(own)}
    head = "{#- The model's own chat template follows after what writes tools, calls and results into messages. -#}\n"
    sets = "".join(f"{{%- set {name} = {str(value).lower()} -%}}\n" for name, value in flags.items())
    return f"{head}{sets}{macros}\n{_WRAPPER.read_text()}{own}"


def _is_chatml(renderer: Renderer) -> bool:
    text = renderer.render([HELLO, ANSWER, HELLO], None, generate=True)
    asked = f"<|im_start|>user\n{HELLO.content}<|im_end|>\n<|im_start|>assistant\n"
    return text.startswith("<|im_start|>") and text.endswith(f"{asked}{ANSWER.content}<|im_end|>\n{asked}")


def _has_system_role(renderer: Renderer) -> bool:
    try:
        return PROBE in renderer.render([Message(role="system", content=PROBE), HELLO], None, generate=True)
    except TemplateRefused:
        return False


def is_shipped(template: str) -> bool:
    """Whether it is ours, or one of those that the installed trl has, letter for letter."""
    return template.strip() in _shipped()


@functools.cache
def _shipped() -> frozenset[str]:
    spec = importlib.util.find_spec("trl")
    theirs = [] if spec is None or spec.origin is None else Path(spec.origin).parent.glob("chat_templates/*.jinja")
    return frozenset(path.read_text().strip() for path in (FALLBACK_TEMPLATE, *theirs))


def _training_template(tokenizer: Any) -> str | None:
    """trl's prefix-preserving counterpart of the model's own template; None where that is one itself."""
    if not tokenizer.chat_template:
        raise UserError("model.chat_template: training: the model has no chat template of which trl could have one")
    from trl.chat_template_utils import get_training_chat_template

    try:
        template: str | None = get_training_chat_template(tokenizer)
    except Exception as e:  # ValueError for an unknown template; whatever a template raises on trl's own probes
        raise UserError(
            "model.chat_template: training: trl knows no training template for this model's own template (it compares "
            f"their text): {e}; expected auto or a Jinja file"
        ) from e
    return template


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"model.chat_template: {path!r} can't be read ({e}); expected auto, training or a Jinja file"
        ) from e
