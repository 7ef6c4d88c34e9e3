"""Whether the servers that a config names are there: one connection each, before anything is loaded.

*Covered*: tool servers, hooks, endpoint graders, the judge where a grader asks it, simulated users: nothing is asked of
them, but for models behind Chat Completions, which are asked for their list of models: a key that is refused there
would be refused at the first grading, with everything loaded. *Not covered*: whether it is the right server or knows
the model; MCP servers, which are asked for their tools as the world is built; what is reached through a proxy that the
environment names.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from envs.clients.urls import check_url
from envs.errors import UserError
from envs.limits.threads import within
from envs.reading.variables import expand, key_of
from envs.secrets import hidden_in
from envs.settings import AsksServers
from envs.terminal import say
from envs.users import ModelUserConfig, user_of
from graders.config import singles
from graders.registry import GRADERS
from graders.settings import GraderSettings
from trainer.config import RunConfig

PATIENCE_S = 60.0
"""How long a run waits for servers that are started beside it."""
_CONNECT_S = 5.0
_TRIES = 3
_PAUSE_S = 0.5
_LONG_PAUSE_S = 2.0
_MOST_LINES = 20


def servers_of(config: RunConfig) -> dict[str, str]:
    """The URLs that a run will ask, by their keys in the config. Raises `UserError` for a variable that is not set."""
    return {key: expand(url, key) for key, url in _servers(config)}


def check_servers(config: RunConfig, *, patience_s: float = 0.0) -> None:
    """Raise `UserError` that names key and URL of each server where nobody answers, `patience_s` long.

    That it waits is said at once, on standard error.
    """
    servers = servers_of(config)
    addresses = {key: _address(key, url) for key, url in servers.items()}
    end = time.monotonic() + patience_s
    waits = False
    while True:
        faults = _faults({address for address in addresses.values() if address is not None})
        dead = [
            f"{key} {hidden_in(servers[key])}: nobody answers there ({faults[address]})"
            for key, address in addresses.items()
            if address is not None and faults[address]
        ][:_MOST_LINES]
        if not dead:
            break
        if time.monotonic() >= end:
            raise UserError("\n  ".join([*dead]) + "; expected servers that run before the run starts")
        if not waits and os.environ.get("RANK", "0") == "0":
            say("\n  ".join([*dead, f"waiting for up to {patience_s:g} s"]), file=sys.stderr)
        waits = True
        time.sleep(_LONG_PAUSE_S)
    for key, name in _keys(config).items():
        if within(2 * _CONNECT_S, _is_refused, servers[f"{key}.base_url"], key_of(name, f"{key}.api_key_env")):
            raise UserError(
                f"{key}.api_key_env: {hidden_in(servers[f'{key}.base_url'])} refuses the key in {name} (HTTP 401); set "
                f"{name} to a key of this server's, or {key}.api_key_env to the variable that holds one"
            )


def judges_of(config: RunConfig) -> bool:
    """Whether one of the graders asks the judge."""
    return any(GRADERS[single.type].judge for single in _graders(config).values())


def _servers(config: RunConfig) -> Iterator[tuple[str, str]]:
    parts = {"world": config.world, "world.user": user_of(config.world), **_graders(config)}
    for key, part in parts.items():
        if isinstance(part, AsksServers):
            yield from ((f"{key}.{inner}", url) for inner, url in part.servers().items())
    if config.judge.base_url != "engine" and judges_of(config):
        yield "judge.base_url", config.judge.base_url


def _keys(config: RunConfig) -> dict[str, str]:
    """The variables of the keys that go to models behind a server, by the section that names both."""
    user = user_of(config.world)
    keys = {"world.user": user.api_key_env} if isinstance(user, ModelUserConfig) else {}
    if config.judge.base_url != "engine" and judges_of(config):
        keys["judge"] = config.judge.api_key_env
    return keys


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that it was meant for alone."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def _is_refused(base_url: str, key: str) -> bool:
    """Whether the server says of this key that it is none; whatever else it says may have other reasons."""
    request = urllib.request.Request(
        f"{base_url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key or 'none'}"}
    )
    try:
        urllib.request.build_opener(_NoRedirect).open(request, timeout=_CONNECT_S).close()
    except urllib.error.HTTPError as e:
        with e:
            return e.code == http.HTTPStatus.UNAUTHORIZED
    except (OSError, ValueError, http.client.HTTPException):
        pass
    return False


def _graders(config: RunConfig) -> dict[str, GraderSettings]:
    """By their keys; those of a multi in its place."""
    named = {"grader": config.grader, "watch_grader": config.watch_grader}
    return {f"{key}{inner}": one for key, grader in named.items() if grader for inner, one in singles(grader).items()}


def _address(key: str, url: str) -> tuple[str, int] | None:
    """Host and port; None where a proxy stands between."""
    host, port = check_url(key, url)
    proxied = urlsplit(url).scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    return None if proxied else (host, port)


def _faults(addresses: Collection[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """`_fault` of each, all at once."""
    with ThreadPoolExecutor(max(1, len(addresses))) as threads:
        return dict(zip(addresses, threads.map(_fault, addresses), strict=True))


def _fault(address: tuple[str, int]) -> str:
    """Why there is no connection, after some tries; empty where there is one."""
    fault = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            socket.create_connection(address, timeout=_CONNECT_S).close()
            return ""
        except TimeoutError:
            return f"no connection within {_CONNECT_S:g} s"
        except (OSError, UnicodeError) as e:
            fault = getattr(e, "strerror", None) or str(e)
    return fault
