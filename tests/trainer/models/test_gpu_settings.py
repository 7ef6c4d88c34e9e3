"""What concerns a GPU and can be seen without one: what is passed to the libraries, when, and what is refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from envs.errors import UserError
from envs.finance.world import FinanceWorld
from tests.support.configs import scripted_config
from tests.support.families import config_alone
from tests.support.scripted_engine import ScriptedEngine, engine_starter, finance_script
from trainer.config import EngineConfig, ModelConfig, RolloutConfig, RunConfig
from trainer.engines.arguments import check_engine, check_vllm, engine_arguments, engine_environment, seeds_requests
from trainer.engines.local import VllmEngine
from trainer.learning.adapter import load_model
from trainer.learning.head import chunk_rows
from trainer.learning.policy import Policy
from trainer.models.family import check_attention
from trainer.models.machines import hardware
from trainer.models.memory import MemoryRow, gpu_bytes, head_bytes
from trainer.preflight.advice import Level, advise_memory
from trainer.prepare import prepare
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


# --- the engine's sleep


class Asked:
    """Stands where vLLM's AsyncLLM would, which has no sleep on a CPU; notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    async def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    async def release_kv_cache_memory(self) -> None:
        self.calls.append("release the cache")

    async def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake up", tags))


@pytest.mark.parametrize(
    ("sleep", "expected"),
    [
        ("none", []),
        ("kv", [("sleep", 0), "release the cache", "trainer's released", ("wake up", ["kv_cache"])]),
        ("weights", [("sleep", 1), "trainer's released", ("wake up", ["weights", "kv_cache"])]),
    ],
)
async def test_the_engine_leaves_to_the_trainer_what_is_asked_and_no_more(
    sleep: Any, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = Asked()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.calls.append("trainer's released"))
    engine = VllmEngine(EngineConfig(sleep=sleep))
    engine._llm = llm
    await engine.sleep()
    await engine.wake_up()
    assert llm.calls == expected


def test_a_vllm_that_can_only_give_all_away_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    check_vllm(EngineConfig(sleep="kv"))
    for it_or_its_base in AsyncLLM.__mro__:
        monkeypatch.delattr(it_or_its_base, "release_kv_cache_memory", raising=False)
    check_vllm(EngineConfig(sleep="weights"))
    with pytest.raises(UserError, match=r"^engine\.sleep: kv needs vLLM 0\.31 or newer, .* set it to weights$"):
        check_vllm(EngineConfig(sleep="kv"))


def test_a_run_names_the_cards_that_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware(1).endswith(" CPU cores") and "×" not in hardware(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert hardware(8).startswith("8 × NVIDIA H200, ")


def test_vllm_spawns_its_processes_on_a_card_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork fails after torch was asked whether there is a card, which vLLM does not see."""
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    monkeypatch.delenv(name, raising=False)
    with engine_environment(EngineConfig(), device="cuda", local_rank=0):
        assert os.environ[name] == "spawn"
    assert name not in os.environ
    monkeypatch.setenv(name, "fork")
    with engine_environment(EngineConfig(), device="cuda", local_rank=0):
        assert os.environ[name] == "fork"


def test_vllm_is_started_so_that_it_can_sleep_only_where_it_will(tiny_model: Path) -> None:
    for sleep, expected in (("none", False), ("kv", True), ("weights", True)):
        arguments = engine_arguments(
            tiny_model, model=ModelConfig(), engine=EngineConfig(sleep=sleep), max_model_len=100, device="cuda"
        )
        assert arguments["enable_sleep_mode"] is expected


def test_a_cache_of_a_given_size_is_asked_of_vllm_in_place_of_a_share(tiny_model: Path) -> None:
    def asked(engine: EngineConfig) -> tuple[object, object]:
        arguments = engine_arguments(tiny_model, model=ModelConfig(), engine=engine, max_model_len=100, device="cuda")
        return arguments.get("kv_cache_memory_bytes"), arguments["gpu_memory_utilization"]

    assert asked(EngineConfig(gpu_memory_utilization=0.3)) == (None, 0.3)
    given, share = asked(EngineConfig(gpu_memory_utilization=0.3, kv_cache_gib=1.5))
    # vLLM refuses to start where its share is not free, and others may hold most of the card.
    assert given == 3 << 29 and isinstance(share, float) and 0 < share <= 0.01


def test_a_cache_of_a_given_size_leaves_the_trainer_the_rest_of_the_card() -> None:
    engine = EngineConfig(gpu_memory_utilization=0.9, kv_cache_gib=2)
    assert gpu_bytes(engine, 3.0, 1e12) == 3 + (2 << 30)
    assert gpu_bytes(EngineConfig(gpu_memory_utilization=0.9), 3.0, 100.0) == 90


def test_the_engine_sleeps_from_the_end_of_the_rollouts_to_the_publish(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripted engine refuses to work while it is asleep."""
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, optim={"num_steps": 2}))
    engines: list[ScriptedEngine] = []
    asleep: list[bool] = []
    update = Policy.update

    def updated(self: Policy, *arguments: Any, **options: Any) -> dict[str, float]:
        asleep.append(engines[0].is_asleep)
        return update(self, *arguments, **options)

    monkeypatch.setattr(Policy, "update", updated)
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world)), started=engines))
    assert asleep == [True, True]
    assert [version for version, _ in engines[0].published] == [-1, 0, 1, 2] and not engines[0].is_asleep


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_sleep_on_a_cpu_is_refused_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    settings = scripted_config(tmp_path / "run", tiny_model, engine={"sleep": "kv"})
    with pytest.raises(UserError, match=r"^engine\.sleep: kv gives a GPU's memory to the trainer, and this"):
        prepare(RunConfig.model_validate(settings))
    check_engine(EngineConfig(sleep="weights"), on_cpu=False)


def test_the_estimate_gives_the_trainer_what_a_sleeping_engine_leaves() -> None:
    rows = [
        MemoryRow(where=where, name=name, num_bytes=size, formula="")
        for where, name, size in [
            ("trainer", "base weights", 15.0),
            ("trainer", "activations of a microbatch", 30.0),
            ("engine", "base weights", 15.0),
            ("engine", "KV cache", 20.0),
        ]
    ]

    def levels(share: float, sleep: str) -> list[Level]:
        engine = EngineConfig(gpu_memory_utilization=share, sleep=sleep)
        config = SimpleNamespace(engine=engine, rollout=RolloutConfig())
        advice = advise_memory(rows, config, total_bytes=80.0, on_cpu=False)  # type: ignore[arg-type]
        return [a.level for a in advice if a.finding.startswith("The trainer")]

    assert levels(0.4, "none") == [Level.WARN]
    assert levels(0.7, "none") == [Level.STOP]
    assert levels(0.7, "kv") == [Level.GOOD, Level.GOOD]
    assert levels(0.85, "kv") == [Level.GOOD, Level.STOP], "weights and optimizer stay while the engine is at work"


# --- seeds, the head's pieces, attention


def test_requests_are_seeded_on_a_gpu_and_where_it_is_asked_for() -> None:
    assert seeds_requests(EngineConfig(), on_cpu=False) and not seeds_requests(EngineConfig(), on_cpu=True)
    for on_cpu in (False, True):
        assert seeds_requests(EngineConfig(seeded_requests=True), on_cpu=on_cpu)
        assert not seeds_requests(EngineConfig(seeded_requests=False), on_cpu=on_cpu)


def test_a_gpu_reads_the_head_once_for_a_thousand_tokens_and_the_estimate_knows_it() -> None:
    assert chunk_rows(152_064, on_gpu=False) == 110 and chunk_rows(152_064, on_gpu=True) == 1024
    assert chunk_rows(2_048, on_gpu=True) == chunk_rows(2_048, on_gpu=False) == 8192
    shape = SimpleNamespace(vocabulary=152_064)
    held = 4 * shape.vocabulary * chunk_rows(shape.vocabulary, on_gpu=True)
    assert head_bytes(shape, on_cpu=False) == 2 * held, "logits and exponentials"  # type: ignore[arg-type]
    assert head_bytes(shape, on_cpu=True) == 3 * 64 * 2**20  # type: ignore[arg-type]


def test_the_trainers_attention_is_the_one_that_is_asked_for(tiny_model: Path) -> None:
    for asked, expected in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        config = ModelConfig(dtype="float32", attn_implementation=asked)
        check_attention(tiny_model, config, on_cpu=True)
        model = load_model(tiny_model, config, device=torch.device("cpu"), seed=0)
        assert model.config._attn_implementation == expected


@pytest.mark.parametrize(
    ("family", "how", "dtype", "on_cpu", "told"),
    [
        ("llama", "flash_attention_2", "auto", True, "flash_attention_2 needs a GPU, and this machine has none"),
        (
            "llama",
            "flash_attention_3",
            "float32",
            False,
            "computes in 16 bits, but model.dtype is float32",
        ),
        ("llama", "flash_attention_2", "float16", False, "needs the package flash-attn, which is not installed"),
        ("llama", "flash_attention_3", "auto", False, "needs the package flash-attn-3, which is not installed"),
        ("gpt-oss", "sdpa", "auto", False, "sdpa: transformers has none for GptOssForCausalLM"),
    ],
)
def test_an_attention_that_cannot_be_had_is_refused_in_one_line(
    family: str, how: Any, dtype: Any, on_cpu: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("flash_attn") else find(name))
    folder = config_alone(tmp_path, family)
    with pytest.raises(UserError, match=told) as refused:
        check_attention(folder, ModelConfig(attn_implementation=how, dtype=dtype), on_cpu=on_cpu)
    assert str(refused.value).startswith("model.attn_implementation: ") and "\n" not in str(refused.value)


def test_an_attention_whose_package_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace() if name.startswith("flash_attn") else find(name)
    )
    for how in ("flash_attention_2", "flash_attention_3"):
        check_attention(config_alone(tmp_path, "llama"), ModelConfig(attn_implementation=how), on_cpu=False)
