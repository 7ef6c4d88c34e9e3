"""What every key of a config means: `python -m trainer.config.reference` prints docs/config.md.

Written from the JSON schema of `RunConfig`, so that a new key needs no other line. *Not covered*: what validators check
beyond a key's own bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.run import RunConfig

Node = Mapping[str, Any]

_HEAD = """# The keys of a config

A run is one YAML file; `scripts/train.py --config FILE KEY=VALUE ...` sets single keys, `optim.learning_rate=1e-4`
say. Unknown keys, NaN and infinite numbers are refused. A key without a default has to be given. This page is written
by `python -m trainer.config.reference`.

```yaml
output_dir: runs/mine
grader: {type: numeric}
```

A config may stand on another: `base` names its file, from the folder of the one that names it, and what stands here
goes before what stands there, key by key. Lists are taken whole, a section of another `type` too, and null
takes a section out. A base may have a base of its own. The run's folder holds the whole, without `base`.

```yaml
base: quickstart.yaml
output_dir: runs/longer
optim: {num_steps: 40}
```
"""


def page() -> str:
    """The whole of docs/config.md."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    alone = {name: node for name, node in schema["properties"].items() if not _parts(node, definitions)}
    lines = [_HEAD, "## On top", "", *_table(alone, set(schema["required"]), definitions)]
    seen: dict[str, str] = {}
    for name, node in schema["properties"].items():
        if name not in alone:
            lines += _section(name, node, definitions, seen)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, node: Node, definitions: Node, seen: dict[str, str]) -> Iterator[str]:
    """A heading for the key, one for each of its types, and what they hold; what stands elsewhere is named only."""
    parts = _parts(node, definitions)
    yield f"## `{name}`\n"
    yield _sentence(node.get("description", "")) + "\n"
    if all(part in seen for part in parts):
        yield f"The keys are those of `{seen[parts[0]]}`.\n"
        return
    for part in parts:
        kind = _type_of(definitions[part])
        title = f"{name}: {{type: {kind}}}" if kind else name
        if title != name:
            yield f"### `{title}`\n"
        yield from _keys_of(part, title, definitions, seen)


def _keys_of(part: str, title: str, definitions: Node, seen: dict[str, str]) -> Iterator[str]:
    seen[part] = title
    definition = definitions[part]
    if about := definition.get("description"):
        yield _sentence(about.split("\n\n")[0]) + "\n"
    rows = {key: node for key, node in definition.get("properties", {}).items() if key != "type"}
    yield from _table(rows, set(definition.get("required", ())), definitions)
    for key, node in rows.items():
        for inner in _parts(node, definitions):
            if inner in seen:
                continue
            kind = _type_of(definitions[inner])
            own = f"{title.partition(':')[0]}.{key}" + (f": {{type: {kind}}}" if kind else "")
            yield f"#### `{own}`\n"
            yield from _keys_of(inner, own, definitions, seen)


def _table(rows: Mapping[str, Node], required: set[str], definitions: Node) -> Iterator[str]:
    if not rows:
        return
    yield "| key | takes | default | what it is |"
    yield "|---|---|---|---|"
    for key, node in rows.items():
        default = "" if key in required else f"`{_short(node.get('default'))}`"
        about = _cell(node.get("description", ""))
        yield f"| `{key}` | {_cell(_takes(node, definitions))} | {default} | {about} |"
    yield ""


def _parts(node: Node, definitions: Node) -> list[str]:
    """The settings of their own that a key may hold, in a list or by name too."""
    if reference := node.get("$ref"):
        name = reference.rpartition("/")[2]
        return [name] if "properties" in definitions[name] else _parts(definitions[name], definitions)
    inner = [*node.get("oneOf", ()), *node.get("anyOf", ())]
    inner += [node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict)]
    return [part for choice in inner for part in _parts(choice, definitions)]


def _takes(node: Node, definitions: Node) -> str:
    """`at least 1`, `auto or lora`, a list of ..., as a schema's node says it."""
    if choices := [*node.get("oneOf", ()), *node.get("anyOf", ())]:
        told = [_takes(choice, definitions) for choice in choices]
        return " or ".join(dict.fromkeys(told))
    if "$ref" in node:
        definition = definitions[node["$ref"].rpartition("/")[2]]
        return "settings" if "properties" in definition else _takes(definition, definitions)
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{_short(node['const'])}`"
    kind = node.get("type", "any value")
    if "prefixItems" in node:
        return f"[{', '.join(_takes(item, definitions) for item in node['prefixItems'])}]"
    if kind == "array":
        return f"list of {_takes(node.get('items', {}), definitions)}"
    if kind == "object":
        inner = node.get("additionalProperties")
        return f"{_takes(inner, definitions)} by name" if isinstance(inner, dict) and inner else "settings by name"
    text = "path" if node.get("format") == "path" else "text"
    words = {"string": text, "integer": "whole number", "boolean": "yes or no"}
    bounds = [
        f"{word} {node[key]:g}"
        for key, word in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in node
    ]
    return " ".join([words.get(kind, str(kind)), ", ".join(bounds)]).strip()


def _type_of(definition: Node) -> str:
    """What the settings' `type` says, where they have one."""
    return str(definition.get("properties", {}).get("type", {}).get("const", ""))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "as below" if value else "{}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) or not text else ".")


if __name__ == "__main__":
    print(page(), end="")
