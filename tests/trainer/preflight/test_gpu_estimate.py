"""Memory and time computed for a GPU that is not at hand: by hand in small, and for the shipped configs."""

import io
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from envs.errors import UserError
from tests.support import ROOT
from tests.support.scripts import run_script
from trainer.config import RunConfig, check_publish, load_config
from trainer.models.cache import resolve_config
from trainer.models.machines import GIB, GPUS, Gpu, find_gpu
from trainer.models.memory import ModelShape, memory_bytes, memory_rows
from trainer.preflight.advice import Level, advise_memory
from trainer.preflight.computed import (
    BANDWIDTH_UTILISATION,
    DECODING_OVERHEAD_S,
    DISK_BYTES_PER_S,
    PREFILL_UTILISATION,
    PUBLISH_S,
    START_S,
    TRAINING_UTILISATION,
    AssumedRollout,
    Assumptions,
    Estimate,
    computed_time,
    decoding_of,
    episode_of,
    estimate_only,
    training_passes,
)
from trainer.preflight.page import render_estimate

SHAPE = ModelShape(
    num_layers=2, hidden=64, intermediate=128, num_heads=4, num_kv_heads=2, head_dim=16, vocabulary=1000, tied=False
)
"""A layer has 64·64·2 + 64·32·2 + 64·128·3 = 36,864 linear weights."""

QWEN = {
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": (5120, 64, 40, 8, 27648, 152064, False),
}
"""hidden, layers, heads, key-value heads, intermediate, vocabulary, tied: as their config.json files say."""

SHIPPED = ["finance.yaml", "finance_7b.yaml", "finance_32b.yaml"]


def small_config(**sections: Any) -> RunConfig:
    given: dict[str, Any] = {
        "output_dir": "unused",
        "grader": {"type": "numeric"},
        "model": {"lora": {"r": 8}},
        "engine": {"gpu_memory_utilization": 0.5, "max_num_seqs": 100},
        "rollout": {"tasks_per_step": 2, "group_size": 4, "max_episode_tokens": 1000},
        "optim": {"num_steps": 10, "max_microbatch_tokens": 1000},
        "eval": {"num_tasks": 4, "samples_per_task": 2, "every_steps": 5},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return RunConfig.model_validate(given)


def write_model(folder: Path, name: str) -> Path:
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = QWEN[name]
    folder.mkdir()
    raw = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
        "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# ---- memory


def test_a_quantised_engine_holds_a_byte_for_each_linear_weight_and_the_trainer_as_before():
    assert SHAPE.num_linear_weights == 2 * 36_864
    assert SHAPE.num_weights == 2 * 36_864 + 2 * 64_000 + 5 * 64, "embeddings, output head, norms"
    plain = memory_rows(small_config(), SHAPE, SHAPE.num_weights, on_cpu=False)
    quantised = memory_rows(small_config(engine={"quantization": "fp8"}), SHAPE, SHAPE.num_weights, on_cpu=False)

    def weights(rows: Any, where: str) -> float:
        return next(row.num_bytes for row in rows if (row.where, row.name) == (where, "base weights"))

    assert weights(plain, "engine") == 2 * SHAPE.num_weights
    assert weights(quantised, "engine") == 2 * 36_864 + 2 * (2 * 64_000 + 5 * 64)
    assert memory_bytes(quantised, "trainer") == memory_bytes(plain, "trainer")


def test_a_row_longer_than_a_microbatch_is_what_the_activations_are_counted_for():
    def activations(**sections: Any) -> float:
        rows = memory_rows(small_config(**sections), SHAPE, 1, on_cpu=False)
        return next(row.num_bytes for row in rows if row.name.startswith("activations"))

    assert activations(rollout={"max_episode_tokens": 4000}) == activations(optim={"max_microbatch_tokens": 4000})


def test_an_engine_without_room_for_one_whole_episode_is_refused():
    config = small_config()
    rows = memory_rows(config, SHAPE, SHAPE.num_weights, on_cpu=False)
    weights = sum(row.num_bytes for row in rows if row.where == "engine" and row.name != "KV cache")
    one_episode = 2 * 2 * 32 * 2 * 1000
    large = 100 * memory_bytes(rows, "trainer")

    def last(room: float) -> Any:
        share = (weights + room) / large
        changed = config.model_copy(
            update={"engine": config.engine.model_copy(update={"gpu_memory_utilization": share})}
        )
        return advise_memory(rows, changed, total_bytes=large, on_cpu=False)[-1]

    assert last(0.9 * one_episode).level is Level.STOP and "one episode" in last(0.9 * one_episode).finding
    assert last(1.5 * one_episode).level is Level.GOOD


# ---- time


EPISODE = AssumedRollout(tool_calls=3, turns=4, generated_tokens=200, row_tokens=500)
WEIGHT_BYTES = 2 * SHAPE.num_weights
KV_ROW = 2 * 2 * 32 * 2 * 500
"""2·L·K·b for each of 500 tokens."""
ROOMY = Gpu(name="G", memory_bytes=1e9, flops=1e12, bandwidth=1e9)


def test_decoding_reads_weights_and_cache_once_a_step_where_the_bandwidth_binds():
    found = decoding_of(small_config(), SHAPE, SHAPE.num_weights, ROOMY, EPISODE, 8)
    # All eight at once; the longest takes twice the mean of 200, so that four are live on average.
    assert (found.at_once, found.live, found.read_anew) == (8, 4, False)
    read_s = (WEIGHT_BYTES + 4 * KV_ROW / 2) / (BANDWIDTH_UTILISATION * 1e9)
    assert found.step_s == pytest.approx(read_s + DECODING_OVERHEAD_S)
    assert found.decoding_s == pytest.approx(400 * found.step_s)
    assert found.prefill_s == pytest.approx(8 * 300 * 2 * SHAPE.num_weights / (PREFILL_UTILISATION * 1e12))


def test_decoding_takes_its_operations_where_the_arithmetic_binds():
    slow = Gpu(name="G", memory_bytes=1e9, flops=1e9, bandwidth=1e15)
    found = decoding_of(small_config(), SHAPE, SHAPE.num_weights, slow, EPISODE, 8)
    assert found.step_s == pytest.approx(4 * 2 * SHAPE.num_weights / (PREFILL_UTILISATION * 1e9) + DECODING_OVERHEAD_S)


def test_rollouts_that_do_not_fit_the_cache_wait_and_read_their_conversations_anew():
    tight = Gpu(name="G", memory_bytes=2 * (WEIGHT_BYTES + 2.5 * KV_ROW), flops=1e12, bandwidth=1e9)
    found = decoding_of(small_config(), SHAPE, SHAPE.num_weights, tight, EPISODE, 8)
    assert found.at_once == 2 and found.read_anew
    assert found.live == pytest.approx(8 / (4 + 1)), "four rounds, and the longest of the last one alone"
    assert found.decoding_s == pytest.approx(200 * 5 * found.step_s)
    assert found.prefill_s == pytest.approx(8 * 4 * 250 * 2 * SHAPE.num_weights / (PREFILL_UTILISATION * 1e12))
    few = small_config(engine={"max_num_seqs": 3})
    assert decoding_of(few, SHAPE, SHAPE.num_weights, ROOMY, EPISODE, 8).at_once == 3


@pytest.mark.parametrize(
    ("sections", "passes"),
    [
        ({}, 4),
        ({"model": {"gradient_checkpointing": True}}, 6),
        ({"loss": {"kl_coef": 0.1}}, 6),
        ({"optim": {"num_epochs": 2}}, 10),
        ({"optim": {"minibatches": 2}, "model": {"gradient_checkpointing": True}}, 8),
    ],
)
def test_the_passes_of_an_update(sections, passes):
    assert training_passes(small_config(**sections)) == passes


def test_the_run_is_the_sum_of_its_parts_and_shares_what_can_be_shared():
    config = small_config()
    one = computed_time(config, SHAPE, SHAPE.num_weights, ROOMY, EPISODE, gpus=1)
    step = decoding_of(config, SHAPE, SHAPE.num_weights, ROOMY, EPISODE, 8)
    assert one.rollouts_s == pytest.approx(10 * step.total_s)
    assert one.evaluation_s == pytest.approx(3 * step.total_s), "at steps 0, 5 and 10, eight rollouts each"
    assert one.training_s == pytest.approx(10 * 8 * 500 * 4 * SHAPE.num_weights / (TRAINING_UTILISATION * 1e12))
    lora = 2 * 8 * (128 + 96 + 96 + 128 + 3 * 192)
    assert one.publish_s == pytest.approx(10 * (PUBLISH_S + 4 * lora / DISK_BYTES_PER_S))
    assert one.start_s == pytest.approx(START_S + 2 * WEIGHT_BYTES / DISK_BYTES_PER_S)
    two = computed_time(config, SHAPE, SHAPE.num_weights, ROOMY, EPISODE, gpus=2)
    assert two.training_s == pytest.approx(one.training_s / 2) and two.publish_s == one.publish_s
    assert one.rollouts_s / 2 < two.rollouts_s < one.rollouts_s, "the weights are read as often with fewer rollouts"
    assert two.cost(3.6) == pytest.approx(two.total_s / 1000 * 2)


def test_the_assumed_rollout_is_cut_to_the_configs_limits():
    roomy = small_config(rollout={"max_episode_tokens": 20_000, "max_turn_tokens": 512})
    free = episode_of(roomy, Assumptions())
    assert (free.tool_calls, free.generated_tokens) == (pytest.approx(5.55), 2000)
    assert free.row_tokens == pytest.approx(1000 + 2000 + 5.55 * 800)
    short = episode_of(
        small_config(rollout={"max_tool_calls": 2, "max_turn_tokens": 100, "max_episode_tokens": 1000}), Assumptions()
    )
    assert (short.tool_calls, short.turns, short.generated_tokens, short.row_tokens) == (2, 3, 300, 1000)
    given = episode_of(roomy, Assumptions(tool_calls=1, generated_tokens=50, row_tokens=700))
    assert (given.turns, given.generated_tokens, given.row_tokens) == (2, 50, 700)


# ---- what is asked for


def test_a_gpu_is_taken_by_name_or_by_its_own_numbers():
    nothing: dict[str, Any] = {"memory_gib": None, "tflops": None, "bandwidth_gb_per_s": None}
    assert find_gpu("h100", **nothing) == GPUS["H100"] and find_gpu(None, **nothing) is None
    own = find_gpu(None, memory_gib=24, tflops=100, bandwidth_gb_per_s=500)
    assert own == Gpu(name="GPU", memory_bytes=24 * GIB, flops=1e14, bandwidth=5e11)
    assert find_gpu("A100", **nothing | {"memory_gib": 40}).memory_bytes == 40 * GIB
    with pytest.raises(UserError, match=r"--gpu B300: not in the table, which has H200"):
        find_gpu("B300", **nothing)
    with pytest.raises(UserError, match=r"--gpu-memory-gib: required"):
        find_gpu(None, **nothing | {"tflops": 100})
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=rf"--gpu-bandwidth {wrong:g}: expected a number above 0"):
            find_gpu("H100", **nothing | {"bandwidth_gb_per_s": wrong})


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"generated_tokens": 0}, "--episode-generated 0"),
        ({"row_tokens": -1}, "--episode-r"),
        ({"row_tokens": math.nan}, "--episode-row nan"),
        ({"tool_calls": math.inf}, "--episode-calls inf"),
        ({"gpu_hour_price": math.inf}, "--gpu-hour-price inf: expected a number of at least 0"),
    ],
)
def test_assumptions_that_mean_nothing_are_refused(wrong, expected):
    with pytest.raises(UserError, match=expected):
        estimate_only(small_config(), Assumptions(gpu=GPUS["H100"], **wrong))


def test_quantisation_is_refused_where_weights_are_merged():
    with pytest.raises(ValueError, match=r"fp8 can't take merged weights; set engine\.publish to lora"):
        small_config(engine={"quantization": "fp8", "publish": "merged"})
    with pytest.raises(ValueError, match="computes in 16 bits"):
        small_config(engine={"quantization": "fp8"}, model={"dtype": "float32"})
    with pytest.raises(ValueError, match="'fp8'"):
        small_config(engine={"quantization": "int3"})
    check_publish(small_config(engine={"quantization": "fp8"}), on_cpu=False)
    check_publish(small_config(engine={"quantization": "fp8", "publish": "lora"}), on_cpu=True)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"engine": {"quantization": "fp8"}}, r"engine\.quantization: fp8 can't take merged weights"),
        ({"judge": {"base_url": "engine"}}, r"judge\.base_url: engine needs the base model beside the adapter"),
        ({"world": {"user": {"type": "engine", "prompt": "Buy."}}}, r"world\.user: engine needs the base model"),
    ],
)
def test_what_merged_weights_take_away_is_told_of_the_config_or_the_machine(sections, key, tmp_path, monkeypatch):
    import torch

    from trainer.prepare import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raw = {"output_dir": tmp_path / "run", "grader": {"type": "numeric"}, "model": {"name": "/no/such/folder"}}
    raw |= {"trackers": []} | sections
    engine = sections.get("engine", {})
    with pytest.raises(ValueError, match=rf"{key}.*; set engine\.publish to lora"):
        RunConfig.model_validate(raw | {"engine": engine | {"publish": "merged"}})
    with pytest.raises(UserError, match=rf"^{key}.*engine\.publish: auto means merged weights on this.* no GPU"):
        prepare(RunConfig.model_validate(raw))
    with pytest.raises(UserError) as e:
        prepare(RunConfig.model_validate(raw | {"engine": engine | {"publish": "lora"}}))
    assert "merged" not in str(e.value)


def test_only_the_config_of_a_hub_model_is_fetched(tmp_path, monkeypatch):
    fetched = []

    def download(name: str, filename: str) -> str:
        fetched.append((name, filename))
        return str(write_model(tmp_path / "snapshot", name) / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = "Qwen/Qwen2.5-7B-Instruct"
    assert resolve_config(name) == tmp_path / "snapshot"
    assert fetched == [(name, "config.json")]


def test_a_hub_model_whose_config_can_not_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.name: 'nobody/no-such-model' .* the hub is not reachable"):
        resolve_config("nobody/no-such-model")


def test_a_kind_of_model_that_the_formulas_do_not_cover_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="of a kind that the formulas do not cover"):
        estimate_only(small_config(model={"name": str(tmp_path)}), Assumptions(gpu=GPUS["H100"]))


def test_of_an_engine_of_the_users_own_no_formula_speaks(tmp_path):
    model = write_model(tmp_path / "model", "Qwen/Qwen2.5-1.5B-Instruct")
    engine = {"engine": {"type": "custom", "target": "my_engine.py:Mine"}}
    config = RunConfig.model_validate(
        {"output_dir": "unused", "grader": {"type": "numeric"}, "model": {"name": str(model)}, **engine}
    )
    found = estimate_only(config, Assumptions(gpu=GPUS["H100"]))
    assert {row.where for row in found.memory} == {"trainer"}
    assert found.time is None and found.engine_share_bytes is None
    [advice] = found.advice
    assert advice.level is Level.GOOD and advice.finding.startswith("The trainer beside an engine of your own: about ")
    with Console(record=True, file=io.StringIO(), width=120) as console:
        console.print(render_estimate(found))
    assert "How fast an engine of your own is" in " ".join(console.export_text().split())


# ---- the shipped configs


def estimate_of_shipped(file: str, tmp_path: Path) -> Estimate:
    """By the command in the config's own head."""
    text = (ROOT / "configs" / file).read_text()
    command = re.search(r"^#\s+python (scripts/preflight\.py .*--estimate-only.*)$", text, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1])
    assert words[1:3] == ["--config", f"configs/{file}"]
    gpu, gpus = words[words.index("--gpu") + 1], int(words[words.index("--gpus") + 1])
    assert f"accelerate launch --num_processes {gpus} scripts/train.py --config configs/{file}" in text
    model = write_model(tmp_path / "model", load_config(ROOT / "configs" / file).model.name)
    config = load_config(ROOT / "configs" / file, [f"model.name={model}"])
    return estimate_only(config, Assumptions(gpu=GPUS[gpu], gpus=gpus))


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_config_fits_the_gpu_it_names_with_a_margin(file, tmp_path):
    found = estimate_of_shipped(file, tmp_path)
    assert {advice.level for advice in found.advice} == {Level.GOOD}
    assert found.time is not None and 0.5 < found.time.total_s / 3600 < 48


def test_the_shipped_configs_differ_by_what_their_size_asks_for_only():
    configs = [load_config(ROOT / "configs" / file) for file in SHIPPED]
    for section in ("world", "grader", "penalties"):
        assert len({getattr(config, section).model_dump_json() for config in configs}) == 1, section


def test_a_32b_model_fits_no_gpu_twice_in_16_bits(tmp_path):
    model = write_model(tmp_path / "model", "Qwen/Qwen2.5-32B-Instruct")
    config = load_config(ROOT / "configs" / "finance_32b.yaml", [f"model.name={model}", "engine.quantization=null"])
    found = estimate_only(config, Assumptions(gpu=GPUS["H200"]))
    assert Level.STOP in {advice.level for advice in found.advice}


def test_an_estimate_for_another_machine_asks_for_no_vllm_here(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", "Qwen/Qwen2.5-7B-Instruct")
    config = load_config(ROOT / "configs" / "finance_7b.yaml", [f"model.name={model}", "engine.sleep=kv"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert estimate_only(config, Assumptions(gpu=GPUS["H200"])).time is not None


def test_the_script_prints_memory_time_and_price_of_a_model_of_which_only_the_config_is_there(tmp_path):
    model = write_model(tmp_path / "model", "Qwen/Qwen2.5-32B-Instruct")
    common = ("--config", ROOT / "configs" / "finance_32b.yaml", "--estimate-only", f"model.name={model}")
    done = run_script("preflight", *common, "--gpu", "H200", "--gpus", "8", "--gpu-hour-price", "3")
    assert done.returncode == 0, done.stderr
    for text in ("61.03 GiB", "31.96 GiB", "8 × H200", "unmeasured estimate", "at 0.2 of the peak", "8 GPUs at 3"):
        assert text in done.stdout, text
    small = run_script("preflight", *common, "--gpu-memory-gib", "80")
    assert small.returncode == 0, small.stderr
    assert "out of memory" in small.stdout and "No time: name a GPU" in small.stdout
    wrong = run_script("preflight", *common, "--gpu", "GTX")
    assert wrong.returncode == 2 and "--gpu GTX: not in the table" in wrong.stderr
    measured = run_script("preflight", "--config", ROOT / "configs" / "finance_32b.yaml", "--gpu", "H200")
    assert measured.returncode == 2 and "--gpu: only with --estimate-only" in measured.stderr
