"""One run that is exported in many ways."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.run_server import Server, write_config


@pytest.fixture(scope="package")
def finished(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the scripted engine; the last two have a checkpoint."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    server.start(write_config(folder, tiny_model, 3, optim={"num_steps": 3, "learning_rate": 3e-2}))
    assert server.wait() == 0
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(finished, tmp_path / "run")
