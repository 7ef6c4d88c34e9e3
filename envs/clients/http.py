"""JSON over HTTP to the user's own servers: bounded in time, size and concurrency, retried, gentle to one that is down.

*Covered*: connection errors, time-outs, 5xx, redirects to elsewhere, bodies cut off or endless, compressed bombs,
servers that restart or are gone: a call ends within the sum of its time-outs, pauses, queues and `breaker_wait_s`; an
answer that comes late or twice answers nobody else. *Not covered*: proxies from the environment, cookies (none are
kept: they would tie rollouts together), other methods than POST, use from two event loops at once.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yarl import URL

from envs.errors import UserError, WorldError
from envs.limits.clocks import stopped_clocks
from envs.reading.variables import expand, uses
from envs.secrets import keep_header

if TYPE_CHECKING:
    # A fifth of what a script takes to start, for runs that ask no server.
    import aiohttp

_RETRIED_STATUSES = (408, 425, 429)
"""The server says "later"; what to do about that is not the model's to learn."""
_SAME_METHOD_REDIRECTS = (307, 308)
_MAX_REDIRECTS = 3
_MAX_CONNECT_S = 30.0
_MAX_SHOWN = 200
_METRICS = ("requests", "retries", "failures", "timeouts", "too_large", "breaker_opened", "breaker_wait_s")
# Its own generator: the run's must not depend on how often a server failed.
_jitter = random.Random()


class RequestTooLarge(ValueError):
    """The request's body is above the limit; nothing was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """How much of a server is asked, and for how long."""

    timeout_s: float = 600.0
    """For one attempt, from connecting to the last byte."""
    max_retries: int = 3
    backoff_s: float = 1.0
    """Mean pause before the first retry; it doubles with each, up to `max_backoff_s`."""
    max_backoff_s: float = 30.0
    max_concurrency: int = 64
    """Requests in flight of one `HttpCaller`."""
    max_request_bytes: int = 1_000_000
    max_response_bytes: int = 1_000_000
    rate_limit: float | None = None
    """Requests a second of one `HttpCaller`, retries included."""
    breaker_failures: int = 8
    """After so many failures in a row, whoever met them, a server counts as down and is sent one probe at a time."""
    breaker_probe_s: float = 0.5
    """Pause before the first probe; it doubles with each, up to ten times this."""
    breaker_wait_s: float = 60.0
    """How long one call waits, all in all, for a server that is down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    """What a server answered."""

    status: int
    body: bytes
    """Empty where the answer is too large."""
    too_large: bool = False
    """The answer is above the limit; the rest of it was not read."""

    @property
    def text(self) -> str:
        """The body as text; bytes that are not UTF-8 are replaced."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body's value; `ValueError` where it holds no JSON that Python can keep."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("JSON that is nested too deep") from None


def resolve_headers(headers: Mapping[str, str], where: str, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers with each ${NAME} replaced (see `envs.reading.variables`); `where` names their place in the config.

    Raises `UserError` for a variable that is not set and for a value that can't stand in a header.
    """
    resolved: dict[str, str] = {}
    for name, text in headers.items():
        value = expand(text, where, own)
        if not name or any(ord(char) < 32 or ord(char) == 127 for char in name + value):
            raise UserError(f"{where}: header {name!r}: expected a name and a value on one line")
        # What is a rollout's own is none, and would be another one for each of them.
        if not any(uses(text, variable) for variable in own or ()):
            keep_header(name, value)
        resolved[name] = value
    return resolved


class HttpServer:
    """What all callers of one server share: the connections and the circuit breaker.

    The session is made on the loop that runs when it is first needed; after `aclose` another one may follow.
    """

    def __init__(self, limits: HttpLimits) -> None:
        # Now, and not while a loop would wait for it.
        importlib.import_module("aiohttp")
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None
        self._failures_in_a_row = 0
        self._is_open = False
        self._is_probing = False
        self._probe_pause_s = limits.breaker_probe_s
        self._changed: asyncio.Event | None = None

    @property
    def is_down(self) -> bool:
        """The breaker is open."""
        return self._is_open

    def session(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Callers bound their concurrency themselves. A connection for each request: what comes late on one that
                # is used again (a proxy that retries, a server that answers twice) would answer the next request.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def admit(self, wait_s: float) -> bool:
        """Wait until a request may go out; True for the one that probes a server that is down.

        A probe ends with `succeeded`, `failed` or `abandoned`. Raises `TimeoutError` after `wait_s`.
        """
        if not self._is_open:
            return False
        async with asyncio.timeout(wait_s):
            while self._is_open:
                if self._changed is None:
                    self._changed = asyncio.Event()
                if self._is_probing:
                    await self._changed.wait()
                    continue
                self._is_probing = True
                try:
                    await asyncio.sleep(self._probe_pause_s)
                except asyncio.CancelledError:
                    self.abandoned()
                    raise
                if self._is_open:
                    return True
        return False

    def succeeded(self) -> None:
        """The server answered: the breaker closes, whoever asked."""
        self._failures_in_a_row = 0
        self._probe_pause_s = self._limits.breaker_probe_s
        self._is_open = False
        self.abandoned()

    def failed(self, is_probe: bool) -> bool:
        """Count a failure; True where it opened the breaker."""
        if is_probe:
            self._probe_pause_s = min(2 * self._probe_pause_s, 10 * self._limits.breaker_probe_s)
            self.abandoned()
        self._failures_in_a_row += 1
        if self._is_open or self._failures_in_a_row < self._limits.breaker_failures:
            return False
        self._is_open = True
        return True

    def abandoned(self) -> None:
        """The probe is over; the next in line may try."""
        self._is_probing = False
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@dataclass(slots=True)
class _Patience:
    """How long a call still waits for a server that is down."""

    left_s: float


class _Failed(Exception):
    """One attempt failed for a reason that another may not meet."""


class HttpCaller:
    """Posts JSON to one URL. Callers of the same server may share an `HttpServer`; without one, each has its own."""

    def __init__(
        self, *, url: str, headers: Mapping[str, str], limits: HttpLimits, server: HttpServer | None = None
    ) -> None:
        try:
            self._url = URL(url)
        except ValueError as e:
            raise UserError(f"{url}: not a URL: {e}") from None
        self._shown_url = str(self._url.with_user(None).with_query(None))
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._limits = limits
        self._server = server or HttpServer(limits)
        self._owns_server = server is None
        self._slots = asyncio.Semaphore(limits.max_concurrency)
        self._next_start = 0.0
        self._metrics = dict.fromkeys(_METRICS, 0.0)

    async def post(self, payload: Any, *, check: Callable[[HttpReply], object] = lambda reply: None) -> HttpReply:
        """The answer, of status 200 to 299 or 400 to 499.

        `check` raises `ValueError` for an answer that is the server's fault (no JSON, say): it is treated as a 5xx is.
        It sees no answer that is too large. 408, 425 and 429 are retried as well. Raises `RequestTooLarge`, and
        `WorldError` when the server failed for good: after `max_retries` retries, or after `breaker_wait_s` of waiting
        for one that is down.
        """
        body = _encode(payload)
        if len(body) > self._limits.max_request_bytes:
            raise RequestTooLarge(
                f"the request has {len(body):,} bytes; at most {self._limits.max_request_bytes:,} are sent"
            )
        patience = _Patience(self._limits.breaker_wait_s)
        cause: Exception | None = None
        for attempt in range(1 + self._limits.max_retries):
            if attempt:
                self._metrics["retries"] += 1
                await asyncio.sleep(self._backoff_s(attempt))
            try:
                is_probe = await self._take_slot(patience)
            except TimeoutError:
                down = f"the server is down; waited {self._limits.breaker_wait_s:g} s for it"
                raise self._given_up(attempt, f"{down}; last: {cause}" if cause else down) from None
            try:
                return await self._attempt(body, check, is_probe)
            except _Failed as e:
                cause = e
            finally:
                self._slots.release()
        raise self._given_up(1 + self._limits.max_retries, str(cause))

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call, and the seconds spent waiting for a server that was down."""
        taken, self._metrics = self._metrics, dict.fromkeys(_METRICS, 0.0)
        return taken

    async def aclose(self) -> None:
        """Close the connections, unless they are shared."""
        if self._owns_server:
            await self._server.aclose()

    async def _take_slot(self, patience: _Patience) -> bool:
        """Past the breaker, the rate limit and the queue; True for a probe. The caller holds a slot then.

        Raises `TimeoutError` when the patience ends at the breaker; the other waits are bounded by those ahead.
        """
        while True:
            start = time.monotonic()
            try:
                is_probe = await self._server.admit(patience.left_s)
            finally:
                waited_s = time.monotonic() - start
                patience.left_s -= waited_s
                self._metrics["breaker_wait_s"] += waited_s
            try:
                with stopped_clocks():
                    await self._keep_rate()
                    await self._slots.acquire()
            except asyncio.CancelledError:
                if is_probe:
                    self._server.abandoned()
                raise
            # It may have gone down while this call was in the queue.
            if is_probe or not self._server.is_down:
                return is_probe
            self._slots.release()

    async def _keep_rate(self) -> None:
        if self._limits.rate_limit is None:
            return
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 1 / self._limits.rate_limit
        await asyncio.sleep(start - now)

    async def _attempt(self, body: bytes, check: Callable[[HttpReply], object], is_probe: bool) -> HttpReply:
        """One attempt, its outcome told to the breaker on every path."""
        import aiohttp

        self._metrics["requests"] += 1
        try:
            reply = await self._send(body)
            if reply.too_large:
                self._metrics["too_large"] += 1
            else:
                check(reply)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, _Failed) as e:
            self._metrics["timeouts"] += isinstance(e, TimeoutError)
            self._metrics["breaker_opened"] += self._server.failed(is_probe)
            raise _Failed(_words(e, self._limits.timeout_s)) from None
        except BaseException:
            if is_probe:
                self._server.abandoned()
            raise
        self._server.succeeded()
        return reply

    async def _send(self, body: bytes) -> HttpReply:
        import aiohttp

        limit_s = self._limits.timeout_s
        url = self._url
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=min(limit_s, _MAX_CONNECT_S))
        for _ in range(1 + _MAX_REDIRECTS):
            async with self._server.session().post(
                url, data=body, headers=self._headers, allow_redirects=False, timeout=timeout
            ) as response:
                if 300 <= response.status < 400:
                    url = self._redirected(response)
                    continue
                reply = await self._read(response)
                # Of 1xx and below only broken servers are left here: 101, say, or 0.
                if reply.status < 200 or reply.status >= 500 or reply.status in _RETRIED_STATUSES:
                    raise _Failed(f"HTTP {reply.status}: {reply.text[:_MAX_SHOWN].strip()}".rstrip(": "))
                return reply
        raise _Failed(f"more than {_MAX_REDIRECTS} redirects")

    def _redirected(self, response: aiohttp.ClientResponse) -> URL:
        """Where a redirect leads; only within the server, so that its headers and data reach nobody else."""
        target = response.url.join(URL(response.headers.get("Location", "")))
        if response.status not in _SAME_METHOD_REDIRECTS or target.origin() != self._url.origin():
            raise _Failed(f"HTTP {response.status}: redirects to {str(target)[:_MAX_SHOWN]}, which is not followed")
        return target

    async def _read(self, response: aiohttp.ClientResponse) -> HttpReply:
        limit = self._limits.max_response_bytes
        parts: list[bytes] = []
        num_bytes = 0
        async for part in response.content.iter_any():
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > limit:
                # Closed, not released: releasing would read the rest for the sake of the connection.
                response.close()
                return HttpReply(status=response.status, body=b"", too_large=True)
        return HttpReply(status=response.status, body=b"".join(parts))

    def _backoff_s(self, attempt: int) -> float:
        mean: float = min(self._limits.backoff_s * 2.0 ** (attempt - 1), self._limits.max_backoff_s)
        # Jitter: calls that failed together must not come back together.
        return mean * _jitter.uniform(0.5, 1.5)

    def _given_up(self, attempts: int, cause: str) -> WorldError:
        self._metrics["failures"] += 1
        return WorldError(f"{self._shown_url}: failed after {attempts} attempt{'s' * (attempts != 1)}: {cause}")


def _encode(payload: Any) -> bytes:
    try:
        return json.dumps(payload, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # The model wrote half of a surrogate pair; escaped, it is still JSON.
        return json.dumps(payload).encode()


def _words(error: Exception, timeout_s: float = 0.0) -> str:
    if isinstance(error, TimeoutError) and timeout_s and not str(error):
        return f"no answer within {timeout_s:g} s"
    return str(error) or type(error).__name__
