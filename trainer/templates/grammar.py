"""What a model may write under a JSON schema, token by token: `rollout.response_format`.

vLLM masks the logits of a constrained turn with xgrammar, and its log-probabilities are those of what the mask leaves.
The trainer walks the same grammar along the sampled tokens, so that both sides speak of one distribution.

Shape suffixes: N trainable tokens, W words of 32 vocabulary entries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from envs.schemas.checks import fault_of
from envs.schemas.words import schema_fault

if TYPE_CHECKING:
    from torch import Tensor


class Grammar:
    """The tokens allowed at each place of an answer that fits a JSON schema. Immutable; one serves all rows.

    *Covered*: what xgrammar allows, as vLLM's backend of this name compiles it (any white space between JSON's parts).
    *Not covered*: tokenizers in Mistral's own format (`tekken.json` without a `tokenizer.json`).
    """

    def __init__(self, tokenizer: Any, schema: str, *, vocab_size: int, stop_token_ids: Iterable[int]) -> None:
        """`vocab_size` is that of the logits. Raises `RuntimeError` for a schema that xgrammar does not take."""
        import xgrammar

        self._new_matcher = xgrammar.GrammarMatcher
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        self._compiled = xgrammar.GrammarCompiler(info).compile_json_schema(schema, any_whitespace=True)
        self._stop_token_ids = sorted(stop_token_ids)

    def fill(self, allowed_NW: Tensor, start: int, token_ids: Sequence[int]) -> None:
        """Set the rows from `start` on: bit v of row start + i says whether token v may follow `token_ids[:i]`.

        `allowed_NW` is int32 and on the CPU. `token_ids` are an answer from its first token on; it may be cut off.
        """
        matcher = self._new_matcher(self._compiled, override_stop_tokens=self._stop_token_ids)
        for i, token_id in enumerate(token_ids):
            matcher.fill_next_token_bitmask(allowed_NW, start + i)
            is_allowed = matcher.accept_token(token_id)
            assert is_allowed, f"token {token_id} was sampled at place {i} of an answer whose grammar forbids it"


_IGNORED = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef")
_COMPOSING = ("allOf", "anyOf", "oneOf", "$ref", "enum", "const")
_DESCRIBING = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("type", "$schema", "$id", "$comment", "$defs", "definitions"),
)
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties", "prefixItems", "allOf", "anyOf", "oneOf")


def left_out(schema: Any, place: str = "schema") -> str:
    """What of a JSON schema xgrammar 0.2 reads and does not enforce, with its place; empty where it enforces all.

    *Not covered*: alternatives of `oneOf` that overlap, which are taken as `anyOf`.
    """
    if not isinstance(schema, dict):
        return ""
    ignored = [key for key in _IGNORED if key in schema]
    composing = [key for key in _COMPOSING if key in schema]
    beside = [key for key in schema if key not in (*composing[:1], *_DESCRIBING)] if composing else []
    undeclared = [key for key in schema.get("required", ()) if key not in schema.get("properties", {})]
    if ignored:
        return f"{place}.{ignored[0]}"
    if beside:
        return f"{place}.{beside[0]}, beside {composing[0]}"
    if len(schema.get("allOf", ())) > 1:
        return f"{place}.allOf with several parts"
    if not str(schema.get("$ref", "#/")).startswith("#/"):
        return f"{place}.$ref to {schema['$ref']!r}, which is no path in the schema"
    if undeclared:
        return f"{place}.required: {undeclared[0]!r}, which is no key of properties"
    if "(?" in str(schema.get("pattern", "")).replace("(?:", ""):
        return f"{place}.pattern that looks around ((?=, (?!, (?<)"
    inner = [(f"{place}.{key}.{name}", part) for key in _SCHEMAS_BY_NAME for name, part in schema.get(key, {}).items()]
    for key in _SCHEMAS:
        parts = schema.get(key)
        inner += [(f"{place}.{key}", part) for part in (parts if isinstance(parts, list) else [parts])]
    return next(filter(None, (left_out(part, where) for where, part in inner)), "")


def check_schema(schema: str) -> None:
    """Raise `UserError` for a JSON schema that vLLM's xgrammar does not enforce wholly."""
    if fault := schema_fault(json.loads(schema)):
        raise UserError(f"rollout.response_format: its schema is none: {fault}")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        if found := left_out(json.loads(schema)):
            raise ValueError(found)
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)))
    except RecursionError:
        raise UserError("rollout.response_format: its schema is nested too deep") from None
    except (ValueError, VLLMValidationError) as e:
        raise UserError(
            f"rollout.response_format: vLLM's xgrammar does not enforce this schema wholly: {in_words(e)}. Not "
            "enforced are multipleOf, uniqueItems, contains, unknown formats, patterns or formats together with a "
            "length, patterns that look around, propertyNames or patternProperties beside properties, not, if, "
            "dependencies, several parts of allOf, keywords beside allOf, anyOf or $ref, and required keys that "
            "properties do not declare"
        ) from e
    if fault := fault_of(json.loads(schema)):
        raise UserError(f"rollout.response_format: {fault}")


_SOURCE = re.compile(r"\[[\d:.]+\] \S+\.(?:cc|cpp|h|rs):\d+: ")


def in_words(error: Exception) -> str:
    """What xgrammar says, without the lines of its own sources where it says so."""
    return " ".join(_SOURCE.sub("", str(error)).split())


def first_constrained(reasoner: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int:
    """Where the grammar of a turn starts: after its reasoning, which is free; `len(token_ids)` where that never ends.

    `reasoner` is a fresh vLLM reasoning parser, asked as vLLM's `StructuredOutputManager` asks its own, token by token.
    """
    if reasoner.is_reasoning_end(list(prompt_ids)):
        return 0
    so_far = list(prompt_ids)
    for i, token_id in enumerate(token_ids):
        so_far.append(token_id)
        if _ends_reasoning(reasoner, so_far):
            return i + 1
    return len(token_ids)


def _ends_reasoning(reasoner: Any, token_ids: list[int]) -> bool:
    """Whether the last token closes the reasoning."""
    if getattr(reasoner, "reasoning_end_token_ids", None):
        # The place of the closing token in what it is given; past the end where there is none.
        offset = reasoner.find_reasoning_end_offset(token_ids[-1:])
        if offset is not None:
            return bool(offset == 0)
    return bool(reasoner.is_reasoning_end_streaming(token_ids, token_ids[-1:]))
