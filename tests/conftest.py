"""Fixtures shared by all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded default model, converted on first use (some 10 s) and cached for later runs."""
    from trainer.model_cache import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)
