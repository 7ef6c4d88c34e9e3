"""Arguments against the JSON schema of a tool that somebody else wrote.

The rule: what a schema says and we can check is checked; what can't be checked is left unchecked, and never ends a run
nor is booked on the model.

*Covered*: drafts 3 to 2020-12, by `$schema` or, without it, the newest whose metaschema takes it; patterns as ECMA 262
writes them, Unicode properties and named groups included, within `_PATTERNS_S` a check; multiples of decimal fractions;
`uniqueItems` in one pass; a whole check within `_CHECK_S`, whatever the schema doubles at each step. Checks may run in
threads, side by side.
*Left unchecked*: `$ref` to another document, to nothing or round in a circle; patterns that can't be read (`\\cX`,
`\\u{...}`, `[^]`) or take too long; `format`; a keyword that is not JSON Schema (`"type": "any"`, `"required": true` in
a property), where the schema is taken at all; `not`, `oneOf`, `if` and `contains` over any of these; what a check that
takes too long has not come to.
*Not covered*: `\\d`, `\\w` and `\\s` match all of Unicode, where ECMA's match ASCII.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import jsonschema
import jsonschema_specifications
import regex

from envs.schemas.references import all_in, broken_reference

_DRAFTS = (jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator)
"""Tried in turn where a schema does not name its own: each forbids some of what the earlier ones allowed."""
_PATTERNS_S = 0.25
"""For all patterns together in one check: a pattern can take hours."""
_CHECK_S = 1.0
"""For one check, in the time of its own thread: a schema that refers to itself twice at each step takes for ever."""
_DEEP = 100
"""Values nested so deep are what a check broke off at, and not a schema that winds round itself."""
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
_ESCAPE_OR_BRACES = regex.compile(r"\\(?:[pPux]\{[^}]*\}|(.))|\{([^}]*)\}", regex.DOTALL)
_ESCAPES = "dDwWsSbBfnrtvcxukpPAZ"
"""ECMA's, and Python's two anchors, which no author means as letters."""
_REPEATS = regex.compile(r"\d*(?:,\d*)?")
_LONGEST_PATTERN = 10_000
"""Longer ones take long to be read already."""

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
    try:
        text = json.dumps(parameters)
    except (TypeError, ValueError, RecursionError):
        return _error_of_object(parameters)
    return _error_of_text(text)


@functools.lru_cache(maxsize=_MAX_CACHED)
def _error_of_text(text: str) -> str:
    """Remembered: a row's definitions are made tools of at every turn, and the metaschema takes milliseconds."""
    return _error_of_object(json.loads(text))


def _error_of_object(parameters: Mapping[str, Any]) -> str:
    if fault := fault_of(parameters):
        return fault
    types = parameters.get("type", "object")
    if "object" not in ([types] if isinstance(types, str) else types):
        return f"type: expected 'object', a call's arguments are one; got {types!r}"
    return ""


def fault_of(schema: Any) -> str:
    """What keeps a value from being a JSON schema whose references can be followed; empty where nothing does."""
    draft = _draft(schema)
    error = _metaschema_error(draft, schema)
    return f"not a JSON schema: {error.message}" if error is not None else broken_reference(draft, schema)


def argument_check(parameters: Any, *, max_faults: int) -> Check:
    """A check of arguments against `parameters`: at most `max_faults` of what is wrong with them; none: they fit.

    Takes any JSON; what is not JSON Schema in it is left unchecked. The check raises `RecursionError` for arguments
    nested too deep, and nothing else; it ends within a moment (see the top).
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
    not_keywords = set(_not_keywords(draft, schema))
    keywords = {
        name: _forgiving(name, _OURS.get(name, function), not_keywords) for name, function in draft.VALIDATORS.items()
    }
    # What the draft's own metaschema defines can be referred to; nothing is ever fetched.
    validator = jsonschema.validators.extend(draft, keywords)(schema, registry=jsonschema_specifications.REGISTRY)

    # Here and not when they are met: warnings, which tell what can be read in two ways, are no thread's own.
    patterns = {pattern: _compiled(pattern) for pattern in _patterns_in(schema)}

    def check(value: Any) -> list[Fault]:
        token = _state.set(_State(patterns))
        faults: list[Fault] = []
        try:
            for fault in validator.iter_errors(value):
                faults.append((tuple(fault.absolute_path), fault.message))
                if len(faults) == max_faults:
                    break
        except RecursionError:
            if _is_deep(value):
                raise
        except Exception:  # _OutOfTime, and what jsonschema raises between keywords: at an $id that is no URI, say
            return faults
        finally:
            _state.reset(token)
        return faults

    return check


def _unchecked(value: Any) -> list[Fault]:
    return []


class _OutOfTime(Exception):
    """A check has taken so long that what it has not come to is left unchecked."""


class _State:
    """What one check has met so far, and its time."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        """`patterns`: each as it was read; None where it can't be."""
        self.num_unchecked = 0
        self._patterns = patterns
        self._followed: set[tuple[str, int]] = set()
        self._patterns_s = _PATTERNS_S
        self._end_s = time.thread_time() + _CHECK_S

    def keep_time(self) -> None:
        """Raises `_OutOfTime`. Asked before each keyword: none of them alone takes long."""
        if time.thread_time() > self._end_s:
            raise _OutOfTime

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
        compiled = self._patterns.get(pattern)
        if compiled is None or self._patterns_s <= 0:
            return None
        start = time.monotonic()
        try:
            # Concurrent: without Python's lock, which the event loop needs.
            return compiled.search(text, timeout=self._patterns_s, concurrent=True) is not None
        except TimeoutError:
            return None
        finally:
            self._patterns_s -= time.monotonic() - start


_state: ContextVar[_State] = ContextVar("_state")
"""The check's that runs here; several may run in threads."""


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEP):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _draft(schema: Any) -> Any:
    named = schema.get("$schema") if isinstance(schema, Mapping) else None
    if isinstance(named, str) and (found := jsonschema.validators.validator_for({"$schema": named}, default=None)):
        return found
    return next((draft for draft in _DRAFTS if _metaschema_error(draft, schema) is None), _DRAFTS[0])


def _metaschema_error(draft: Any, schema: Any) -> jsonschema.ValidationError | None:
    try:
        return jsonschema.exceptions.best_match(_of_schemas(draft).iter_errors(schema))
    except RecursionError:
        # Nested too deep to be looked at.
        return None


@functools.cache
def _of_schemas(draft: Any) -> Any:
    """Checks schemas themselves. Formats aside: `regex` would be asked of Python's `re`, which is not ECMA 262's."""
    return jsonschema.validators.extend(draft, {"uniqueItems": _unique_items})(draft.META_SCHEMA)


def _not_keywords(draft: Any, schema: Any) -> Iterator[tuple[int, str]]:
    """Each key whose value the metaschema refuses, with the id of the object that holds it."""
    with contextlib.suppress(RecursionError):
        for error in _of_schemas(draft).iter_errors(schema):
            holder, innermost = schema, None
            for step in error.absolute_path:
                if isinstance(holder, dict):
                    innermost = (id(holder), step)
                holder = holder[step]
            if innermost is not None:
                yield innermost


def _forgiving(name: str, function: Keyword, not_keywords: set[tuple[int, str]]) -> Keyword:
    """The keyword, which passes wherever it can't be checked, and where it is one of `not_keywords`."""

    def keyword(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        state = _state.get()
        state.keep_time()
        before = state.num_unchecked
        if (id(schema), name) in not_keywords:
            state.num_unchecked += 1
            return
        errors: list[jsonschema.ValidationError] = []
        try:
            with state.following(value, instance) if name in _REFERENCES else contextlib.nullcontext():
                for error in function(validator, value, instance, schema) or ():
                    errors.append(error)
        except RecursionError:
            raise
        except _OutOfTime:
            yield from errors
            raise
        except Exception:
            # jsonschema raises whatever a value that is no keyword's leads to: a KeyError, TypeError, re.error, ...
            state.num_unchecked += 1
            return
        if name not in _TURNS_UNKNOWN_INTO_WRONG or state.num_unchecked == before:
            yield from errors

    return keyword


def _patterns_in(schema: Any) -> Iterator[str]:
    for inner in all_in(schema):
        of_names = inner.get("patternProperties")
        for pattern in (inner.get("pattern"), *(of_names if isinstance(of_names, dict) else ())):
            if isinstance(pattern, str):
                yield pattern


def _is_doubtful(pattern: str) -> bool:
    """Whether the library reads something into it that ECMA 262 does not: `\\h`, `\\R`, `{e}` for a near miss, ..."""
    return any(
        ((found[1] or "").isalpha() and found[1] not in _ESCAPES)
        or (found[2] is not None and not _REPEATS.fullmatch(found[2]))
        for found in _ESCAPE_OR_BRACES.finditer(pattern)
    )


@functools.lru_cache(maxsize=_MAX_CACHED)
def _compiled(pattern: str) -> Any:
    """None for what can't be read, or not without doubt."""
    if len(pattern) > _LONGEST_PATTERN or _is_doubtful(pattern):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return regex.compile(pattern)
        except Exception:  # besides regex.error whatever the library trips over: OverflowError, KeyError, ...
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


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "string"):
        return
    if _state.get().matches(pattern, instance) is False:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, inner in patterns.items():
        for key, value in instance.items():
            if _state.get().matches(pattern, key):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _additional_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    # What may match a pattern is no addition.
    extra = [k for k in instance if k not in known and all(_state.get().matches(p, k) is False for p in patterns)]
    if isinstance(wanted, dict):
        for key in extra:
            yield from validator.descend(instance[key], wanted, path=key)
    elif extra and not wanted:
        names = ", ".join(map(repr, sorted(extra)))
        verb = "were" if len(extra) > 1 else "was"
        yield jsonschema.ValidationError(f"Additional properties are not allowed ({names} {verb} unexpected)")


_OURS: dict[str, Keyword] = {
    "multipleOf": _multiple_of,
    "divisibleBy": _multiple_of,
    "uniqueItems": _unique_items,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}
