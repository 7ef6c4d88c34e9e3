"""The schema that TRL shows the model of a function: transformers' `get_json_schema`, which would load torch here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from envs.schemas.docstrings import split_choices, trl_docs

_BASIC: Mapping[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def trl_schema(function: Callable[..., Any], *, only_true: bool = False) -> dict[str, Any] | None:
    """A function or bound method as Chat Completions JSON, the return value included as TRL does.

    None without a docstring in TRL's form, or with types that TRL does not know. With `only_true`, None too where TRL
    shows a parameter as an object though it is none, or one with fields: enums, dates, other classes, a bare `list`.
    """
    doc = inspect.getdoc(function)
    if not doc:
        return None
    docs = trl_docs(doc.strip())
    signature = inspect.signature(function).parameters
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    try:
        for name in (*signature, "return"):
            if name in hints:
                properties[name] = _schema_of(hints[name], only_true=only_true and name != "return")
    except TypeError:
        return None
    returned = properties.pop("return", None)
    if any(name not in properties or name not in docs.texts for name in signature):
        return None
    for name, about in properties.items():
        text, choices = split_choices(docs.texts[name])
        about |= ({} if choices is None else {"enum": choices}) | {"description": text}
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [name for name, parameter in signature.items() if parameter.default is parameter.empty]:
        parameters["required"] = required
    described: dict[str, Any] = {"name": function.__name__, "description": docs.description, "parameters": parameters}
    if returned is not None:
        described["return"] = returned | ({} if docs.returns is None else {"description": docs.returns})
    return {"type": "function", "function": described}


def _schema_of(hint: Any, *, only_true: bool) -> dict[str, Any]:
    """Raises `TypeError` for types that TRL refuses and, with `only_true`, shows as what they are not."""
    inner = functools.partial(_schema_of, only_true=only_true)
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        if only_true and hint not in (Any, dict, *_BASIC):
            # An object without properties to TRL, which the check of arguments would then refuse.
            raise TypeError(hint)
        return {} if hint is Any else {"type": _BASIC.get(hint, "object")}
    if origin in (Union, UnionType):
        return _union([inner(arg) for arg in args if arg is not NoneType], is_nullable=NoneType in args)
    if origin is Literal:
        if any(type(arg) not in _BASIC for arg in args):
            raise TypeError(hint)
        types = list(dict.fromkeys(_BASIC[type(arg)] for arg in args))
        return {"type": types[0] if len(types) == 1 else types, "enum": [*args]}
    if origin is list:
        return {"type": "array", **({"items": inner(args[0])} if args else {})}
    if origin is tuple and len(args) != 1 and ... not in args:
        return {"type": "array", **({"prefixItems": [inner(arg) for arg in args]} if args else {})}
    if origin is dict:
        return {"type": "object", **({"additionalProperties": inner(args[1])} if len(args) == 2 else {})}
    raise TypeError(hint)


def _union(members: list[dict[str, Any]], *, is_nullable: bool) -> dict[str, Any]:
    if len(members) == 1:
        merged = members[0]
    elif all(isinstance(member.get("type"), str) for member in members):
        merged = {"type": sorted(member["type"] for member in members)}
    else:
        merged = {"anyOf": members}
    return merged | ({"nullable": True} if is_nullable else {})
