"""Fixtures shared by all tests."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")

from tests.support.servers import ONE_PROCESS, VLLM, running_vllm  # noqa: E402

if TYPE_CHECKING:
    from tests.support.run_server import Server
    from trainer.templates.chat import Chat

# The same examples every time: a test that found its counterexample by chance could not be repeated.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Workers side by side (pytest -n) share the cores out, before torch or an engine counts them: threads of two processes
# that wait for each other on one core take several times as long.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[number::count] or os.sched_getaffinity(0))


def _starts_engines(file: str) -> bool:
    return file.endswith("_vllm.py")


LONGEST = [
    f"test_{name}.py"
    for name in ("damaged_folder", "resume", "warmstart", "sweep", "sandbox_escapes", "train_scripted", "bfcl")
]
"""Of the files that start no engine; the first three share a server where they go to one worker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers the slowest first, so that none is left alone with them at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (not _starts_engines(item.path.name), order.get(item.path.name, len(order))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file as a whole, for its fixtures; those that start engines in a row, since two do not fit into memory."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "engines" if _starts_engines(file) else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded default model, converted on first use (some 10 s) and cached for later runs."""
    from trainer.models.cache import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def chat(smollm2: Path) -> "Chat":
    from trainer.templates.chat import Chat

    return Chat(smollm2)


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two narrow layers in float32, under the default model's tokenizer cut to its first 2048 tokens.

    The whole vocabulary would take most of the time of a test.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            # Large enough for log-probabilities to vary.
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for file in smollm2.iterdir():
        if file.name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
            shutil.copy(file, folder)
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text())
    bpe = tokenizer["model"]
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < config.vocab_size}
    bpe["merges"] = [(a, b) for a, b in bpe["merges"] if {a, b, a + b} <= bpe["vocab"].keys()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> "Iterator[Server]":
    """Runs configs of the scripted engine on the tiny model, each in a process of its own."""
    from tests.support.run_server import Server

    server = Server(tiny_model)
    yield server
    server.close()


@pytest.fixture(scope="session")
def taught_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, 8,192 tokens long, that writes tool calls of the quickstart's and the shop's worlds, and JSON."""
    from tests.support.taught import teach

    return teach(tmp_path_factory.mktemp("taught-model") / "model", tiny_model)


@pytest.fixture(scope="session")
def served(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server that calls the taught model `policy` and `judge`, under the template that is
    exported beside an adapter; one for all tests, as its start is slow.
    """
    from trainer.templates.chat import Chat

    folder, chat = tmp_path_factory.mktemp("served"), Chat(taught_model)
    command = [*VLLM, "--model", str(taught_model), "--served-model-name", "policy", "judge", "--max-num-seqs", "16"]
    command += ["--dtype", "float32", *chat.serve_arguments(chat.save_template(folder))]
    # On the CPU a seeded request that is prefilled in chunks crashes vLLM 0.31.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    with running_vllm(command, folder / "log") as address:
        yield address


@pytest.fixture(scope="session")
def judge_url(served: str) -> str:
    """The base URL under which a vLLM server calls its model `judge`."""
    return f"{served}/v1"


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """Engines that are started from here on, in this process or by a script, have no worker process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_PROCESS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its cache in the test's folder and asks no hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def one_thread():
    """Torch on one thread: tests of tiny models are faster so, and exact."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
