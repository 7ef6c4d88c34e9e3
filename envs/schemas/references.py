"""References in a JSON schema: which lead nowhere, to another document or round in a circle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_specifications
import referencing.jsonschema


def broken_reference(draft: Any, schema: Any) -> str:
    """What is wrong with the first `$ref` of a schema that can't be followed; empty where each can.

    `draft` is jsonschema's class of the schema's draft. What the drafts themselves define can be referred to; nothing
    is ever fetched. Not covered: `$dynamicRef` and `$recursiveRef`.
    """
    root = referencing.jsonschema.specification_with(draft.META_SCHEMA["$schema"]).create_resource(schema)
    targets: dict[int, tuple[str, Any]] = {}
    try:
        registry = jsonschema_specifications.REGISTRY.with_resource(root.id() or "", root)
        waiting = [(root, registry.resolver(root.id() or ""))]
        while waiting:
            resource, resolver = waiting.pop()
            contents = resource.contents
            reference = contents.get("$ref") if isinstance(contents, Mapping) else None
            if isinstance(reference, str):
                try:
                    targets[id(contents)] = reference, resolver.lookup(reference).contents
                except Exception:  # referencing's Unresolvable, and whatever a text that is no URI leads to
                    return f"$ref {reference!r}: leads to nothing in this schema, and nothing is fetched"
            waiting += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]
    except Exception as e:  # an $id that is no URI
        return f"not a JSON schema: {e}"
    circular = _circular(schema, targets)
    return f"$ref {circular!r}: leads round in a circle" if circular else ""


def _circular(root: Any, targets: Mapping[int, tuple[str, Any]]) -> str:
    """A reference that leads, for one and the same value, back to where it stands; empty where none does."""
    is_done: dict[int, bool] = {}
    for start in all_in(root):
        path = [(start, _beside(start, targets))]
        while path:
            schema, following = path[-1]
            is_done.setdefault(id(schema), False)
            inner = next(following, None)
            if inner is None:
                is_done[id(schema)] = True
                path.pop()
            elif not is_done.get(id(inner), False):
                if id(inner) in is_done:
                    return next(targets[id(on)][0] for on, _ in reversed(path) if id(on) in targets)
                path.append((inner, _beside(inner, targets)))
    return ""


def all_in(value: Any) -> Iterator[Any]:
    """Every object in a JSON value."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, Mapping):
            yield inner
        if isinstance(inner, Mapping | list):
            waiting += inner.values() if isinstance(inner, Mapping) else inner


def _beside(schema: Mapping[str, Any], targets: Mapping[int, tuple[str, Any]]) -> Iterator[Any]:
    """The schemas that are asked about the same value as this one."""
    found = [targets[id(schema)][1]] if id(schema) in targets else []
    for key in ("allOf", "anyOf", "oneOf", "extends"):
        found += value if isinstance(value := schema.get(key), list) else []
    found += [schema.get(key) for key in ("not", "if", "then", "else")]
    for key in ("dependentSchemas", "dependencies"):
        found += value.values() if isinstance(value := schema.get(key), Mapping) else []
    return (inner for inner in found if isinstance(inner, Mapping))
