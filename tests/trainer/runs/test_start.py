"""A run that begins with the adapter of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from envs.finance.world import FinanceWorld
from tests.support.configs import scripted_config
from tests.support.scripted_engine import engine_starter, finance_script
from trainer.config import RunConfig
from trainer.config.model import ModelConfig
from trainer.learning.adapter import load_model, save_adapter
from trainer.prepare import prepare
from trainer.runs.resuming import beginning_with, start_adapter
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # accelerate leaves its TensorBoard writer to the garbage collector when a run stops with an error.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
WEIGHTS = "adapter_model.safetensors"


def config_of(folder: Path, model: Path, start_from: Path | None, *, r: int = 4, steps: int = 1) -> RunConfig:
    lora = {"r": r, "alpha": 8, "start_from": str(start_from) if start_from else None}
    sections = {"model": {"lora": lora}, "optim": {"num_steps": steps}, "loss": {"kl_coef": 0.1}}
    return RunConfig.model_validate(scripted_config(folder, model, **sections))


def trained(config: RunConfig) -> Path:
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world)), None, []))
    return config.output_dir


@pytest.fixture(scope="module")
def first(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config_of(tmp_path_factory.mktemp("first") / "run", tiny_model, None))


@pytest.fixture
def adapter(first: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(first / "adapter", tmp_path / "adapter"))


@pytest.mark.parametrize("what", ["", "adapter"])
def test_it_begins_with_the_others_weights_and_goes_on_without_them(first, tiny_model, tmp_path, what):
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    config = config_of(tmp_path / "run", tiny_model, copy / what)
    trained(config)
    start = tmp_path / "run" / "checkpoints" / "step-000000" / "adapter" / WEIGHTS
    assert start.read_bytes() == (first / "adapter" / WEIGHTS).read_bytes()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in metrics if "loss/kl_to_reference" in line)
    assert step["loss/kl_to_reference"] == pytest.approx(0, abs=1e-6), "the KL is measured from where the run began"
    assert (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes() != start.read_bytes()
    shutil.rmtree(copy)
    trained(config_of(tmp_path / "run", tiny_model, copy / what, steps=2))


def test_its_files_may_be_links_as_in_a_hubs_cache(adapter, tiny_model, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in adapter.iterdir():
        (cache / path.name).symlink_to(path)
    trained(config_of(tmp_path / "run", tiny_model, cache))
    start = tmp_path / "run" / "checkpoints" / "step-000000" / "adapter" / WEIGHTS
    assert start.read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_what_is_no_adapter_is_told_before_anything_is_loaded(tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(
            UserError, match=f"model.lora.start_from .*{name}: is neither the folder of a run nor of an"
        ):
            prepare(config_of(tmp_path / "run", tiny_model, tmp_path / name))


def test_what_is_not_there_to_begin_with_is_told_before_the_world_is_read(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.prepare.build_world", lambda settings: pytest.fail("a corpus of any size was read"))
    with pytest.raises(UserError, match="start_from"):
        prepare(config_of(tmp_path / "run", tiny_model, tmp_path / "nowhere"))


def test_a_run_that_has_none_yet_is_told(first, tiny_model, tmp_path):
    shutil.copyfile(first / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(UserError, match="holds neither a final adapter nor a checkpoint yet"):
        start_adapter(config_of(tmp_path / "run", tiny_model, tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 8}, r"its r is 8; set model.lora.r to it \(now 4\)"),
        ({"lora_alpha": 4}, r"its alpha is 4; set model.lora.alpha to it \(now 8\)"),
        ({"use_dora": True}, "use_dora=True in its adapter_config.json: only plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' in its adapter_config.json: only plain LoRA"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]"),
        ({"a_way_of_tomorrow": 0.5}, "a_way_of_tomorrow=0.5"),
        ({"r": None}, r"can't be read as an adapter .*TypeError\('r None"),
        ({"r": 4.7}, r"r 4\.7"),
        ({"r": float("inf")}, "can't be read as an adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_told_with_the_key_at_fault(adapter, tiny_model, tmp_path, changes, told):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        start_adapter(config_of(tmp_path / "run", tiny_model, adapter))


@pytest.mark.parametrize("content", ["", "[]", '{"r": 4}', '{"r": 4, "lora_alpha": ', "[" * 100_000])
def test_an_adapters_config_that_is_none_is_told(adapter, tiny_model, tmp_path, content):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"start_from .*: can't be read as an adapter"):
        start_adapter(config_of(tmp_path / "run", tiny_model, adapter))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_weights_that_are_cut_off_are_told_before_anything_is_loaded(adapter, tiny_model, tmp_path, size):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"start_from .*: can't be read as an adapter"):
        start_adapter(config_of(tmp_path / "run", tiny_model, adapter))


def test_a_path_that_is_none_is_told(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"start_from x+.*: can't be read as an adapter"):
        start_adapter(config_of(tmp_path / "run", tiny_model, Path("x" * 300)))


def test_weights_that_are_no_numbers_of_an_adapter_are_told(adapter, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(adapter / WEIGHTS)
    for wrong in (lambda t: t * float("nan"), lambda t: t.to(int)):
        save_file({name: wrong(tensor) for name, tensor in state.items()}, adapter / WEIGHTS)
        with pytest.raises(UserError, match=r"start_from: .*holds what is no adapter's"):
            prepare(config_of(tmp_path / "run", tiny_model, adapter))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: {n: t for n, t in state.items() if "q_proj" not in n}, r"\(it lacks q_proj\)"),
        (
            lambda state: state | {"base_model.model.x.lora_A.weight": next(iter(state.values())).clone()},
            "has besides x",
        ),
        (lambda state: {n: t[..., :-1].contiguous() for n, t in state.items()}, r"is \(4, 31\), expected"),
    ],
)
def test_weights_that_do_not_fit_are_told_before_the_model_is_loaded(adapter, tiny_model, tmp_path, change, told):
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    wrong = rf"model.lora.start_from: the adapter does not fit the model: other base, rank or target modules .*{told}"
    with pytest.raises(UserError, match=wrong):
        prepare(config_of(tmp_path / "run", tiny_model, adapter))
    assert not (tmp_path / "run").exists(), "the folder is another run's still"


@pytest.mark.parametrize("wanted", ["all-linear", ["v_proj"]])
def test_an_adapter_of_other_modules_is_told_with_what_to_set(tiny_model, tmp_path, wanted):
    config = config_of(tmp_path / "run", tiny_model, tmp_path / "adapter")
    run = config.model_copy(update={"model": with_modules(config.model, wanted)})
    made = with_modules(config.model, ["q_proj", "k_proj"])
    save_adapter(load_model(tiny_model, made, device=torch.device("cpu"), seed=0), tmp_path / "adapter")
    told = r"model\.lora\.start_from: .*adapter adapts k_proj, q_proj, and this run .*v_proj.*; set model\.lora\."
    with pytest.raises(UserError, match=told + r"target_modules to \[k_proj, q_proj\]$"):
        prepare(run)


def with_modules(model: ModelConfig, names: str | list[str]) -> ModelConfig:
    return model.model_copy(update={"lora": model.lora.model_copy(update={"target_modules": names})})


def test_what_talks_or_measures_begins_with_the_adapter_it_is_given(first, tiny_model, tmp_path):
    config = config_of(tmp_path / "run", tiny_model, Path("gone"))
    assert start_adapter(beginning_with(config, first)) == first / "adapter"
    assert start_adapter(beginning_with(config, None)) is None
