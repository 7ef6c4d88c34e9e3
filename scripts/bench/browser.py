"""A headless Chromium driven through chromedriver: the few commands of the W3C WebDriver protocol that are needed here.

The protocol is JSON over HTTP; a client library would bring seven packages for these few commands.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from envs.errors import UserError

HOW_TO_INSTALL = "Chromium and its driver are needed: apt-get install chromium chromium-driver"
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
]
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The protocol's key of a reference to an element."""


def installed() -> tuple[str, str] | None:
    """The paths of Chromium and chromedriver; None where one of them is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Browser:
    """One window. `script` is the body of a function that may return a JSON value."""

    port: int
    session: str

    def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _request(self.port, method, f"/session/{self.session}/{path}", body)

    def open(self, url: str) -> None:
        """Returns when the page's load event has fired."""
        self.command("POST", "url", {"url": url})

    def script(self, source: str, *arguments: Any) -> Any:
        return self.command("POST", "execute/sync", {"script": source, "args": list(arguments)})

    def wait(self, source: str, *, timeout_s: float = 60) -> Any:
        """The first true value of the script. Raises `TimeoutError`."""
        end = time.monotonic() + timeout_s
        while not (value := self.script(source)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {timeout_s:g} s: {source}")
            time.sleep(0.02)
        return value

    def keys(self, text: str) -> None:
        """Press and release each key in turn, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.command("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, selector: str) -> None:
        self.command("POST", f"element/{self._find(selector)}/click", {})

    def hover(self, selector: str) -> None:
        """Scrolls to the element and moves the mouse onto it."""
        element = self._find(selector)
        self.script("arguments[0].scrollIntoView({block: 'center'})", {_ELEMENT: element})
        move = {"type": "pointerMove", "origin": {_ELEMENT: element}, "x": 0, "y": 0, "duration": 0}
        self.command("POST", "actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def errors(self) -> list[str]:
        """What the console has had to say since the last call: errors, and what the page's policy has forbidden."""
        return [entry["message"] for entry in self.command("POST", "se/log", {"type": "browser"})]

    def devtools(self, name: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self.command("POST", "goog/cdp/execute", {"cmd": name, "params": parameters})

    def _find(self, selector: str) -> str:
        found: dict[str, str] = self.command("POST", "element", {"using": "css selector", "value": selector})
        return found[_ELEMENT]


@contextlib.contextmanager
def browser(*, width_px: int = 1400, height_px: int = 900) -> Iterator[Browser]:
    """A browser with a profile of its own. Raises `UserError` where none is installed."""
    found = installed()
    if found is None:
        raise UserError(HOW_TO_INSTALL)
    chromium, driver = found
    with tempfile.TemporaryDirectory(prefix="agent-rft-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            port = _port_of(process)
            flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width_px},{height_px}"]
            options = {
                "goog:chromeOptions": {"binary": chromium, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            made = _request(port, "POST", "/session", {"capabilities": {"alwaysMatch": options}})
            session = Browser(port=port, session=made["sessionId"])
            yield session
            _request(port, "DELETE", f"/session/{session.session}", None)
        finally:
            # The driver's own group: its browser ends with it, whatever state the session is in.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _port_of(process: subprocess.Popen[str]) -> int:
    """The port that the driver chose, as it says on its standard output."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if match := re.search(r"started successfully on port (\d+)", line):
            return int(match[1])
    raise UserError(f"chromedriver did not start: {said.strip()}")


def _request(port: int, method: str, path: str, body: dict[str, Any] | None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
    finally:
        connection.close()
    if isinstance(value, dict) and "error" in value:
        raise RuntimeError(f"{method} {path}: {value['error']}: {value.get('message', '')}")
    return value
