"""The preflight: its figures against naive computation, its advice, its estimates; and one with the scripted engine."""

import json
import math
import struct
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.types import Grade, GraderErrorKind
from tests.support.configs import scripted_config
from tests.support.scripts import run_script
from trainer.config import RunConfig
from trainer.engines.engine import PROBE_VERSION
from trainer.measures.masked import Masked
from trainer.models.machines import GIB
from trainer.models.memory import ModelShape, memory_bytes, memory_rows, num_lora_weights, read_shape, stored_weights
from trainer.preflight.advice import Level, advise, advise_memory, verdict
from trainer.preflight.duration import Speeds, time_estimate
from trainer.preflight.figures import best_at_k, figures_of, pass_at_k, worst_at_k
from trainer.preflight.measured import Options, preflight_requests
from trainer.reports.drawing import Series, bars, bins_of, histogram, line_chart
from trainer.tasks.difficulty import preflight_visits, stats_of
from trainer.types import Ledger, Rollout

# ---- figures


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_pass(n, c, k):
    c, k = min(c, n), min(k, n)
    outcomes = [i < c for i in range(n)]
    naive = fmean(any(subset) for subset in combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(naive)
    assert best_at_k([float(x) for x in outcomes], k) == pytest.approx(naive)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7), st.data())
def test_best_and_worst_of_k_are_means_over_all_subsets(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    subsets = list(combinations(rewards, k))
    assert best_at_k(rewards, k) == pytest.approx(fmean(map(max, subsets)), abs=1e-12)
    assert worst_at_k(rewards, k) == pytest.approx(fmean(map(min, subsets)), abs=1e-12)


def test_the_estimates_hold_for_large_n():
    assert pass_at_k(5000, 1, 100) == pytest.approx(100 / 5000)
    assert best_at_k([0.0] * 4999 + [1.0], 100) == pytest.approx(100 / 5000)


def rollout(
    task_id: str,
    score: float | None,
    *,
    penalty: float = 0.0,
    calls: int = 1,
    malformed: int = 0,
    tool_error: ToolErrorKind | None = None,
    stop: StopReason = StopReason.ANSWERED,
    errors: tuple[GraderErrorKind, ...] = (),
    passed: bool | str | None = "by score",
    num_tokens: int = 10,
) -> Rollout:
    """A rollout of one turn with `calls` calls (the first with `tool_error`), then an answer; None is masked."""
    prompt = (Message(role="user", content="?"),)
    made = tuple(ToolCall(call_id=f"c{i}", name="search", arguments="{}") for i in range(calls))
    results = tuple(
        ToolResult(call_id=c.call_id, name="search", output="", error=tool_error if i == 0 else None)
        for i, c in enumerate(made)
    )
    turns = (
        Turn(message=Message(role="assistant", tool_calls=made), results=results, num_tokens=num_tokens),
        *(Turn(message=Message(role="assistant"), malformed=True) for _ in range(malformed)),
        Turn(message=Message(role="assistant", content="42")),
    )
    episode = Episode(
        rollout_id="r",
        task_id=task_id,
        messages=(*prompt, *(t.message for t in turns)),
        turns=turns,
        stop_reason=StopReason.WORLD_FAULT if score is None else stop,
        error="server is down" if score is None else "",
    )
    grade = None
    if score is not None:
        grade = Grade(
            reward=score + penalty,
            parts={"numeric": score, "tool_calls": penalty},
            passed=score == 1 if passed == "by score" else passed,
            errors=errors,
        )
    ledger = Ledger()
    ledger.append_context([1, 2, 3])
    ledger.append_sampled([4] * num_tokens, [-1.0] * num_tokens, 0)
    return Rollout(
        episode=episode,
        task=Task(task_id=task_id, messages=prompt),
        ledgers=(ledger,),
        grade=grade,
        num_drifted_turns=0,
    )


def test_the_figures_are_those_of_the_rollouts():
    rollouts = [
        rollout("mixed", 1.0, penalty=-0.1, calls=3, num_tokens=30),
        rollout("mixed", 0.0, malformed=2, stop=StopReason.MAX_TURNS),
        rollout("hard", 0.0, tool_error=ToolErrorKind.BAD_ARGUMENTS),
        rollout("hard", 0.0, errors=(GraderErrorKind.OTHER,)),
        rollout("easy", 1.0, calls=0),
        rollout("easy", None),
        rollout("lost", None),
    ]
    f = figures_of(rollouts, samples_per_task=2)
    assert (f.num_rollouts, f.num_masked) == (7, 2)
    assert f.tasks == {"mixed": stats_of([0.9, 0.0]), "hard": stats_of([0.0, 0.0]), "easy": stats_of([1.0])}
    assert f.mean == pytest.approx((0.45 + 0 + 1) / 3)
    assert f.best == pytest.approx((0.9 + 0 + 1) / 3) and f.worst == pytest.approx(1 / 3)
    assert f.varied_share == pytest.approx(1 / 3) and f.varied_by_penalties_only == 0
    assert f.correct == pytest.approx(0.5)
    assert f.never_passed == pytest.approx(1 / 3) and f.always_passed == pytest.approx(1 / 3)
    assert f.curves["pass@k"] == [(1, pytest.approx(0.5)), (2, pytest.approx(0.5))]
    assert f.curves["best@k reward"][1] == (2, pytest.approx(0.45)), "of the tasks with two graded rollouts"
    assert f.tool_calls == [3, 3, 1, 1, 0] and f.tokens == [30, 10, 10, 10, 10]
    assert f.episode_tokens == [33, 13, 13, 13, 13]
    assert f.parsed_calls_share == 0.8 and f.malformed_share == 0.2
    assert f.stop_shares == {"answered": 0.8, "max_turns": 0.2}
    assert f.tool_errors == {"malformed": 0.4, "bad_arguments": 0.2} and f.grader_errors == {"other": 0.2}
    assert f.tool_error_share == pytest.approx(3 / 8)
    assert f.masked_causes == {Masked.WORLD: {"server is down": 2}}
    assert f.parts == {"numeric": 0.4, "tool_calls": pytest.approx(-0.02)}


def test_without_a_passing_threshold_nothing_is_said_of_passes():
    f = figures_of([rollout("a", 0.3, passed=None), rollout("a", 0.7, passed=None)], samples_per_task=2)
    assert f.correct is None and f.never_passed is None and f.curves["pass@k"] == []
    assert f.curves["best@k reward"] == [(1, pytest.approx(0.5)), (2, pytest.approx(0.7))]


# ---- advice

CONFIG = RunConfig.model_validate({"output_dir": "unused", "grader": {"type": "numeric"}})


def advice_on(rollouts: list[Rollout], *, offers_tools: bool = True) -> dict[str, Level]:
    found = advise(figures_of(rollouts, samples_per_task=4), CONFIG, offers_tools=offers_tools)
    assert [a.level for a in found] == sorted((a.level for a in found), key=list(Level).index)
    assert all(a.what_to_do for a in found if a.level is not Level.GOOD)
    return {a.finding: a.level for a in found}


def said(findings: dict[str, Level], words: str) -> Level | None:
    return next((level for finding, level in findings.items() if words in finding), None)


def group(task_id: str, *scores: float, **how: Any) -> list[Rollout]:
    return [rollout(task_id, score, **how) for score in scores]


HEALTHY = [r for i in range(4) for r in group(f"t{i}", 0.0, 1.0, 1.0, 0.0)]


def test_tied_tasks_that_differ_teach_where_tasks_are_compared():
    of_one = {"rollout": {"group_size": 1}, "loss": {"advantage": "reinforce_pp"}}
    config = RunConfig.model_validate(CONFIG.model_dump() | of_one)
    for rewards, teaches in (((0.0, 1.0), True), ((1.0, 1.0), False)):
        rollouts = [rollout(f"t{i}", reward) for i, reward in enumerate(rewards)]
        found = advise(figures_of(rollouts, samples_per_task=1), config, offers_tools=True)
        assert (Level.STOP not in {a.level for a in found}) == teaches
        assert not any("headroom" in a.finding.lower() for a in found), "of single rollouts there is none"


def test_a_healthy_policy_is_worth_training():
    found = advice_on(HEALTHY)
    assert set(found.values()) == {Level.GOOD}
    assert said(found, "100% of the tasks have rewards that vary") and said(found, "Headroom 0.500")
    assert verdict(advise(figures_of(HEALTHY, samples_per_task=4), CONFIG, offers_tools=True)) == "Worth training."


def test_a_policy_that_calls_no_tool_is_stopped_unless_there_are_no_tools():
    silent = [r for i in range(4) for r in group(f"t{i}", 0.0, 1.0, 1.0, 0.0, calls=0)]
    assert said(advice_on(silent), "No rollout made a tool call that parsed (none)") is Level.STOP
    tried = [r for i in range(4) for r in group(f"t{i}", 0.0, 1.0, 1.0, 0.0, calls=0, malformed=1)]
    assert said(advice_on(tried), "(100% of the rollouts tried and failed)") is Level.STOP
    assert said(advice_on(silent, offers_tools=False), "tool call") is None


def test_tied_tasks_are_told_apart_by_why_they_are_tied():
    assert said(advice_on(group("a", 0.0, 0.0)), "tied at failure") is Level.STOP
    assert said(advice_on(group("a", 0.0, 0.0, passed=None)), "tied at failure") is Level.STOP
    assert said(advice_on(group("a", 1.0, 1.0)), "tied at success") is Level.STOP
    assert said(advice_on(group("a", 1.0, 1.0) + group("b", 0.0, 0.0)), "No task's rewards vary") is Level.STOP
    apart = group("a", 1.0, 1.0, passed=None) + group("b", -1.0, -1.0, passed=None)
    assert said(advice_on(apart), "No task's rewards vary") is Level.STOP, "one of the two gets all there is"


@pytest.mark.parametrize(("varied", "level"), [(1, Level.STOP), (2, Level.WARN), (3, Level.GOOD)])
def test_the_share_of_varied_tasks_is_measured_by_the_published_demo(varied, level):
    rollouts = [r for i in range(varied) for r in group(f"v{i}", 0.0, 1.0)]
    rollouts += [r for i in range(16 - varied) for r in group(f"t{i}", 0.0, 0.0)]
    assert said(advice_on(rollouts), "of the tasks have rewards that vary") is level


def test_limits_that_cut_many_rollouts_are_named_with_their_key():
    cut = [replace(r, episode=replace(r.episode, stop_reason=StopReason.MAX_EPISODE_TOKENS)) for r in HEALTHY[:4]]
    found = advise(figures_of([*cut, *HEALTHY[4:]], samples_per_task=4), CONFIG, offers_tools=True)
    (advice,) = [a for a in found if "context limit" in a.finding]
    assert advice.level is Level.WARN and advice.what_to_do.startswith("Raise rollout.max_episode_tokens")
    assert "25%" in advice.finding


def test_faults_of_world_and_grader_and_errors_of_tools_are_said_aloud():
    assert said(advice_on([*HEALTHY, rollout("x", None)]), "lost to faults of the world: server is down") is Level.STOP
    lost = rollout("x", None)
    done = replace(lost.episode, stop_reason=StopReason.ANSWERED, error="grader: the judge is out")
    ungraded, unscored = replace(lost, episode=done), replace(lost, episode=done, is_unscored=True)
    advice = advice_on([*HEALTHY, lost, ungraded, ungraded, unscored])
    for words in (
        "1 of 20 rollouts lost to faults of the world: server is down",
        "2 of 20 rollouts not graded, for the grader failed: grader: the judge is out",
        "1 of 20 rollouts given None by every reward function: ",
    ):
        assert said(advice, words) is Level.STOP
    broken = group("x", 0.0, 0.0, errors=(GraderErrorKind.PYTHON_GRADER_RUNTIME,))
    assert said(advice_on([*HEALTHY, *broken]), "python_grader_runtime") is Level.STOP
    failing = [r for i in range(4) for r in group(f"t{i}", 0.0, 1.0, tool_error=ToolErrorKind.REFUSED)]
    assert said(advice_on(failing), "100% of the tool calls failed, most often refused") is Level.WARN
    assert said(advice_on(group("a", 0.0, 1.0, malformed=1)), "hold a malformed call") is Level.WARN


def test_penalties_that_dominate_are_named():
    by_penalty = [
        rollout("a", 0.0, penalty=-0.1),
        rollout("a", 0.0),
        rollout("b", 0.0, penalty=-0.2),
        rollout("b", 0.0),
    ]
    found = advice_on(by_penalty)
    assert said(found, "In 100% of the tasks that vary only penalties do") is Level.WARN
    assert said(found, "Penalties take 0.075 of a mean score of 0.000") is Level.WARN


def test_what_a_grader_and_tools_give_in_several_parts_is_no_penalty():
    def of_parts(passes: bool, **parts: float) -> Rollout:
        made = rollout("a", float(passes))
        return replace(made, grade=replace(made.grade, parts=parts, reward=math.fsum(parts.values())))

    rollouts = [
        of_parts(True, style=0.5, correct=1.0, tool_calls=-0.1, turn_rewards=-0.5),
        of_parts(False, style=0.5, correct=-1.0, tool_calls=-0.3),
    ]
    figures = figures_of(rollouts, samples_per_task=2)
    assert figures.penalty == pytest.approx(-0.2) and figures.score == pytest.approx(0.25)
    assert figures.varied_by_penalties_only == 0
    same = [of_parts(True, correct=x, tool_calls=y) for x, y in ((0.1 + 0.2, 0.0), (0.3, -0.1))]
    assert figures_of(same, samples_per_task=2).varied_by_penalties_only == 1, "but for rounding"


# ---- estimates

SHAPE = ModelShape(
    num_layers=30, hidden=576, intermediate=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocabulary=49152, tied=True
)
"""SmolLM2-135M."""


def test_the_shape_gives_the_number_of_weights_and_of_the_adapter():
    assert SHAPE.num_weights == 134_515_008, "as its safetensors file holds"
    # The weights in the adapter file of a quickstart run, at r = 16.
    assert num_lora_weights(CONFIG, SHAPE) == 4_884_480


def test_activations_are_what_autograd_was_seen_to_keep():
    """Saved tensors were added up under `torch.autograd.graph.saved_tensors_hooks` (transformers 5.17, bfloat16)."""
    small = ModelShape(
        num_layers=1, hidden=128, intermediate=384, num_heads=4, num_kv_heads=2, head_dim=32, vocabulary=9, tied=True
    )
    seen = {
        (small, 1): 3878,
        (replace(small, hidden=256, head_dim=64), 1): 6182,
        (replace(small, intermediate=768), 1): 5414,
        (replace(small, num_kv_heads=4), 1): 4134,
        (small, 8): 3976,
    }
    for (shape, r), num_bytes in seen.items():
        config = CONFIG.model_copy(
            update={"model": CONFIG.model.model_copy(update={"lora": CONFIG.model.lora.model_copy(update={"r": r})})}
        )

        def total(num_layers: int, shape: ModelShape = shape, config: RunConfig = config) -> float:
            rows = memory_rows(config, replace(shape, num_layers=num_layers), 1, on_cpu=True)
            return next(row.num_bytes for row in rows if row.name.startswith("activations"))

        assert (total(2) - total(1)) / config.optim.max_microbatch_tokens == num_bytes


def test_memory_on_a_gpu_is_judged_by_the_engines_share():
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "grader": {"type": "numeric"},
            "model": {"gradient_checkpointing": True},
            "engine": {"gpu_memory_utilization": 0.5, "max_num_seqs": 4},
            "rollout": {"max_episode_tokens": 1000, "tasks_per_step": 8, "group_size": 8},
        }
    )
    rows = memory_rows(config, SHAPE, 1_000_000, on_cpu=False)
    cache = next(r.num_bytes for r in rows if r.name == "KV cache")
    assert cache == 2 * 30 * 3 * 64 * 2 * 4 * 1000
    assert memory_bytes(rows) == pytest.approx(memory_bytes(rows, "trainer") + memory_bytes(rows, "engine"))
    fits = advise_memory(rows, config, total_bytes=80 * GIB, on_cpu=False)
    assert [a.level for a in fits] == [Level.GOOD]
    trainer = memory_bytes(rows, "trainer")
    assert advise_memory(rows, config, total_bytes=1.9 * trainer, on_cpu=False)[0].level is Level.STOP
    assert advise_memory(rows, config, total_bytes=2.1 * trainer, on_cpu=False)[0].level is Level.WARN
    engine_only = config.model_copy(
        update={"engine": config.engine.model_copy(update={"gpu_memory_utilization": 0.01})}
    )
    few = advise_memory(
        rows, engine_only, total_bytes=100 * (cache / 2 + memory_bytes(rows, "engine") - cache), on_cpu=False
    )
    assert "room for 2 of 4 sequences" in few[1].finding


def test_config_and_weight_files_are_read_without_loading_them(tmp_path):
    raw = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_shape(tmp_path) == SHAPE and stored_weights(tmp_path) is None
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": {"shape": [3, 4]}, "b": {"shape": [5]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert stored_weights(tmp_path) == 17
    (tmp_path / "config.json").write_text(json.dumps({"text_config": raw}))
    assert read_shape(tmp_path) == SHAPE
    for uncovered in ({**raw, "num_local_experts": 8}, {"model_type": "mamba"}):
        (tmp_path / "config.json").write_text(json.dumps(uncovered))
        assert read_shape(tmp_path) is None


def test_what_a_config_leaves_out_is_as_its_class_has_it_and_a_wrapper_ties_for_its_decoder(tmp_path):
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    shape = read_shape(tmp_path)
    assert shape is not None and (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 4, 256)
    assert shape.vocabulary > 262_000 and shape.tied, "as Gemma 3 4B, whose config.json says no more"
    written = {**text, "num_attention_heads": 8, "head_dim": 256, "vocab_size": 9, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "text_config": written}))
    assert read_shape(tmp_path).tied
    hybrid = {**written, "layer_types": ["linear_attention", "full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "text_config": hybrid}))
    assert read_shape(tmp_path) is None


def test_time_and_cost_follow_from_the_speeds():
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "grader": {"type": "numeric"},
            "rollout": {"tasks_per_step": 2, "group_size": 4},
            "optim": {"num_steps": 10},
            "eval": {"num_tasks": 5, "samples_per_task": 2, "every_steps": 4},
        }
    )
    figures = figures_of([*group("a", 0.0, 1.0), *group("b", 0.0, 0.0)], samples_per_task=2)
    speeds = Speeds(sampled_tokens_per_s=100.0, num_rollouts=4, trained_tokens_per_s=50.0, publish_s=2.0, start_s=30.0)
    t = time_estimate(config, figures, speeds, gpus=1)
    assert t.rollouts_s == pytest.approx(10 * 8 * 10 / 100)
    assert t.training_s == pytest.approx(10 * 8 * 0.5 * 13 / 50), "half of the tasks vary"
    assert t.publish_s == 20 and t.start_s == 30
    assert t.evaluation_s == pytest.approx(4 * 10 * 10 / 100), "at steps 0, 4, 8 and 10"
    assert t.cost(3.6) == pytest.approx(t.total_s / 1000)
    assert any("fuller engine" in note for note in t.notes)
    two = time_estimate(config, figures, replace(speeds, trained_tokens_per_s=None), gpus=2)
    assert two.training_s is None and two.rollouts_s == pytest.approx(t.rollouts_s / 2)
    assert two.total_s == pytest.approx(30 + two.rollouts_s + 20 + two.evaluation_s)
    assert two.cost(3.6) == pytest.approx(two.total_s / 1000 * 2)


@pytest.mark.parametrize("varied", [0.0, 0.25, 0.5, 1.0])
def test_the_groups_of_a_step_are_those_that_a_naive_step_would_ask_for_and_train_on(varied):
    figures = replace(figures_of(HEALTHY, samples_per_task=4), varied_share=varied)
    speeds = Speeds(sampled_tokens_per_s=1.0, num_rollouts=99, trained_tokens_per_s=1.0, publish_s=0.0, start_s=0.0)

    def groups(rule: str, **loss: Any) -> tuple[float, float]:
        given = {"tied_groups": rule, "tasks_per_step": 32, "group_size": 2}
        given |= {"replacement_rounds": 2} if rule == "replace" else {}
        changes = {"rollout": given, "loss": loss, "optim": {"num_steps": 1}}
        config = RunConfig.model_validate({"output_dir": "unused", "grader": {"type": "numeric"}, **changes})
        t = time_estimate(config, figures, speeds, gpus=1)
        assert t.training_s is not None
        return t.rollouts_s / 10, t.training_s / 13

    asked, missing, untied = 0.0, 64.0, 0.0
    for _ in range(3):
        asked, untied, missing = asked + missing, untied + missing * varied, missing * (1 - varied)
    assert groups("replace") == pytest.approx((asked, untied))
    assert groups("keep") == groups("skip") == pytest.approx((64, 64 * varied))
    assert groups("keep", kl_coef=0.1) == groups("keep", advantage="reinforce_pp") == pytest.approx((64, 64))
    assert groups("skip", kl_coef=0.1) == pytest.approx((64, 64 * varied))


# ---- pictures


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_bins_of_counts_hold_every_value_once_and_split_none(values):
    bins = bins_of(values, whole=True)
    assert math.isclose(sum(bins.shares(values)), 1) and bins.num <= 26
    assert bins.width == int(bins.width) and bins.start == int(bins.start)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_bins_of_measures_hold_every_value_once(values):
    bins = bins_of(values, whole=False)
    assert math.isclose(sum(bins.shares(values)), 1) and bins.num <= 27


def test_pictures_escape_names_and_are_empty_without_values():
    hostile = "<script>alert(1)</script>"
    lines = [Series(name=hostile, points=[(1, 0.5)]), Series(name="b", points=[(1, 0.1), (2, 0.2)])]
    for picture in (
        histogram(hostile, {hostile: [1, 2, 2], "b": [3]}, unit=hostile),
        line_chart(hostile, lines, x_unit="k", unit=hostile),
        bars(hostile, [(hostile, 1.0)], show=str),
    ):
        assert "<svg" in picture and "<script" not in picture and "nan" not in picture
    assert histogram("x", {"a": []}, unit="u") == line_chart("x", [], unit="u") == bars("x", [], show=str) == ""


# ---- the whole


def test_requests_are_a_seeded_draw_with_seeds_of_their_own():
    tasks = [Task(task_id=f"t{i}", messages=()) for i in range(20)]
    options = Options(out=Path("unused"), num_tasks=5, samples=3)
    requests = preflight_requests(CONFIG, tasks, options)
    assert requests == preflight_requests(CONFIG, tasks, options)
    assert len({r.task.task_id for r in requests}) == 5 and len({r.seed for r in requests}) == 15
    other = CONFIG.model_copy(update={"seed": 1})
    assert {r.task.task_id for r in preflight_requests(other, tasks, options)} != {r.task.task_id for r in requests}
    everything = preflight_requests(CONFIG, tasks, Options(out=Path("unused"), num_tasks=99))
    assert len(everything) == 20 * CONFIG.rollout.group_size
    held_out = preflight_requests(CONFIG, tasks, replace(options, held_out=True))
    assert [r.task.task_id for r in held_out[::3]] == ["t0", "t1", "t2", "t3", "t4"], "as the evaluation takes them"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_preflight_of_the_scripted_policy_measures_what_it_was_scripted_to_do(tiny_model, tmp_path):
    from envs.finance.world import FinanceWorld
    from tests.support.scripted_engine import engine_starter, finance_script
    from trainer.preflight.measured import preflight
    from trainer.preflight.page import render_preflight, write_preflight_page
    from trainer.runs.files import read_lines
    from trainer.runs.records import rollout_from_json

    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model))
    options = Options(out=tmp_path / "out", num_tasks=3, held_out=True, samples=6, gpu_hour_price=2.0)
    engines: list[Any] = []
    start = engine_starter(finance_script(FinanceWorld(config.world)), None, engines)
    found = preflight(config, options, start_engine=start)

    assert not config.output_dir.exists(), "the run's own folder is left for training"
    assert engines[0].is_shut_down and [v for v, _ in engines[0].published] == [PROBE_VERSION, 0]
    rollouts = [rollout_from_json(r) for r in read_lines(options.out / "rollouts.jsonl")]
    held_out = {task.task_id for task in FinanceWorld(config.world).tasks("eval")}
    assert {r.task.task_id for r in rollouts} <= held_out
    assert len(rollouts) == 18 and figures_of(rollouts, samples_per_task=6).mean == pytest.approx(found.figures.mean)
    assert 0 < found.figures.varied_share <= 1 and found.figures.best > found.figures.mean > found.figures.worst
    assert found.speeds.sampled_tokens_per_s > 0 and found.speeds.trained_tokens_per_s > 0
    assert found.time.total_s > 0 and found.memory and "untrained" in found.policy

    record = json.loads((options.out / "preflight.json").read_text())
    assert record["time"]["cost"] == pytest.approx(found.time.total_s / 3600 * 2)
    assert record["verdict"] == found.verdict and record["config"]["seed"] == config.seed
    visits = preflight_visits(record["tasks"], where="preflight.json")
    assert {t: v[0].stats for t, v in visits.items()} == found.figures.tasks

    page = write_preflight_page(found, options.out / "preflight.html").read_text()
    assert page.count("<svg") >= 9 and "pass@k" in page and found.verdict in page
    assert "default-src" in page and "<script" not in page and "src=" not in page
    from rich.console import Console

    console = Console(record=True, width=100, file=(tmp_path / "screen").open("w"))
    console.print(render_preflight(found))
    screen = console.export_text()
    console.file.close()
    for text in ("tasks whose rewards vary", "Time of the configured run", "cost, 1 GPU at 2", found.verdict):
        assert text in screen


def test_a_preflight_of_an_adapter_leaves_the_warm_start_out_and_says_so(tiny_model, tmp_path):
    import torch
    from accelerate import Accelerator
    from safetensors.torch import load_file

    from envs.finance.world import FinanceWorld
    from tests.support.scripted_engine import engine_starter, finance_script
    from trainer.learning.policy import Policy
    from trainer.preflight.measured import preflight

    settings = scripted_config(tmp_path / "run", tiny_model)
    config = RunConfig.model_validate(settings | {"warmstart": {"num_steps": 1, "episodes_per_step": 1}})
    policy = Policy(tiny_model, config.model, config.optim, Accelerator(cpu=True), 0)
    with torch.no_grad():
        for parameter in policy._parameters:
            parameter += 0.05
    policy.save_adapter(tmp_path / "adapter")
    engines: list[Any] = []
    start = engine_starter(finance_script(FinanceWorld(config.world)), None, engines)
    options = Options(out=tmp_path / "out", num_tasks=1, samples=2, adapter=tmp_path / "adapter")
    found = preflight(config, options, start_engine=start)

    assert str(tmp_path / "adapter") in found.policy and "warm start" not in found.policy
    assert found.time.notes[-1] == "an adapter was measured: the warm start is not in it"
    published = engines[0].published[-1][1]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert published.keys() == adapter.keys() and all(torch.equal(published[name], adapter[name]) for name in adapter)


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path):
    done = run_script("preflight", "--run", tmp_path)
    assert done.returncode == 2 and "holds no config.yaml" in done.stderr
