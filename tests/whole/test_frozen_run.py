"""A fixed run of the scripted engine ends with the very adapter that it has always ended with.

Whatever moves or is renamed may not change what is sampled, graded, ordered or computed. What a run computes depends on
the processor, too: the arithmetic of `run_server.SAME_EVERYWHERE` takes instructions that every x86-64 has, and the
model's weights are whole numbers over a power of two, which no processor rounds. The bytes are those of one release of
torch on such a processor; elsewhere only what was sampled and graded is compared. Not covered: bfloat16, a GPU.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.run_server import Server, lines, write_config

NUM_STEPS = 3
SAMPLED = "c03d4515ac909a599d495167d4724a4feaadf3942971d542fc021190f9bdaf14"
ADAPTERS = {
    "padded": "cd90a1a2340a3458ef84f484150ad5e6395d6949ca38be40881cfce94831825c",
    "tree": "bd3d33faab8a52aaacd7189a5ca3ed461f570850e377b9c6ed1e8a7a121f5d3a",
}
"""By `optim.layout`."""
TORCH = "2.13.0+cpu"


@pytest.fixture(scope="module")
def exact_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("exact") / "model")
    weights = load_file(folder / "model.safetensors")
    draws = torch.Generator().manual_seed(1)
    for _, weight in sorted(weights.items()):
        if weight.ndim == 2:
            weight.copy_(torch.randint(-256, 257, weight.shape, generator=draws) / 512)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(exact_model: Path) -> Iterator[Server]:
    server = Server(exact_model)
    yield server
    server.close()


@pytest.fixture(scope="module", params=ADAPTERS)
def finished(
    request: pytest.FixtureRequest, server: Server, exact_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The layout and the run's folder."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    server.start(write_config(folder, exact_model, NUM_STEPS, optim={"num_steps": NUM_STEPS, "layout": request.param}))
    assert server.wait() == 0
    return request.param, folder


def test_what_is_sampled_and_graded_is_what_it_was(finished):
    _, folder = finished
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    sampled = [
        (
            path.parent.name,
            path.name,
            row["episode"]["rollout_id"].removeprefix(run_id),
            [(ledger["token_ids"], ledger["sampled"]) for ledger in row["ledgers"]],
            row["grade"]["reward"],
        )
        for kind in ("rollouts", "evals")
        for path in sorted((folder / kind).glob("step-*.jsonl"))
        for row in lines(path)
    ]
    assert hashlib.sha256(json.dumps(sorted(sampled)).encode()).hexdigest() == SAMPLED


def test_the_adapter_has_the_bytes_that_it_had(finished):
    import torch

    if platform.machine() != "x86_64" or torch.__version__ != TORCH:
        pytest.skip(f"the bytes are those of torch {TORCH} on x86-64")
    layout, folder = finished
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(adapter).hexdigest() == ADAPTERS[layout]
