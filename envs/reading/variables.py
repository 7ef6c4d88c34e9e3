"""`${NAME}` and `{{item.KEY}}` in what a config says: one rule wherever a secret, an id or a row can stand.

The config itself keeps the text, so that no secret reaches the run folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from envs.errors import UserError
from envs.secrets import VARIABLE, keep_header, keep_secret

NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
"""What an environment variable may be called."""
_ASKED = re.compile(r"\$\{input:[^{}]*\}")
"""What an editor asks its user for; nobody is there to be asked here."""
_ITEM = re.compile(r"\{\{\s*item((?:\.[\w-]+|\[\d+\])+)\s*\}\}")
_STEP = re.compile(r"[\w-]+")


def expand(text: str, where: str, own: Mapping[str, str] | None = None) -> str:
    """`text` with each ${NAME} replaced by `own`'s value or else the environment variable's.

    `${env:NAME}` says the same, and `${NAME:-text}` gives what stands for a variable that is not set, as other programs
    write them. `where` names the place in the config. Raises `UserError` for a variable that is not set.
    """
    if asked := _ASKED.search(text):
        raise UserError(f"{where}: {asked[0]}: nobody can be asked here; expected ${{NAME}}, an environment variable")

    def value_of(match: re.Match[str]) -> str:
        value = (own or {}).get(match[1], os.environ.get(match[1], match[2]))
        if value is None:
            raise UserError(f"{where}: the environment variable {match[1]} is not set")
        if own is None or match[1] not in own:
            keep_secret(match[1], value)
        return value

    return VARIABLE.sub(value_of, text)


def fill(value: Any, where: str, *, item: Mapping[str, Any], own: Mapping[str, str]) -> Any:
    """A JSON value with each ${NAME} and {{item.KEY}} in its texts replaced.

    A text that is nothing but one {{item.KEY}} becomes the row's value, of whatever type; elsewhere what is no text is
    written as JSON. Raises `UserError` for a key that the row does not have.
    """
    if isinstance(value, dict):
        return {key: fill(inner, where, item=item, own=own) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, where, item=item, own=own) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := _ITEM.fullmatch(value.strip()):
        return _of_row(item, whole[1], where)

    def text_of(match: re.Match[str]) -> str:
        found = _of_row(item, match[1], where)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    # The row's own text is not looked through for variables.
    parts = _ITEM.split(value)
    texts = [expand(text, where, own) for text in parts[::2]]
    filled = [text_of(match) for match in _ITEM.finditer(value)]
    return "".join(a + b for a, b in zip(texts, [*filled, ""], strict=True))


def uses(value: Any, name: str) -> bool:
    """Whether ${NAME} stands anywhere in a JSON value."""
    return f"${{{name}}}" in json.dumps(value)


def _of_row(item: Mapping[str, Any], path: str, where: str) -> Any:
    found: Any = item
    for step in _STEP.findall(path):
        try:
            found = found[int(step)] if isinstance(found, list) else found[step]
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"{where}: the row has no {{{{item{path}}}}}; its keys are: {', '.join(item)}") from None
    return found


def key_of(variable: str, where: str) -> str:
    """The key that an environment variable holds, from here on kept out of all that is said; empty: it is not set.

    What stands around it (a file's last line break) is cut off. Raises `UserError` that begins with `where`, the option
    or key that names the variable, for what no header can hold.
    """
    key = os.environ.get(variable, "").strip()
    keep_header("Authorization", key)
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: {variable} holds characters that no header can; expected the key alone, on one line")
    return key
