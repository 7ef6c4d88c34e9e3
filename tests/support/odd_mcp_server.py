"""An MCP server over stdio that speaks as no SDK would. argv: what each call is answered with, then anything.

It notes its calls in the file `notes.json` of the folder it runs in, as servers that keep state in a file do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTES = Path("notes.json")
ANY = {"type": "object"}
NEVER_MET = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS: list[Any] = [
    {
        "name": "note",
        "description": "Note it.",
        "inputSchema": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "owner": {"type": "string"}, "level": {}},
            "required": ["text", "owner"],
        },
    },
    {"name": "notes", "inputSchema": ANY},
    {"name": "tell", "inputSchema": ANY, "outputSchema": NEVER_MET},
    {"name": "refuse", "inputSchema": ANY},
    {"name": "bare"},
    {"name": "strange", "description": None, "inputSchema": "none"},
    {
        "name": "loose",
        "inputSchema": {"properties": {"q": {"type": "any", "required": True, "pattern": "^\\p{L}(?<a>.)"}}},
    },
    {"inputSchema": ANY},
    "nothing",
]
ANSWERS: dict[str, str | bytes] = {
    "surrogate": '{"content": [{"type": "text", "text": "a\\ud83d b"}]}',
    "latin": b'{"content": [{"type": "text", "text": "caf\xe9"}]}',
    "unstructured": '{"content": [{"type": "text", "text": "as text"}]}',
    "mismatched": '{"content": [{"type": "text", "text": "as text"}], "structuredContent": {"n": "x"}}',
    "structured": '{"structuredContent": [1, 2]}',
    "hologram": '{"content": [{"type": "hologram"}, "as text", 7]}',
    "null": '{"content": null}',
    "one": '{"content": {"type": "text", "text": "as text"}}',
    "string": '"as text"',
    "list": "[1]",
    "nothing": "null",
    "cut": '{"content": [{"type": "text", "te',
    "deep": "[" * 100_000,
    "endless": "",
}
FORMS: dict[str, Callable[[Any], str]] = {
    "printed": lambda message: json.dumps(message, indent=2),
    "printed by lines": lambda message: json.dumps({**message, "more": ["x", {}, None]}, indent=2).replace(
        "\n", "\r\n"
    ),
    "listed": lambda message: json.dumps([{"jsonrpc": "2.0", "method": "notifications/message"}, message]),
    "unmarked": lambda message: json.dumps({"id": message["id"], "result": message["result"]}),
    "unmarked error": lambda message: json.dumps({"id": message["id"], "error": {"code": -32602, "message": "no"}}),
}


def result_of(name: str, params: dict[str, Any]) -> dict[str, Any]:
    arguments = params.get("arguments") or {}
    if name == "refuse":
        return {"content": [{"type": "text", "text": "locked"}], "isError": True}
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else []
    if name == "note":
        NOTES.write_text(json.dumps([*notes, arguments]))
    told = {"argv": sys.argv[1:], "env": os.environ.get("GIVEN"), "cwd": str(Path.cwd()), "meta": params.get("_meta")}
    shown = told if name == "tell" else notes
    return {"content": [{"type": "text", "text": json.dumps(shown)}]}


def main() -> None:
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "id" not in asked:
            continue
        params, answer, error = asked.get("params") or {}, b"", b""
        if asked["method"] == "initialize":
            about = {"name": "odd", "version": "1"}
            result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": about}
        elif asked["method"] == "tools/list":
            result = {"tools": TOOLS}
        elif asked["method"] != "tools/call":
            error = b'{"code": -32601, "message": "not known"}'
        elif params["name"] == "tell" and sys.argv[1] in ANSWERS:
            said = ANSWERS[sys.argv[1]] or '{"content": "' + "x" * 20_000_000 + '"}'
            answer = said.encode() if isinstance(said, str) else said
        else:
            result = result_of(params["name"], params)
        form = sys.argv[1] if asked["method"] == "tools/call" and params["name"] == "tell" else ""
        kind, body = (b"error", error) if error else (b"result", answer or json.dumps(result).encode())
        message = b'{"jsonrpc": "2.0", "id": %d, "%s": %s}' % (asked["id"], kind, body)
        if form in FORMS:
            message = FORMS[form](json.loads(message)).encode()
        sys.stdout.buffer.write(message + b"\n")
        sys.stdout.buffer.flush()


main()
