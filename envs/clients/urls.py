"""URLs of servers, as a config or an option gives them."""

from __future__ import annotations

from urllib.parse import urlsplit

from envs.errors import UserError
from envs.reading.variables import expand
from envs.secrets import hidden_in

_PORTS = {"http": 80, "https": 443}


def server_url(text: str, where: str) -> str:
    """The URL that stands at `where` in the config, its ${NAME}s replaced. Raises `UserError` as `check_url` does."""
    url = expand(text, where)
    check_url(where, url)
    return url


def check_url(where: str, url: str) -> tuple[str, int]:
    """Host and port. Raises `UserError` that begins with `where` for what is no URL of a server over HTTP."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or any(mark.isspace() for mark in parts.netloc):
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        return parts.hostname, parts.port or _PORTS[parts.scheme]
    except ValueError as e:
        raise UserError(f"{where} {hidden_in(url)}: not the URL of a server: {e}") from None
