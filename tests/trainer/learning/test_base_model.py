"""The base is read whole: what its checkpoint lacks is not made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.errors import UserError
from trainer.config import ModelConfig
from trainer.learning.base_model import load_base

NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return write


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (changed(lambda tensors: tensors.pop(NORM)), f"not whole, or not those of its config.json: {NORM} missing or"),
        (changed(lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()})), f"its config.json: {UP} missing or"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "can't be read: "),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"), "can't be read: "),
        (lambda file: file.unlink(), "can't be read: Error no file named model.safetensors"),
    ],
    ids=["tensor", "shape", "cut", "pointer", "gone"],
)
def test_weights_that_are_not_whole_are_the_users_to_mend(
    spoil: Callable[[Path], None], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    spoil(folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"^model.name: the weights in {folder} .*{told}"):
        load_base(folder, ModelConfig(dtype="float32"), torch.device("cpu"))
