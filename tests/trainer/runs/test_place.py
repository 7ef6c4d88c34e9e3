"""A run folder that can't be made is told before anything else is looked at, and nothing is left of the look."""

from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from tests.support.configs import scripted_config
from trainer.config import validate_config
from trainer.preflight.check import check_run
from trainer.train import train


@pytest.mark.parametrize("look", [check_run, train])
@pytest.mark.parametrize(
    ("place", "told"), [("/proc/run", "/proc takes no files: "), ("gone/run", "gone is a link to what is not there")]
)
def test_a_run_folder_that_cannot_be_made_is_told_first(look: Any, place: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    config = validate_config(scripted_config(tmp_path / place, tmp_path / "no model"), source="test")
    with pytest.raises(UserError, match=f"^output_dir {tmp_path / place}: .*{told}"):
        look(config)
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]
