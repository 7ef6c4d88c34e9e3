"""Bounds for HTTP clients of other packages (the openai package's, the MCP SDK's), which read answers whole."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

_MAX_SHOWN = 200
PLAIN = {"Accept-Encoding": "identity"}
"""Headers by which a server is asked not to compress what it answers."""


def bounded(max_bytes: int, *, streams: bool = False) -> Callable[[Any], Awaitable[None]]:
    """A response hook for clients of httpx's kind (the openai package's, the MCP SDK's), which read answers whole.

    Their `ReadError` is raised for an answer above `max_bytes`, and for a compressed one, which may grow a
    thousandfold: the client has to ask by `PLAIN`. With `streams`, streams of events are left to who reads them, event
    by event; a client that has asked for none reads such an answer whole like any other.
    """

    async def refuse_or_bound(response: Any) -> None:
        if streams and response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            return
        # httpx, or httpx2, which is another library with the same classes.
        library = importlib.import_module(type(response).__module__.partition(".")[0])
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise library.ReadError(f"the answer is compressed ({coding[:_MAX_SHOWN]}), which was not asked for")
        whole = response.stream

        class Bounded(library.AsyncByteStream):  # type: ignore[misc, name-defined]
            async def __aiter__(self) -> AsyncIterator[bytes]:
                num_bytes = 0
                async for part in whole:
                    num_bytes += len(part)
                    if num_bytes > max_bytes:
                        raise library.ReadError(f"the answer is too large; at most {max_bytes:,} bytes are read")
                    yield part

            async def aclose(self) -> None:
                await whole.aclose()

        response.stream = Bounded()

    return refuse_or_bound
