"""Between the policy and its engine: room for the weights on their way, and memory handed over."""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from envs.errors import UserError
from tests.support.configs import scripted_config
from trainer import processes
from trainer.config import EngineConfig, ModelConfig, RunConfig
from trainer.engines.arguments import engine_arguments
from trainer.engines.engine import EngineStart, make_engine
from trainer.engines.local import _started
from trainer.learning.adapter import published_bytes
from trainer.learning.policy import Policy
from trainer.prepare import Prepared, prepare
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.session import load_policy, open_engine, open_scratch
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def checkpointed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Policy]:
    """A policy that recomputes activations, after its warm start."""
    warmstart: dict[str, object] = {"num_steps": 1, "episodes_per_step": 2}
    config: dict[str, Any] = scripted_config(tmp_path_factory.mktemp("run") / "run", tiny_model, warmstart=warmstart)
    config["model"]["gradient_checkpointing"] = True
    job = prepare(RunConfig.model_validate(config))
    RunFolder.create(job.config)
    run = RunFolder.open(job.config, rank=0)
    with asyncio.Runner() as loop:
        return job, load_policy(job, run, Accelerator(cpu=True), Progress(None, 0, show=False), loop)


def test_activations_are_still_recomputed_after_a_warm_start(checkpointed):
    _, policy = checkpointed
    forwards = []
    layer = policy.model.get_base_model().model.layers[0].mlp
    # Recomputing stops inside the layer, as soon as nothing is missing.
    hook = layer.register_forward_pre_hook(lambda *arguments: forwards.append(1))
    policy.model(input_ids=torch.arange(1, 9)[None]).logits.sum().backward()
    hook.remove()
    policy.model.zero_grad()
    assert len(forwards) == 2, "once forward, once more in the backward pass"


def test_room_is_asked_for_two_versions_of_every_process_of_the_machine(checkpointed, tmp_path, monkeypatch):
    job, policy = checkpointed
    merged = published_bytes(policy.model, merged=True)
    policy.save_merged(tmp_path / "merged")
    policy.save_adapter(tmp_path / "adapter")
    for folder, is_merged in (("merged", True), ("adapter", False)):
        written = sum(p.stat().st_size for p in (tmp_path / folder).iterdir())
        assert 0 <= written - published_bytes(policy.model, merged=is_merged) < 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("trainer.runs.scratch.default_roots", lambda: [tmp_path])
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    need = f"{math.ceil(8 * (2 * merged + 2**20) / 2**20)} MiB"
    with pytest.raises(UserError, match=f"they take {need}, but {tmp_path} has 0 MiB free"), open_scratch(job, policy):
        pass


class Started(Exception):
    pass


def run_until_the_engine(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order."""
    happened: list[str] = []
    collect = gc.collect

    async def start(given: EngineStart) -> Any:
        happened.append("started")
        raise Started

    monkeypatch.setattr(gc, "collect", lambda *generation: happened.append("collected") or collect(*generation))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    with pytest.raises((Started, UserError)):
        train(config, start_engine=start)
    return happened


def test_memory_that_the_policy_no_longer_uses_is_given_back_before_the_engine_starts(
    tiny_model, tmp_path, monkeypatch
):
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model))
    assert run_until_the_engine(config, monkeypatch)[-3:] == ["collected", "emptied", "started"]


def test_without_room_for_the_weights_no_engine_is_started(tiny_model, tmp_path, monkeypatch):
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model))
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "started" not in run_until_the_engine(config, monkeypatch)


def test_on_a_gpu_as_many_tokens_are_read_in_one_step_as_on_a_server(tiny_model):
    def tokens(device: str, **engine: object) -> int:
        arguments = engine_arguments(
            tiny_model, model=ModelConfig(), engine=EngineConfig(**engine), max_model_len=1000, device=device
        )
        return int(arguments["max_num_batched_tokens"])

    assert tokens("cuda") == 8192
    assert tokens("cuda", max_num_seqs=10_000) == 10_000, "vLLM refuses fewer tokens than sequences"
    assert tokens("cpu") == 4096


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("cuda", 0, ["started", "waited"]),
        ("cuda", 1, ["waited", "started"]),
        ("cpu", 0, ["started"]),
        ("cpu", 1, ["started"]),
    ],
)
def test_on_gpus_one_engine_of_a_machine_fills_the_compile_cache_before_the_others_start(
    tiny_model, monkeypatch, device, local_rank, expected
):
    happened: list[str] = []

    async def start(given: EngineStart) -> Any:
        happened.append("started")

    monkeypatch.setattr(processes, "wait_for_all", lambda: happened.append("waited"))
    config = RunConfig.model_validate(scripted_config(Path("unused"), tiny_model))
    job = SimpleNamespace(
        config=config,
        model_path=tiny_model,
        chat=SimpleNamespace(stop_token_ids={2}),
        num_versions=1,
        engine=make_engine(config.engine),
        asks_engine=(),
    )
    accelerator = SimpleNamespace(device=torch.device(device), local_process_index=local_rank, process_index=local_rank)
    asyncio.run(open_engine(job, accelerator, start, first_step=0))
    assert happened == expected


def test_a_loop_that_ends_while_vllm_starts_ends_what_vllm_has_begun():
    """As SIGTERM ends it: everything on it is cancelled at once, what was begun last may be the first."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    has_child = threading.Event()

    def start(arguments: object) -> None:
        child.start()
        has_child.set()
        child.join()
        raise RuntimeError("the engine's process has ended")

    async def ended() -> None:
        starting = asyncio.create_task(_started(start, None))
        await asyncio.to_thread(has_child.wait)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in sorted(left, key=lambda task: task is starting):
            task.cancel()
        await asyncio.wait({starting})
        assert starting.cancelled()

    try:
        asyncio.run(ended())
        assert child.exitcode
    finally:
        child.kill()
