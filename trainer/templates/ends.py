"""How a chat template ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from envs.errors import UserError
from envs.types import Message
from trainer.templates.chat_template import HELLO, Renderer
from trainer.templates.fallback import ANSWER, PROBE, PROBE_CALL

PROBE_RESULT = Message(role="tool", content=ANSWER.content, call_id="call00000", name="probe_tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A stop token that ends an assistant's turn."""

    text: str
    token_id: int


def find_ends(
    tokenizer: Any, renderer: Renderer, stop_token_ids: Collection[int], probe_tool: list[dict[str, Any]] | None
) -> tuple[End, End]:
    """The stop tokens with which the template ends an answer and a turn of calls.

    They are one in most templates; in some a turn ends with the token that opens what follows (GLM, Gemma 4).
    `probe_tool` is the list of that tool alone, as the template is given it. Raises `UserError` where a turn ends with
    no stop token, or a tool's result is not rendered.
    """
    added = tokenizer.added_tokens_decoder
    # A stop token may also be a plain piece of text, or beyond the tokenizer; a template writes neither at an end.
    texts = {added[i].content: i for i in stop_token_ids if i in added}

    def first_in(text: str) -> End | None:
        found = [(at, end) for end in texts if (at := text.find(end)) >= 0]
        return End(text=min(found)[1], token_id=texts[min(found)[1]]) if found else None

    text = renderer.render([HELLO, replace(ANSWER, content=PROBE), HELLO], None, generate=False)
    after = text[text.find(PROBE) + len(PROBE) :]
    if (answer_end := first_in(after[: after.rfind(HELLO.content)])) is None:
        raise UserError(f"model.chat_template: it ends an assistant's turn {_not_a_stop(tokenizer, after)}")
    text = renderer.render([HELLO, PROBE_CALL, PROBE_RESULT], probe_tool, generate=False)
    at = text.rfind(ANSWER.content)
    if at < 0:
        raise UserError("model.chat_template: it renders no tool results; the model would never see them")
    after = text[text.rfind(PROBE, 0, at) + len(PROBE) : at]
    if (call_end := first_in(after)) is None:
        raise UserError(f"model.chat_template: it ends a turn of tool calls {_not_a_stop(tokenizer, after)}")
    return answer_end, call_end


def _not_a_stop(tokenizer: Any, after: str) -> str:
    """With what a turn ends, in words, where that is no stop token; `after` follows the turn's text."""
    added = tokenizer.added_tokens_decoder
    found = sorted((after.find(t.content), t.content, i) for i, t in added.items() if t.special)
    named = [f"{text!r} (token {token_id})" for at, text, token_id in found if at >= 0]
    if not named:
        return "with no special token of the model's tokenizer"
    return (
        f"with {' or '.join(named)}, at which the model does not stop; expected it in eos_token_id of the model's "
        "generation_config.json"
    )


def num_common(a: str, b: str) -> int:
    """The characters that two texts have in common at their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
