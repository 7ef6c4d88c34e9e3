"""What is told before vLLM is started."""

import socket
from pathlib import Path

import pytest

from envs.errors import UserError
from tests.support.scripts import run_script
from trainer.exports.serving import check_address


def test_a_port_that_is_taken_is_told_before_all_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = f"--port: 127.0.0.1:{port} can't be listened at (Address already in use); choose another port, or host"
        ended = run_script("serve", tmp_path / "no run", "--", "--host", "127.0.0.1", "--port", port)
        assert (ended.returncode, ended.stderr, ended.stdout) == (2, f"error: {told}\n", "")
        with pytest.raises(UserError, match=r"^--port: 0\.0\.0\.0:"):
            check_address([f"--port={port}", "--dtype", "auto"])
        for elsewhere in (["--uds", "/run/s"], ["--headless"]):
            check_address(["--port", port, *elsewhere])
    check_address(["--host", "127.0.0.1", "--port", port])
    with pytest.raises(UserError, match=r"^--port: 127\.0\.0\.1:99999 can't be listened at .*port must be 0-65535"):
        check_address(["--host", "127.0.0.1", "--port", "99999"])
    # What vLLM will refuse itself.
    check_address(["--port", "none"])
