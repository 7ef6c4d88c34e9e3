"""Arguments against the JSON schema of a tool that somebody else wrote.

The rule: what a schema says and we can check is checked; what can't be checked is left unchecked, and never ends a run
nor is booked on the model.

*Covered*: drafts 3 to 2020-12, by `$schema` or, without it, the newest whose metaschema takes it; patterns as ECMA 262
writes them, Unicode properties and named groups included, within `_PATTERNS_S` a call; multiples of decimal fractions;
`uniqueItems` in one pass.
*Left unchecked*: `$ref` to another document, to nothing or round in a circle; patterns that can't be read (`\\cX`,
`\\u{...}`, `[^]`) or take too long; `format`; a keyword that is not JSON Schema (`"type": "any"`, `"required": true` in
a property), where the schema is taken at all; `not`, `oneOf`, `if` and `contains` over any of these.
*Not covered*: `\\d`, `\\w` and `\\s` match all of Unicode, where ECMA's match ASCII.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import jsonschema
import jsonschema_specifications
import regex

_DRAFTS = (jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator)
"""Tried in turn where a schema does not name its own: each forbids some of what the earlier ones allowed."""
_PATTERNS_S = 0.25
"""Of all patterns together in one check: a pattern can take hours, and the event loop waits."""
_TURNS_UNKNOWN_INTO_WRONG = {
    *("not", "disallow", "oneOf", "if", "contains", "unevaluatedProperties", "unevaluatedItems")
}
_MAY_BE_NULL = {"const", "default"}
_VALUES = _MAY_BE_NULL | {"enum", "examples"}
"""Keywords that hold arguments, not schemas."""
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords that hold schemas under names of their own."""
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_MAX_CACHED = 1024

Fault = tuple[tuple[int | str, ...], str]
"""Where in the arguments, and what is wrong there."""
Check = Callable[[Any], list[Fault]]
Keyword = Callable[[Any, Any, Any, Any], Iterator[jsonschema.ValidationError] | None]


def without_nulls(schema: Any) -> Any:
    """The schema without the keywords that are null, as dumps of SDKs write those that are not set.

    A null that says something stays: as `const` and `default`, and inside a list of values.
    """
    if isinstance(schema, list):
        return [without_nulls(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {key: value for key, value in schema.items() if value is not None or key in _MAY_BE_NULL}
    return {
        key: {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
        if key in _BY_NAME and isinstance(value, Mapping)
        else value
        if key in _VALUES
        else without_nulls(value)
        for key, value in kept.items()
    }


def schema_error(parameters: Any) -> str:
    """What keeps `parameters` from being the JSON schema of an object; empty where nothing does."""
    if isinstance(parameters, bool):
        return ""
    if not isinstance(parameters, Mapping):
        return f"expected a JSON schema (an object), got {type(parameters).__name__}"
    error = _metaschema_error(_draft(parameters), parameters)
    if error is not None:
        return f"not a JSON schema: {error.message}"
    types = parameters.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types):
        return f"type: expected 'object', a call's arguments are one; got {types!r}"
    return ""


def argument_check(parameters: Any, *, max_faults: int) -> Check:
    """A check of arguments against `parameters`: at most `max_faults` of what is wrong with them; none: they fit.

    Takes any JSON; what is not JSON Schema in it is left unchecked. The check raises `RecursionError` for arguments
    nested too deep, and nothing else.
    """
    try:
        return _argument_check(json.dumps(parameters), max_faults)
    except RecursionError:
        return _unchecked


@functools.lru_cache(maxsize=_MAX_CACHED)
def _argument_check(text: str, max_faults: int) -> Check:
    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        return _unchecked
    draft = _draft(schema)
    state = _State(not_keywords=set(_not_keywords(draft, schema)))
    keywords = {name: _forgiving(name, _OURS.get(name, function), state) for name, function in draft.VALIDATORS.items()}
    for name in ("pattern", "patternProperties", "additionalProperties"):
        keywords[name] = _forgiving(name, functools.partial(_WITH_PATTERNS[name], state), state)
    # What the draft's own metaschema defines can be referred to; nothing is ever fetched.
    validator = jsonschema.validators.extend(draft, keywords)(schema, registry=jsonschema_specifications.REGISTRY)

    def check(value: Any) -> list[Fault]:
        state.begin()
        faults = itertools.islice(validator.iter_errors(value), max_faults)
        return [(tuple(fault.absolute_path), fault.message) for fault in faults]

    return check


def _unchecked(value: Any) -> list[Fault]:
    return []


class _State:
    """What one check has met so far; checks of one tool never overlap, for they never wait."""

    def __init__(self, *, not_keywords: set[tuple[int, str]]) -> None:
        self.not_keywords = not_keywords
        """What stands in place of keywords, by the object that holds it."""
        self.begin()

    def begin(self) -> None:
        self.num_unchecked = 0
        self._followed: set[tuple[str, int]] = set()
        self._patterns_s = _PATTERNS_S

    @contextlib.contextmanager
    def following(self, reference: str, instance: Any) -> Iterator[None]:
        """Raises `LookupError` where the reference, followed for the same instance already, leads round in a circle."""
        followed = (reference, id(instance))
        if followed in self._followed:
            raise LookupError(reference)
        self._followed.add(followed)
        try:
            yield
        finally:
            self._followed.discard(followed)

    def matches(self, pattern: str, text: str) -> bool | None:
        """None, counted as unchecked, where it can't be told."""
        found = self._matches(pattern, text)
        self.num_unchecked += found is None
        return found

    def _matches(self, pattern: str, text: str) -> bool | None:
        compiled = _compiled(pattern)
        start = time.monotonic()
        try:
            return None if compiled is None else compiled.search(text, timeout=max(self._patterns_s, 1e-3)) is not None
        except TimeoutError:
            return None
        finally:
            self._patterns_s -= time.monotonic() - start


def _draft(schema: Any) -> Any:
    named = schema.get("$schema") if isinstance(schema, Mapping) else None
    if isinstance(named, str) and (found := jsonschema.validators.validator_for({"$schema": named}, default=None)):
        return found
    return next((draft for draft in _DRAFTS if _metaschema_error(draft, schema) is None), _DRAFTS[0])


def _metaschema_error(draft: Any, schema: Any) -> jsonschema.ValidationError | None:
    try:
        # Formats aside: `regex` would be asked of Python's `re`, which does not know ECMA 262.
        return jsonschema.exceptions.best_match(draft(draft.META_SCHEMA).iter_errors(schema))
    except RecursionError:
        # Nested too deep to be looked at.
        return None


def _not_keywords(draft: Any, schema: Any) -> Iterator[tuple[int, str]]:
    """Each key whose value the metaschema refuses, with the id of the object that holds it."""
    with contextlib.suppress(RecursionError):
        for error in draft(draft.META_SCHEMA).iter_errors(schema):
            holder, innermost = schema, None
            for step in error.absolute_path:
                if isinstance(holder, dict):
                    innermost = (id(holder), step)
                holder = holder[step]
            if innermost is not None:
                yield innermost


def _forgiving(name: str, function: Keyword, state: _State) -> Keyword:
    """The keyword, which passes wherever it can't be checked."""

    def keyword(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        before = state.num_unchecked
        if (id(schema), name) in state.not_keywords:
            state.num_unchecked += 1
            return
        try:
            with state.following(value, instance) if name in _REFERENCES else contextlib.nullcontext():
                errors = list(function(validator, value, instance, schema) or ())
        except RecursionError:
            raise
        except Exception:
            # jsonschema raises whatever a value that is no keyword's leads to: a KeyError, TypeError, re.error, ...
            state.num_unchecked += 1
            return
        if name not in _TURNS_UNKNOWN_INTO_WRONG or state.num_unchecked == before:
            yield from errors

    return keyword


@functools.lru_cache(maxsize=_MAX_CACHED)
def _compiled(pattern: str) -> Any:
    """None for what can't be read, or not without doubt."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return regex.compile(pattern)
        except (regex.error, Warning, OverflowError, RecursionError):
            return None


def _multiple_of(validator: Any, factor: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """Exact in the decimals as they are written: 19.99 is a multiple of 0.01, though its nearest float is not."""
    if validator.is_type(instance, "number") and Fraction(str(instance)) % Fraction(str(factor)):
        yield jsonschema.ValidationError(f"{instance!r} is not a multiple of {factor}")


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if wanted and validator.is_type(instance, "array") and len({_frozen(item) for item in instance}) < len(instance):
        yield jsonschema.ValidationError(f"{instance!r} has non-unique elements")


def _frozen(value: Any) -> Any:
    """Equal where JSON Schema calls two values equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return ("bool", value) if isinstance(value, bool) else value


def _pattern(state: _State, validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "string"):
        return
    if state.matches(pattern, instance) is False:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(state: _State, validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, inner in patterns.items():
        for key, value in instance.items():
            if state.matches(pattern, key):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _additional_properties(state: _State, validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    # What may match a pattern is no addition.
    extra = [k for k in instance if k not in known and all(state.matches(p, k) is False for p in patterns)]
    if isinstance(wanted, dict):
        for key in extra:
            yield from validator.descend(instance[key], wanted, path=key)
    elif extra and not wanted:
        names = ", ".join(map(repr, sorted(extra)))
        verb = "were" if len(extra) > 1 else "was"
        yield jsonschema.ValidationError(f"Additional properties are not allowed ({names} {verb} unexpected)")


_OURS: dict[str, Keyword] = {"multipleOf": _multiple_of, "divisibleBy": _multiple_of, "uniqueItems": _unique_items}
_WITH_PATTERNS: dict[str, Callable[..., Iterator[Any]]] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}
