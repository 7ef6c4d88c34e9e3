"""What a user wrote as one value: a file with a config, a grader, a list of tools; or a `KEY=VALUE` beside it."""

from __future__ import annotations

import errno
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from envs.errors import UserError
from envs.reading.json_text import read_strict_json

_YAML = (".yaml", ".yml")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _DistinctKeys(yaml.SafeLoader):
    """YAML's safe loader, by which a key can't stand twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            # Several `<<` may be merged, and give way to what stands here.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} stands twice in one mapping; expected it once"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(text: str) -> Any:
    """The value. Raises `yaml.YAMLError`, also for a key that stands twice, `ValueError` or `RecursionError`."""
    return yaml.load(text, _DistinctKeys)


def read_document(path: Path, where: str) -> Any:
    """The value: JSON in a file that is named so, YAML in one that is, and what it is in any other.

    YAML's reader is not for JSON: it splits the characters beyond 16 bits that JSON escapes, and takes no tabs. A byte
    order mark is passed over; a key that stands twice in one mapping is refused in either. Raises `UserError` that
    begins with `where`, with the place of what can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{where}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text: {e.reason} at byte {e.start}") from e
    except ValueError as e:
        # No file has such a name: it holds a NUL.
        raise UserError(f"{where}: {e}") from e
    suffix = path.suffix.lower()
    if suffix not in _YAML:
        try:
            return read_strict_json(text)
        except ValueError as e:
            if suffix == ".json":
                raise UserError(f"{where}: {e}") from None
    try:
        return read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid {'YAML' if suffix in _YAML else 'JSON or YAML'}: {e}") from e


def check_writable(path: Path, where: str, *, is_folder: bool = False) -> None:
    """Raise `UserError` where what is to be written in the end can't be: nothing of it is made here.

    `where` names the option or key. Of a folder those above it may be missing too. That a folder takes files is tried,
    by one that leaves no trace: modes say nothing to root, and nothing of file systems such as /proc.
    """
    place = path
    try:
        if path.exists() and path.is_dir() != is_folder:
            what = "file; expected a folder" if is_folder else "folder; expected a file"
            raise UserError(f"{where} {path}: is a {what}")
        if not is_folder and not path.exists():
            place = path.parent
        while is_folder and not (place.exists() or place.is_symlink()):
            place = place.parent
        if not place.exists():
            why = f"{place} is a link to what is not there" if place.is_symlink() else f"there is no folder {place}"
            raise UserError(f"{where} {path}: {why}")
        if place != path and not place.is_dir():
            raise UserError(f"{where} {path}: {place} is a file; expected a folder")
        if place.is_dir():
            tempfile.TemporaryFile(dir=place).close()
        elif not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise UserError(f"{where} {path}: can't be written: {place} takes no files: {e.strerror or e}") from e


def from_file(what: str) -> Callable[[Any], Any]:
    """For a setting that may be given as a path: text is taken for one and read, anything else is the value itself."""

    def read(value: Any) -> Any:
        return read_document(Path(value), f"{what} file {value}") if isinstance(value, str) else value

    return read


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key in place, by `key.sub=value` with a value in YAML; of a key given twice the later goes.

    Raises `UserError`.
    """
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r}: expected KEY=VALUE, for example optim.learning_rate=2e-5")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is not a section{_instead(node)}")
    try:
        node[last] = read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        problem = getattr(e, "problem", None) or str(e)
        raise UserError(f"override {override!r}: the value is not valid YAML: {problem}") from e
    node[last] = as_number(node[last])


def override_of(key: str, text: str) -> str:
    """The `KEY=VALUE` that sets a text as it is, whatever it holds; YAML has no pairs of escapes, as JSON has."""
    return f"{key}={yaml.safe_dump(text, default_style=chr(34), width=math.inf).rstrip()}"


def as_number(value: Any) -> Any:
    """YAML 1.1 reads 2e-5 as text; people write it as a number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _instead(node: Any) -> str:
    if isinstance(node, list):
        return "; a list is given as a whole: KEY=[...]"
    return f" but {node!r}" if isinstance(node, str) else ""
