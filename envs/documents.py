"""A file that holds one value which a user wrote: a config, a grader, a list of tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from envs.errors import UserError
from envs.json_text import read_strict_json

_YAML = (".yaml", ".yml")


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
    suffix = path.suffix.lower()
    if suffix not in _YAML:
        try:
            return read_strict_json(text)
        except ValueError as e:
            if suffix == ".json":
                raise UserError(f"{where}: {e}") from None
    try:
        return yaml.load(text, _DistinctKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid {'YAML' if suffix in _YAML else 'JSON or YAML'}: {e}") from e


def from_file(what: str) -> Callable[[Any], Any]:
    """For a setting that may be given as a path: text is taken for one and read, anything else is the value itself."""

    def read(value: Any) -> Any:
        return read_document(Path(value), f"{what} file {value}") if isinstance(value, str) else value

    return read
