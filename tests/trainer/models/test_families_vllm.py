"""Every family through the real engine: published as an adapter and merged, two updates, each proved by the canary.

The weights are random, in float32 for both sides, so that what the two make of them can be told apart to six digits.
A handful runs with all tests; `make test-families` runs every family and prints the table of docs/models.md.
"""

import importlib.util
from pathlib import Path
from typing import Literal

import pytest

from envs.errors import UserError
from tests.support.families import (
    ADAPTED,
    CONFIGS,
    DTYPES,
    EXPERTS,
    adapted,
    build,
    class_of,
    load_into_vllm,
    take_through_engine,
)
from trainer.config import EngineConfig, LoraConfig
from trainer.models.family import check_served, read_family

WAYS: tuple[Literal["lora", "merged"], ...] = ("lora", "merged")
ALWAYS = {("granite", "lora"), ("qwen3-moe", "merged"), ("gemma3-vision", "lora")}
"""Scaled logits, experts, a wrapper: of each a case that a plain Llama, which other tests run, does not cover."""

NEEDS_TORCHVISION = {"qwen3.5", "gemma3-vision", "mistral3", "qwen2.5-vl"}
"""vLLM's classes of wrappers import it, and no build of it on PyPI fits torch's CPU build."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_process"),
]


def cases() -> list[object]:
    return [
        pytest.param(name, publish, marks=[] if (name, publish) in ALWAYS else pytest.mark.families)
        for name in CONFIGS
        for publish in WAYS
    ]


@pytest.mark.parametrize("name, publish", cases())
def test_a_family_is_proved_or_refused_before_its_weights_are_read(name, publish, tiny_model, tmp_path, capsys):
    dtype = DTYPES.get(name, "float32")
    model = build(name, tmp_path / "model", tiny_model)
    refused = None
    if name in EXPERTS and publish == "lora":
        refused = "on a CPU"
    elif name in NEEDS_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        refused = "No module named 'torchvision'"
    if refused:
        for weights in model.glob("*.safetensors"):
            weights.unlink()
        with pytest.raises(UserError, match=refused) as e:
            check_served(read_family(model, LoraConfig()), EngineConfig(publish=publish), on_cpu=True)
        row = f"refused: {e.value}"
    else:
        lora = adapted(name, publish)
        figures = take_through_engine(model, publish, lora=lora, dtype=dtype, scratch=tmp_path / "scratch")
        error, mismatch = (0.02, 1e-3) if dtype == "float32" else (0.4, 0.15)
        shares = [share for figure, share in figures.items() if figure.startswith(("probe/", "canary/applied"))]
        assert len(shares) > 2 and all(share == pytest.approx(1, abs=error) for share in shares)
        assert figures["canary/base_mismatch"] < mismatch and figures["canary/mismatch"] < mismatch
        row = f"{figures['canary/base_mismatch']:.1e} | {figures['canary/mismatch']:.1e}"
    with capsys.disabled():
        part = f" ({', '.join(lora.target_modules)})" if name in ADAPTED and publish == "lora" else ""
        print(f"\n| {name} | {class_of(CONFIGS[name]()).__name__} | {publish}{part} | {row} |")


@pytest.mark.families
def test_vllms_own_loader_takes_every_layer_of_every_familys_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """Without an engine, so that families are covered whose adapters a CPU can't run."""
    names = [name for name in CONFIGS if name not in NEEDS_TORCHVISION or importlib.util.find_spec("torchvision")]
    # vLLM makes the group of the experts only if its process begins with a model that has some.
    names.sort(key=lambda name: name not in EXPERTS)
    for name, loaded in load_into_vllm(names, tmp_path, tiny_model).items():
        left = {layer.rpartition(".")[2] for layer in loaded.get("left", ["none loaded"])}
        assert left == ({"gate_up_proj"} if name in ADAPTED else set()), (name, loaded)
