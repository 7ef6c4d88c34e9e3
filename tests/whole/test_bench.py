"""The benchmarks' pure parts: what a figure says, what a rollout's generations were, what a run's steps cost."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from envs.types import Episode, StopReason, Task
from graders.types import Grade
from tests.support import ROOT
from trainer.seeds import derive_seed
from trainer.types import Ledger, Rollout

BENCH = ROOT / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by name, as running the script would."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def rollout_of(*ledgers: Ledger) -> Rollout:
    episode = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=StopReason.ANSWERED)
    grade = Grade(reward=1.0, parts={"numeric": 1.0}, explanation="")
    return Rollout(episode=episode, task=Task(task_id="t", messages=()), ledgers=ledgers, grade=grade)


def ledger_of(*parts: tuple[str, list[int]]) -> Ledger:
    ledger = Ledger()
    for kind, token_ids in parts:
        if kind == "context":
            ledger.append_context(token_ids)
        else:
            ledger.append_sampled(token_ids, [-1.0] * len(token_ids), 3)
    return ledger


def test_a_rollouts_generations_are_its_turns_with_the_loops_prompts_and_seeds(bench: Any) -> None:
    calls_of = bench("rollout_throughput").calls_of
    first = ledger_of(("context", [1, 2]), ("sampled", [3, 4, 5]), ("context", [6]), ("sampled", [7]))
    # A fork: what was sampled before is context there.
    forked = ledger_of(("context", [1, 2, 3, 8]), ("sampled", [9, 10]))
    calls = calls_of(rollout_of(first, forked), 42)
    assert [c.prompt_ids for c in calls] == [[1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 8]]
    assert [c.num_tokens for c in calls] == [3, 1, 2]
    assert [c.seed for c in calls] == [derive_seed(42, turn) for turn in range(3)]


def test_raw_generation_makes_as_many_tokens_from_the_first_prompt(bench: Any) -> None:
    module = bench("rollout_throughput")
    calls = module.calls_of(
        rollout_of(ledger_of(("context", [1]), ("sampled", [2, 3]), ("context", [4]), ("sampled", [5]))), 0
    )
    assert module.in_one(calls) == module.Call(prompt_ids=[1], num_tokens=3, seed=calls[0].seed)


def test_ratios_are_taken_pair_by_pair_and_judged_by_their_median(bench: Any) -> None:
    common = bench("common")
    ours = common.Figure(name="ours", unit="tokens/s", values=[90.0, 10.0, 95.0])
    bare = common.Figure(name="bare", unit="tokens/s", values=[100.0, 20.0, 100.0])
    share = common.ratio("share", ours, bare, target=0.9)
    assert share.values == pytest.approx([0.9, 0.5, 0.95])
    assert share.verdict == "≥ 0.9: met"
    ceiling = common.Figure(name="other", unit="share", values=[0.01, 0.05, 0.2], target=0.05, target_is_ceiling=True)
    assert ceiling.verdict == "< 0.05: missed"


def test_a_report_holds_the_same_figures_as_text_and_as_json(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = bench("common")
    figure = common.Figure(name="loop", unit="tokens/s", values=[123.0, 125.0, 124.0], target=100)
    common.report("Rollouts", [figure], about={"seed": 7}, json_path=tmp_path / "made" / "rollouts.json")
    written = json.loads((tmp_path / "made" / "rollouts.json").read_text())
    assert written["figures"][0] | {"min": 123.0, "median": 124.0, "max": 125.0} == written["figures"][0]
    assert {"hardware", "versions", "commit", "command", "seed"} <= written.keys()
    table = capsys.readouterr().out
    assert "loop, tokens/s" in table and "124.0" in table and "≥ 100: met" in table


def test_step_figures_leave_evaluations_out(bench: Any) -> None:
    step_figures = bench("step_overhead").step_figures
    laps = {f"time/{lap}_s": 1.0 for lap in ("rollouts", "training", "publish", "checkpoint")}
    speeds = {"throughput/sampled_tokens_per_s": 5.0, "throughput/trained_tokens_per_s": 6.0}
    step = {"time/step_s": 4.0, "time/other_share": 0.5, **laps, **speeds}
    figures = step_figures([{"step": 0, "eval/reward": 0.1}, {"step": 1, **step}, {"step": 2, **step}])
    assert [f.values for f in figures if f.name == "step"] == [[4.0, 4.0]]
    assert figures[0].verdict == "< 0.05: missed"
    with pytest.raises(UserError, match="no finished training step"):
        step_figures([{"step": 0, "eval/reward": 0.1}])


def test_a_whole_step_is_compared_by_token_and_not_by_what_either_side_happened_to_sample(bench: Any) -> None:
    whole_step = bench("whole_step")
    step = {"step": 12.0, "rollouts": 8.0, "training": 3.0, "publish": 1.0, "sampled": 400.0}
    twice = {name: 2 * value for name, value in step.items()}
    of_step, of_both = (whole_step.figures_of("ours", steps) for steps in ([step], [step, twice]))
    assert {f.name: f.values for f in of_step} == {
        "ours: step": [12.0],
        "ours: publish": [1.0],
        "ours: sampled": [400.0],
        "ours: rollouts by token": [20.0],
        "ours: training by token": [7.5],
        "ours: step by token": [30.0],
    }
    assert all(f.values[0] == f.values[1] for f in of_both if f.unit == "ms")


def test_trls_clocks_take_the_publish_off_the_rollouts_that_it_is_made_in(bench: Any) -> None:
    whole_step = bench("whole_step")

    class Trainer:
        def sync(self) -> None:
            time.sleep(0.05)

        def generate(self) -> None:
            self.sync()
            time.sleep(0.1)

    trainer, clocks = Trainer(), whole_step.Clocks()
    clocks.watch(trainer, "generate", "rollouts")
    clocks.watch(trainer, "sync", "publish", within="rollouts")
    clocks.begin()
    trainer.generate()
    clocks.count("sampled", 3)
    clocks.end()
    [step] = clocks.steps
    assert step["sampled"] == 3 and step["publish"] >= 0.05 and step["rollouts"] >= 0.1
    assert step["rollouts"] + step["publish"] + step["training"] == pytest.approx(step["step"])


def test_random_groups_share_a_prompt_and_train_what_no_tool_wrote(bench: Any) -> None:
    from trainer.learning.packing.tree import num_unique_tokens

    samples = bench("training_throughput").group_samples(2, 4, seed=0)
    assert [len(s.token_ids) for s in samples] == [512] * 8 and [s.num_trainable for s in samples] == [96] * 8
    # The last token of a row is predicted and not read.
    assert num_unique_tokens(samples) == 2 * (384 + 4 * 127)
    assert num_unique_tokens(bench("training_throughput").group_samples(3, 1, seed=0)) == 3 * 511


def test_memory_that_is_taken_and_given_back_is_seen(bench: Any) -> None:
    with bench("common").PeakMemory() as memory:
        taken = bytearray(64 * 2**20)
        taken[:: 2**12] = b"x" * len(taken[:: 2**12])
        del taken
    assert 60 < memory.risen_mib < 100
