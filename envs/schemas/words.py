"""What a user can have meant by a JSON schema of their own: a type or keyword that does not exist is no schema.

*Covered*: the keywords of all drafts that jsonschema knows, what OpenAPI and editors add, and whatever is like none of
them, which some program may read. *Not covered*: what only describes (`descripton` checks nothing anyway).
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import jsonschema_specifications

from envs.errors import nearest

_NEWEST = jsonschema.Draft202012Validator
_DRAFTS = (
    _NEWEST,
    jsonschema.Draft201909Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft6Validator,
    jsonschema.Draft4Validator,
    jsonschema.Draft3Validator,
)
_TRIED = (_NEWEST, jsonschema.Draft7Validator, jsonschema.Draft4Validator)
"""By which a schema is read that names none; draft 3 takes any word for a type."""
_OTHERS = {
    # OpenAPI's, OpenAI's, pydantic's and zod's, Gemini's, Ajv's; hints for forms.
    *("discriminator", "nullable", "example", "xml", "externalDocs", "strict", "encoding", "additionalKeywords"),
    *("propertyOrdering", "propertyOrder", "optional", "multiple", "min", "max", "step", "unit", "units", "hidden"),
    *("formatMinimum", "formatMaximum", "formatExclusiveMinimum", "formatExclusiveMaximum", "errorMessage"),
    *("enumNames", "enumDescriptions", "enumLabels", "options", "note", "notes", "num", "cost", "values", "schema"),
}
_NO_CONSTRAINT = {"format", "not", "if"}
"""`format` constrains nothing here; the others are too short to be told from other words."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords that hold schemas under names of their own."""
_INNER = (
    *("items", "additionalItems", "prefixItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "contains", "propertyNames", "extends", "disallow"),
)
"""Keywords that hold a schema, or a list of them."""
_CUTOFF = 0.82
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def schema_fault(schema: Any) -> str:
    """Why it can't be meant as a JSON schema, after the place where; empty where it can.

    A schema that names its draft is held to that; any other has to be one by some draft.
    """
    try:
        return _fault(json.dumps(schema))
    except RecursionError:
        # Nested too deep to be looked at.
        return ""


@functools.lru_cache(maxsize=1024)
def _fault(text: str) -> str:
    """Rows repeat their tools."""
    schema = json.loads(text)
    return _by_metaschema(schema) or next(_misspelt(schema, ""), "")


def _by_metaschema(schema: Any) -> str:
    named = schema.get("$schema") if isinstance(schema, Mapping) else None
    own = jsonschema.validators.validator_for({"$schema": named}, default=None) if isinstance(named, str) else None
    for draft in (own,) if own else _TRIED:
        if draft(draft.META_SCHEMA).is_valid(schema):
            return ""
    draft = own or _NEWEST
    error = jsonschema.exceptions.best_match(draft(draft.META_SCHEMA).iter_errors(schema))
    path = [str(step) for step in error.absolute_path]
    given = error.instance
    if path and path[-1] == "type" and isinstance(given, str):
        known = f"expected one of {', '.join(_TYPES)}{nearest(given, _TYPES)}"
        return f"{'.'.join(path)}: {given!r} is no type of JSON; {known}"
    return f"{'.'.join(path) or 'schema'}: {' '.join(error.message.split())[:300]}"


def _misspelt(schema: Any, place: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        where = f"{place}.{key}".removeprefix(".")
        if meant := _meant_by(key):
            yield f"{where}: {key!r} is no keyword of JSON Schema and checks nothing; did you mean {meant!r}?"
        elif key in _BY_NAME and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _misspelt(inner, f"{where}.{name}")
        elif key in _INNER:
            parts = value if isinstance(value, list) else [value]
            for i, inner in enumerate(parts):
                yield from _misspelt(inner, f"{where}.{i}" if isinstance(value, list) else where)


@functools.cache
def _meant_by(key: str) -> str:
    """The keyword that an unknown one is like; empty for a known one, and for one that is like none."""
    known, constraints = _words()
    if key in known or key.startswith(("$", "x-", "x_", "_")):
        return ""
    plain = {_plain(word): word for word in constraints}
    near = difflib.get_close_matches(_plain(key), plain, n=1, cutoff=_CUTOFF)
    return plain[near[0]] if near else ""


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").lower()


@functools.cache
def _words() -> tuple[set[str], set[str]]:
    """Every keyword, and those that constrain."""
    constraints = {key for draft in _DRAFTS for key in draft.VALIDATORS} | {"then", "else", "$defs", "definitions"}
    described = {
        key
        for resource in jsonschema_specifications.REGISTRY.values()
        if isinstance(resource.contents, Mapping)
        for key in resource.contents.get("properties", {})
    }
    return constraints | described | _OTHERS, constraints - _NO_CONSTRAINT
