"""Ports of this machine at which a server of ours is to listen."""

from __future__ import annotations

import socket

from envs.errors import UserError

FAULTS = (OSError, OverflowError, UnicodeError)
"""What listening at a port may raise: taken or forbidden, no port at all, no name of a host."""


def check_free(host: str, port: int, where: str, *, family: int = socket.AF_UNSPEC) -> None:
    """Raise `UserError` that begins with `where` where nobody could listen at this moment: it is tried, and given up.

    `family` is of the address, where a name has several.
    """
    try:
        # The port is given to bind as it is: getaddrinfo would make one of any number.
        family, _, _, _, address = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            # As servers do: what one that ended a moment ago has left is no hindrance.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((address[0], port, *address[2:]))
            tried.listen(1)
    except FAULTS as e:
        raise UserError(refusal(host, port, where, e)) from None


def refusal(host: str, port: int, where: str, e: Exception) -> str:
    """What is said of one of `FAULTS`."""
    why = getattr(e, "strerror", None) or str(e)
    return f"{where}: {host}:{port} can't be listened at ({why}); choose another port, or host"
