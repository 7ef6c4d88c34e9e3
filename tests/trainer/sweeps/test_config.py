"""A sweep's settings: what can't be meant, what a space holds, how values go on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from envs.errors import UserError
from tests.support import ROOT
from trainer.config import load_config
from trainer.sweeps.config import (
    ChoicesConfig,
    CoresConfig,
    GpusConfig,
    LogRangeConfig,
    RangeConfig,
    SlotsConfig,
    SweepConfig,
    label_of,
    load_sweep,
)
from trainer.sweeps.plan import Plan, make_plan
from trainer.sweeps.space import as_overrides, corner_points, grid_points, short_keys, values_of
from trainer.sweeps.values import run_values
from trainer.sweeps.work import Slot, slot_of, slots_of

LOG = {"type": "log_range", "low": 1e-5, "high": 1e-3}
MEANT: dict[str, Any] = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "output_dir": "out",
    "space": {"optim.learning_rate": LOG},
    "method": {"type": "random", "num_trials": 4},
}


def load(folder: Path, *overrides: str, **changed: Any) -> SweepConfig:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(MEANT | changed))
    return load_sweep(path, [*overrides])[0]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"space": {}}, "space: Dictionary should have at least 1 item"),
        ({"space": {"seed": [1, 2]}}, "space: seed: it is nothing to choose; give seeds"),
        ({"space": {"output_dir": ["a", "b"]}}, "space: output_dir: each run has a folder of its own"),
        ({"space": {"base": ["a", "b"]}}, "space: base: it names the sweep's config"),
        ({"space": {"eval.num_tasks": [1, 2]}}, "space: eval.num_tasks: trials would be measured by different eval"),
        ({"space": {"a..b": [1, 2]}}, "space: 'a..b': expected a key of the config"),
        ({"space": {"optim": [1, 2], "optim.learning_rate": [1, 2]}}, "optim: is the section of optim.learning_rate"),
        ({"space": {"a": [1]}}, "space.a.values: List should have at least 2 items"),
        ({"space": {"a": [1, 2, 1]}}, "space.a.values: 1 stands twice; expected each value once"),
        ({"space": {"a": ["1e-4", 1e-4]}}, "space.a.values: 0.0001 stands twice"),
        ({"space": {"a": 3}}, "space.a.type: expected one of 'choices', 'range', 'log_range'"),
        ({"space": {"a": {"type": "rang", "low": 1, "high": 2}}}, "(got 'rang'); did you mean 'range'?"),
        ({"space": {"a": LOG | {"low": 0}}}, "space.a: low: expected a number above 0, as logarithms have no other"),
        ({"space": {"a": LOG | {"low": -1.0}}}, "expected a number above 0"),
        ({"space": {"a": {"type": "range", "low": 2, "high": 1}}}, "space.a: low 2 is not below high 1"),
        ({"space": {"a": {"type": "range", "low": 1, "high": 1}}}, "space.a: low 1 is not below high 1"),
        ({"space": {"a": LOG | {"low": 1.0}}}, "space.a: low 1 is not below high 0.001"),
        ({"space": {"a": LOG | {"high": float("inf")}}}, "space.a.high: Input should be a finite number"),
        ({"space": {"a": LOG | {"num": 3}}}, "space.a.num: has no effect but in a grid"),
        ({"space": {"a": {"type": "range", "low": 0, "high": 10**400}}}, "space.a: expected bounds between -1e+100"),
        ({"space": {"a": LOG | {"low": 5e-324}}}, "space.a: low: expected at least 1e-100"),
        ({"space": {"a": {"type": "range", "low": 0, "high": 1, "num": 10**9}}}, "less than or equal to 10000"),
        ({"seeds": [1, 10**23]}, "seeds.1: Input should be less than 9223372036854775808"),
        ({"seeds": [True, 0]}, "seeds: expected a number, not true or false"),
        ({"method": {}}, "space.optim.learning_rate.num: required of a grid"),
        ({"method": {"type": "random"}}, "method.num_trials: required, but not given"),
        ({"method": {"type": "tpe", "num_trials": 1}}, "method.num_trials: Input should be greater than or equal to 2"),
        ({"method": {"type": "bayes", "num_trials": 9}}, "method.type: expected one of 'grid', 'random', 'tpe'"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"seeds": [1], "settings": {"seed": 2}}, "settings.seed: seeds says it too"),
        ({"settings": {"optim.learning_rate": 1}}, "settings.optim.learning_rate: space.optim.learning_rate sets it"),
        ({"settings": {"optim": {}}}, "settings.optim: space.optim.learning_rate sets it too"),
        ({"settings": {"output_dir": "a"}}, "settings: output_dir: stands on top of the sweep"),
        ({"objective": {"key": "train/reward"}}, "objective.key: expected a figure of the held-out evaluation"),
        ({"objective": {"key": "eval/corect"}}, "objective.key: no figure of an evaluation is called corect; did you"),
        ({"objective": {"key": "eval/"}}, "objective.key: expected a figure of the held-out evaluation"),
        ({"objective": {"goal": "max"}}, "objective.goal: Input should be 'maximise' or 'minimise'"),
        ({"beside": ["eval/rewrad"]}, "beside: no figure of an evaluation is called rewrad; did you mean 'reward'?"),
        ({"pruner": {"type": "mean"}}, "pruner.type: expected one of 'median', 'successive_halving'"),
        ({"pruner": {"type": "median"}, "seeds": [1, 2]}, "pruner: would only ever stop the last of 2 seeds"),
        ({"parallel": {"num": 0}}, "parallel.num: Input should be greater than or equal to 1"),
        ({"parallel": {"type": "gpus", "ids": [0, "0"]}}, "parallel.ids: 0 stands twice"),
        ({"storage": "redis://here"}, "storage: expected postgresql://"),
        ({"spase": {}}, "spase: unknown key; did you mean space?"),
    ],
)
def test_settings_that_cannot_be_meant_name_their_key(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as said:
        load(tmp_path, **changed)
    assert str(said.value).startswith(f"sweep {tmp_path / 'sweep.yaml'}: 1 problem\n") and told in str(said.value)


def test_a_key_that_stands_twice_in_the_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("base: a\noutput_dir: b\nspace:\n  seed: [1, 2]\n  seed: [3, 4]\n")
    with pytest.raises(UserError, match="the key 'seed' stands twice in one mapping"):
        load_sweep(tmp_path / "sweep.yaml", [])


def test_overrides_hold_for_all_trials_and_output_dir_is_the_sweeps(tmp_path: Path) -> None:
    config = load(tmp_path, "optim.num_steps=3", "output_dir=elsewhere", "rollout.group_size=8")
    assert config.settings == {"optim.num_steps": 3, "rollout.group_size": 8}
    assert config.output_dir == Path("elsewhere")
    with pytest.raises(UserError, match="override 'seed': expected KEY=VALUE"):
        load(tmp_path, "seed")
    with pytest.raises(UserError, match="sets it too; expected one of the two"):
        load(tmp_path, "optim.learning_rate=1")


def test_a_grid_takes_every_combination_in_the_files_order(tmp_path: Path) -> None:
    space = {"a": [1, "x", None], "b": {"type": "range", "low": 1, "high": 3}}
    points = grid_points(load(tmp_path, space=space, method={}).space)
    assert [(p["a"], p["b"]) for p in points] == [(a, b) for a in (1, "x", None) for b in (1, 2, 3)]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        (RangeConfig(type="range", low=0.0, high=0.3, num=4), [0.0, 0.1, 0.2, 0.3]),
        (RangeConfig(type="range", low=1, high=10, num=4), [1, 4, 7, 10]),
        (RangeConfig(type="range", low=0, high=0.5, num=3), [0.0, 0.25, 0.5]),
        (LogRangeConfig(type="log_range", low=1e-5, high=1e-3, num=3), [1e-5, 1e-4, 1e-3]),
        (LogRangeConfig(type="log_range", low=1, high=16, num=5), [1, 2, 4, 8, 16]),
        (LogRangeConfig(type="log_range", low=1, high=3, num=5), [1, 2, 3]),
        (ChoicesConfig(type="choices", values=["2e-5", [1], {"a": 1}]), [2e-5, [1], {"a": 1}]),
    ],
)
def test_a_grids_values_have_the_bounds_and_no_digits_of_rounding(axis: Any, values: list[Any]) -> None:
    assert values_of(axis) == values and [type(v) for v in values_of(axis)] == [type(v) for v in values]


def test_a_grid_of_too_many_trials_is_refused_before_it_is_made(tmp_path: Path) -> None:
    wide = {"type": "range", "low": 1, "high": 9_000}
    with pytest.raises(UserError, match="a grid of 81,000,000 trials; expected at most 10,000"):
        grid_points(load(tmp_path, space={"a": wide, "b": wide}, method={}).space)
    with pytest.raises(UserError, match="1 to 1,000,000,000,000 are too many values of a grid"):
        grid_points(load(tmp_path, space={"a": wide | {"high": 10**12}}, method={}).space)


def test_few_points_show_every_bound_and_every_choice(tmp_path: Path) -> None:
    space = load(tmp_path, space={"a": [1, 2, 3], "b": LOG}).space
    points = [*corner_points(space)]
    assert {p["a"] for p in points} == {1, 2, 3} and {p["b"] for p in points} == {1e-5, 1e-3}


def test_values_go_on_as_they_are(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {MEANT['base']}\n")
    values = {"optim.learning_rate": 1.2345678901234567e-05, "output_dir": "a: b # 'c'", "eval.every_steps": 2}
    values |= {"model.lora.target_modules": ["q_proj", "v_proj"], "rollout.stratify_by": None}
    loaded = load_config(config, as_overrides(values))
    assert loaded.optim.learning_rate == 1.2345678901234567e-05 and str(loaded.output_dir) == "a: b # 'c'"
    assert loaded.model.lora.target_modules == ["q_proj", "v_proj"] and loaded.rollout.stratify_by is None
    assert [label_of(value) for value in ("x", 1, 1e-5, None, [1])] == ["x", "1", "1e-05", "null", "[1]"]


def test_keys_are_shown_as_short_as_tells_them_apart() -> None:
    keys = ["penalties.tool_calls.slope", "penalties.reasoning_tokens.slope", "optim.learning_rate", "slope"]
    assert short_keys(keys) == {
        "penalties.tool_calls.slope": "tool_calls.slope",
        "penalties.reasoning_tokens.slope": "reasoning_tokens.slope",
        "optim.learning_rate": "learning_rate",
        "slope": "slope",
    }


def test_gpus_are_handed_out_in_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots_of(SlotsConfig(num=2)) == [Slot(0), Slot(1)]
    assert [s.devices for s in slots_of(GpusConfig(type="gpus", ids=[4, 5, 6], per_run=1))] == [("4",), ("5",), ("6",)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-c")
    assert [s.devices for s in slots_of(GpusConfig(type="gpus", per_run=2))] == [("GPU-a", "GPU-b")]
    assert slots_of(GpusConfig(type="gpus", per_run=2))[0].environment == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="parallel: 0 GPUs found, and each run takes 1; expected as many at least"):
        slots_of(GpusConfig(type="gpus"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="parallel: 0 GPUs found"):
        slots_of(GpusConfig(type="gpus"))


def test_cores_are_shared_out_to_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 1, 2, 3, 5})
    slots = slots_of(CoresConfig(type="cores", num=2))
    assert [slot.cores for slot in slots] == [(1, 2), (3, 5, 7)] and str(slots[1]) == "core 3, 5, 7"
    assert [slot.cores for slot in slots_of(CoresConfig(type="cores", num=6))] == [(1,), (2,), (3,), (5,), (7,), (1,)]


def test_runs_that_are_found_on_one_core_take_a_slot_each() -> None:
    shared = tuple(sorted(os.sched_getaffinity(0)))
    slots = [Slot(0, cores=shared), Slot(1, cores=shared)]
    found = [psutil.Process()]
    assert slot_of(found, slots, []) == slots[0] and slot_of(found, slots, slots[:1]) == slots[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_that_is_shipped_can_be_meant(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command in its comment makes it.
    monkeypatch.setattr("trainer.sweeps.plan.start_adapter", lambda config: None)
    plan = make_plan(path, [], train=ROOT / "scripts" / "train.py", launch=None)
    assert plan.num_trials >= 4 and plan.folder.parts[:2] == ("runs", "sweeps") and not plan.remarks


def test_a_reward_that_the_space_changes_is_told(tmp_path: Path) -> None:
    space = {"penalties.tool_calls.slope": [0.01, 0.02]}
    load(tmp_path, space=space, method={})
    plan = make_plan(tmp_path / "sweep.yaml", [], train=Path("train.py"), launch=None)
    assert any("eval/reward is what penalties.tool_calls.slope changes" in remark for remark in plan.remarks)
    plan = make_plan(tmp_path / "sweep.yaml", ["eval.every_steps=1"], train=Path("train.py"), launch=None)
    load(tmp_path, space=space, method={}, objective={"key": "eval/correct"})
    assert not make_plan(tmp_path / "sweep.yaml", [], train=Path("train.py"), launch=None).remarks


def test_the_page_of_sweeps_names_every_key() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    kinds = (SweepConfig, RangeConfig, LogRangeConfig, SlotsConfig, GpusConfig)
    missing = {name for kind in kinds for name in kind.model_fields if not re.search(rf"\b{name}\b", page)}
    assert not missing


def planned(tmp_path: Path, base: dict[str, Any], **changed: Any) -> Plan:
    """A sweep over a base of one's own, which lies on the quickstart."""
    own = tmp_path / "base.yaml"
    own.write_text(yaml.safe_dump({"base": str(ROOT / "configs" / "quickstart.yaml")} | base))
    load(tmp_path, base=str(own), **changed)
    return make_plan(tmp_path / "sweep.yaml", [], train=Path("train.py"), launch=None)


TWO = {"space": {"optim.learning_rate": [1e-4, 1e-3]}, "method": {}}


def test_an_adapter_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    told = r"model.lora.start_from .*nowhere: is neither the folder of a run nor of an adapter"
    with pytest.raises(UserError, match=rf"sweep .*: {told}"):
        planned(tmp_path, {"model": {"lora": {"start_from": nowhere}}}, **TWO)
    with pytest.raises(UserError, match=rf"start_from.*nowhere.*: {told}"):
        planned(tmp_path, {}, space={"model.lora.start_from": [None, nowhere]}, method={})
    overrides = [f"model.lora.start_from={nowhere}", f"output_dir={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=told):
        run_values(ROOT / "configs" / "quickstart.yaml", overrides, ["seed=0,1"], train=Path("train.py"))


def test_a_section_among_the_settings_lies_on_what_the_base_has_there(tmp_path: Path) -> None:
    settings = {"eval": {"every_steps": 2}, "penalties.tool_calls": {"slope": 0.01}}
    plan = planned(tmp_path, {"eval": {"num_tasks": 3, "samples_per_task": 1}}, settings=settings, **TWO)
    run = plan.run_config({"optim.learning_rate": 1e-4}, "trial-0000", 0)
    assert (run.eval.num_tasks, run.eval.samples_per_task, run.eval.every_steps) == (3, 1, 2)
    assert run.penalties.tool_calls and (run.penalties.tool_calls.free, run.penalties.tool_calls.slope) == (2, 0.01)


def test_trials_listen_at_no_port(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"prometheus": {"port": 9411}}, **TWO)
    assert plan.run_config({"optim.learning_rate": 1e-4}, "trial-0000", 0).prometheus is None
    assert any(remark.startswith("prometheus: trials listen at no port") for remark in plan.remarks)
    with pytest.raises(UserError, match=r"space: prometheus: it changes nothing that is measured"):
        planned(tmp_path, {}, space={"prometheus": [None, {"port": 9411}]}, method={})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"method": {"type": "tpe", "num_trials": 8}}, "method.startup_trials: 8 are drawn at random before TPE draws"),
        (
            {"pruner": {"type": "median", "warmup_steps": 10}},
            "pruner.warmup_steps: no trial is cut short before step 10",
        ),
        (
            {"pruner": {"type": "median", "startup_trials": 4}},
            "pruner.startup_trials: 4 trials come to their end before",
        ),
        ({"pruner": {"type": "successive_halving", "min_steps": 10}}, "pruner.min_steps: the first rung is at step 10"),
    ],
)
def test_what_would_have_no_effect_is_told(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    given = {**TWO, "method": {"type": "random", "num_trials": 4}, "settings": {"eval.every_steps": 2}} | changed
    plan = planned(tmp_path, {}, **given)
    assert any(remark.startswith(told) for remark in plan.remarks), plan.remarks


def test_values_that_lie_close_are_different_ones() -> None:
    axis = RangeConfig(type="range", low=1e-4, high=1.00000001e-4, num=4)
    assert len(set(values_of(axis))) == 4
