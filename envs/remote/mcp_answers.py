"""What MCP servers answer, read as far as it can be: a request never waits for an answer that has come.

*Covered*: lone halves of surrogate pairs; a result that is no object, or cut off: an error at once; lists of tools with
entries that are none; what is odd about tools and contents besides what is read of them; content of unknown kinds, or
null; output schemas, which are not enforced (the server's text counts); messages without an end; a refusal by HTTP
status, which is told; an answer without `jsonrpc`: an error at once; over stdio, answers in a list, and one that is
spread over lines as JSON is printed for people. *Not covered*: what a server writes to its standard error, which goes
to a file; a list that is spread over lines.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage
    from mcp_types import CallToolResult

_ID = re.compile(r'"id"\s*:\s*(\d+|"[^"\\]*")')
_MAX_SHOWN = 200
MAX_MESSAGE_BYTES = 16 * 2**20
"""The largest message that is read at all. Over HTTP a larger one breaks the connection; over stdio it is cut there."""
BOUNDED_LINES = "agent-rft-bounded-lines"
"""The name of UTF-8 whose lines end after `MAX_MESSAGE_BYTES` characters: the SDK keeps what a server writes over stdio
until the line ends, and knows of no end but the encoding's."""


class _BoundedLines(codecs.IncrementalDecoder):
    """The rest of a line that is too long is left out, up to its end; what is given out of it can be read by nobody."""

    def __init__(self, errors: str = "strict") -> None:
        super().__init__(errors)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._left = MAX_MESSAGE_BYTES

    def decode(self, data: Any, final: bool = False) -> str:
        first, *more = self._decoder.decode(data, final).split("\n")
        out = [self._taken(first)]
        for line in more:
            # The end of a line that was cut has been given out already.
            out.append("\n" if self._left else "")
            self._left = MAX_MESSAGE_BYTES
            out.append(self._taken(line))
        return "".join(out)

    def _taken(self, text: str) -> str:
        if len(text) < self._left:
            self._left -= len(text)
            return text
        taken = text[: self._left]
        was_open, self._left = self._left > 0, 0
        return taken + "\n" * was_open


def _find_codec(name: str) -> codecs.CodecInfo | None:
    # Python asks for it in letters of its own choice.
    if name.replace("_", "-") != BOUNDED_LINES:
        return None
    utf8 = codecs.lookup("utf-8")
    return codecs.CodecInfo(utf8.encode, utf8.decode, incrementaldecoder=_BoundedLines, name=BOUNDED_LINES)


codecs.register(_find_codec)


async def make_readable(response: Any) -> None:
    """A response hook of the SDK's HTTP client, which reads JSON less kindly than streams, and tells no status."""
    import httpx2

    is_json = response.headers.get("content-type", "").lower().startswith("application/json")
    # The SDK knows by this status that a session has ended, but where the body is an error of the server's own.
    if response.status_code == 404 and "mcp-session-id" in response.request.headers:
        response.headers["content-type"] = "text/plain"
        return
    is_refusal = response.status_code >= 400 and response.status_code != 404 and response.request.method == "POST"
    if not is_json and not is_refusal:
        return
    whole = response.stream

    class Readable(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            body = b"" if is_json else await _beginning(whole)
            if is_json:
                text = b"".join([part async for part in whole]).decode("utf-8-sig", "replace")
                with contextlib.suppress(ValueError, RecursionError):
                    text = json.dumps(json.loads(text), ensure_ascii=False)
                body = text.encode("utf-8", "replace")
            yield _told_refusal(response, body) if is_refusal else body

        async def aclose(self) -> None:
            await whole.aclose()

    response.stream = Readable()
    response.headers["content-type"] = "application/json"


async def _beginning(stream: Any) -> bytes:
    begun = b""
    async for part in stream:
        begun += part
        if len(begun) >= 4 * _MAX_SHOWN:
            break
    return begun


def _told_refusal(response: Any, body: bytes) -> bytes:
    """The server's own JSON-RPC error, or one that says what the response's status is."""
    from mcp_types import INTERNAL_ERROR, JSONRPCError, jsonrpc_message_adapter

    with contextlib.suppress(ValidationError):
        if isinstance(jsonrpc_message_adapter.validate_json(body, by_name=False), JSONRPCError):
            return body
    said = " ".join(body.decode("utf-8", "replace").split())
    status = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    message = f"{status}: {said:.{_MAX_SHOWN}}" if said else status
    # The SDK puts the request's id in its place.
    error = {"code": INTERNAL_ERROR, "message": message}
    return json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()


@contextlib.asynccontextmanager
async def readable(transport: Any) -> AsyncIterator[Any]:
    """An SDK transport whose stream gives messages that the SDK can read."""
    async with transport as (read, write):
        yield _Readable(read), write


class _Readable:
    """The SDK's `ReadStream`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._next: deque[Any] = deque()
        self._begun = ""
        """Of a message that is spread over several lines."""

    @property
    def last_context(self) -> Any:
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> Any:
        if not self._next:
            self._next += self._read(await self._stream.receive())
        return self._next.popleft()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> _Readable:
        return self

    async def __anext__(self) -> Any:
        if not self._next:
            self._next += self._read(await self._stream.__anext__())
        return self._next.popleft()

    async def __aenter__(self) -> _Readable:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *of: Any) -> bool | None:
        left: bool | None = await self._stream.__aexit__(*of)
        return left

    def _read(self, item: Any) -> list[Any]:
        """The messages of an item, or the error that the SDK made of one."""
        if isinstance(item, ValidationError):
            return [_plain(message) for message in _mended(self._joined(_line_of(item)))] or [item]
        return [_plain(item)]

    def _joined(self, line: str) -> str:
        """The line, or all of the object that ends with it, where its braces stand alone and its members further in."""
        line = line.rstrip()
        if line == "{":
            self._begun = line
        elif self._begun:
            self._begun += f"\n{line}"
            line, self._begun = (self._begun, "") if line == "}" else (line, self._begun)
            if len(self._begun) > MAX_MESSAGE_BYTES:
                self._begun = ""
        return line


def _line_of(error: ValidationError) -> str:
    """What could not be read, as it came or as JSON writes it."""
    faults = error.errors(include_url=False, include_context=False)
    # Where an object lacks something the fault holds the object, else what is wrong in it.
    first = min(faults, key=lambda fault: (fault["type"] != "missing", len(fault["loc"])))
    return str(first["input"]) if first["type"] == "json_invalid" else json.dumps(first["input"])


def _mended(text: str) -> list[SessionMessage]:
    """The messages in a text, of a list each of them: as they are, or as the error that who waits for it is told."""
    said: Any = text
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
    parts = said if isinstance(said, list) else [said]
    return [message for part in parts if (message := _message_of(part)) is not None]


def _message_of(said: Any) -> SessionMessage | None:
    """None where nobody can be known to wait for it. `said` is a value, or a text that holds none."""
    from mcp.shared.message import SessionMessage
    from mcp_types import JSONRPCError, jsonrpc_message_adapter
    from mcp_types.jsonrpc import PARSE_ERROR, ErrorData

    if not isinstance(said, str):
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(said, ensure_ascii=False).encode("utf-8", "replace")
            return SessionMessage(jsonrpc_message_adapter.validate_json(text, by_name=False))
    request_id, shown, why = None, said, ""
    if isinstance(said, dict) and ("jsonrpc" in said or said.keys() <= {"id", "result", "error"}):
        request_id, shown = said.get("id"), said.get("result", said.get("error"))
        why = "" if "jsonrpc" in said else ' (it has no "jsonrpc": "2.0")'
    elif isinstance(said, str) and '"jsonrpc"' in said and (found := _ID.search(said)):
        request_id = json.loads(found[1])
    if not isinstance(request_id, int | str):
        return None
    fault = ErrorData(code=PARSE_ERROR, message=f"an answer that can't be read{why}: {shown!r:.{_MAX_SHOWN}}")
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=fault))


def _plain(item: Any) -> Any:
    from mcp_types import JSONRPCResponse

    message = getattr(item, "message", None)
    if isinstance(message, JSONRPCResponse):
        _make_plain(message.result)
    return item


def _make_plain(result: dict[str, Any]) -> None:
    """Leaves of tools and of contents what is read of them: the SDK refuses the whole for the sake of any part."""
    if not isinstance(result.get("_meta", {}), dict):
        del result["_meta"]
    if isinstance(tools := result.get("tools"), list):
        result["tools"] = [plain for tool in tools if (plain := _plain_tool(tool)) is not None]
    if "content" in result or "structuredContent" in result:
        content = result.get("content")
        blocks = content if isinstance(content, list) else [] if content is None else [content]
        result["content"] = [{"type": "text", "text": _text_of_block(block)} for block in blocks]
        if not isinstance(result.get("structuredContent", {}), dict):
            result["structuredContent"] = {"result": result["structuredContent"]}
        if result.get("isError", False) is None:
            del result["isError"]


def _plain_tool(tool: Any) -> dict[str, Any] | None:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or not tool["name"]:
        return None
    plain = {"name": tool["name"], "inputSchema": _plain_schema(tool.get("inputSchema"))}
    if isinstance(description := tool.get("description"), str):
        plain["description"] = description
    return plain


def _plain_schema(schema: Any) -> dict[str, Any]:
    """What the SDK looks at in it is as it wants it; the rest stays."""
    # The protocol's newer versions insist on the type; schemas may leave it out.
    plain: dict[str, Any] = {**(schema if isinstance(schema, dict) else {}), "type": "object"}
    if not isinstance(plain.get("$schema", ""), str):
        del plain["$schema"]
    if "properties" in plain:
        # PHP writes [] for an object without keys.
        properties = plain["properties"] if isinstance(plain["properties"], dict) else {}
        plain["properties"] = {name: of if isinstance(of, dict | bool) else {} for name, of in properties.items()}
    if "required" in plain:
        required = plain["required"] if isinstance(plain["required"], list) else []
        plain["required"] = [name for name in required if isinstance(name, str)]
    return plain


def _text_of_block(block: Any) -> str:
    if isinstance(block, str):
        return block
    if not isinstance(block, dict):
        return f"[{type(block).__name__}]"
    kind, text = block.get("type"), block.get("text")
    if kind == "text":
        return text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False)
    if kind not in ("resource", "resource_link"):
        return f"[{kind}]"
    resource = block.get("resource") if kind == "resource" else block
    resource = resource if isinstance(resource, dict) else {}
    text = resource.get("text") if kind == "resource" else None
    return text if text and isinstance(text, str) else f"[resource {resource.get('uri', '')}]"


def text_of(result: CallToolResult) -> str:
    """Texts joined; other content is named; structured content as JSON where there is nothing else."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(block.text for block in result.content if block.type == "text")
