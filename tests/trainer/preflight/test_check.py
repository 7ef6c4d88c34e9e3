"""A config that is only looked at: `scripts/train.py --check`."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.errors import UserError
from tests.support.configs import scripted_config
from trainer.config import validate_config
from trainer.config.idle import idle_settings
from trainer.preflight.check import check_run
from trainer.runs.folder import RunFolder


def test_a_folder_in_which_no_run_could_go_on_is_told(tiny_model: Path, tmp_path: Path) -> None:
    config = validate_config(scripted_config(tmp_path / "run", tiny_model), source="test")
    RunFolder.create(config)
    assert dict(check_run(config))["run folder"].endswith("new")
    (tmp_path / "run" / "run.json").unlink()
    assert dict(check_run(config))["run folder"].endswith("new"), "a run makes it anew"
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds no checkpoint to go on from"):
        check_run(config)


def test_a_check_tells_what_a_run_would_be_and_makes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    sections = scripted_config(tmp_path / "run", tiny_model, warmstart={"num_steps": 2, "episodes_per_step": 3})
    found = dict(check_run(validate_config(sections, source="test")))
    assert found["run folder"] == f"{tmp_path / 'run'}, new"
    assert found["tasks"] == "3 to train on, 2 of 3 held-out ones to evaluate on (eval.num_tasks 2)"
    assert found["tools"] == "search, list, cat, calculate" and found["grader"] == "numeric"
    assert found["prompts"].endswith("at most, of an episode's 1,000")
    assert found["warm start"] == "2 steps of 3: the world's expert"
    given = "adapters" if torch.cuda.is_available() else "merged weights"
    assert found["engine"] == f"local, on this machine, given {given}"
    assert not (tmp_path / "run").exists()


OWN = """
import math
from graders.types import Grade
def short(completions, completion_ids, **_): return [1.0 / len(completion_ids[0]) * bool(completions[0][-1]["content"])]
def nan(completions, **_): return [math.nan]
def fails(completions, **_): return [completions[0][7]]
def none(completions, **_): return [None]
class Shelf:
    def reset(self, **row): self.is_open = True
    def look(self) -> str:
        \"\"\"Look.\"\"\"
        return "a book"
    def get_reward(self): return 0.25 if self.is_open else 0.0
class Broken(Shelf):
    def reset(self, **row): raise OSError("no shelf")
def centred(groups): return [[0.5 for _ in group] for group in groups]
class OfRows:
    def grade(self, task, episode): return float(task.item["pieces"])
class Huge:
    def grade(self, task, episode): return 1e300
class Taken:
    def grade(self, task, episode): return Grade(reward=1.0, parts={"right": 0.5, "kl": 0.5})
class Forgets:
    def grade(self, task, episode):
        if "book" in episode.answer: return 1.0
class Two:
    def grade(self, task, episode): return Grade(reward=1.0, parts={"right": 0.5, "brief": 0.5})
def loss(inputs): return -(inputs.logprobs_N * inputs.advantages_N * inputs.weights_N).sum()
"""
SOURCE = "def grade(sample, item):\n    return {score}\n"


def checked(tiny_model: Path, tmp_path: Path, **sections: Any) -> list[tuple[str, str]]:
    (tmp_path / "own.py").write_text(OWN)
    raw = scripted_config(tmp_path / "run", tiny_model) | {"penalties": {}} | sections
    return check_run(validate_config(raw, source="test"))


def test_the_users_own_loss_and_graders_are_tried_and_told(tiny_model: Path, tmp_path: Path) -> None:
    own = str(tmp_path / "own.py")
    graders = {
        "short": {"type": "custom", "target": f"{own}:short"},
        "sure": {"type": "python", "source": SOURCE.format(score="len(sample['output_text']) / 10")},
        "odd": {"type": "python", "source": SOURCE.format(score="item['no such key']")},
        "of_rows": {"type": "exact"},
    }
    found = checked(
        tiny_model,
        tmp_path,
        grader={"type": "multi", "graders": graders, "calculate_output": "short + sure + odd + of_rows"},
        watch_grader={"type": "custom", "target": f"{own}:none"},
        loss={"type": "custom", "target": f"{own}:loss"},
    )
    assert dict(found)["loss"] == f"custom {own}:loss, advantages by grpo" and not (tmp_path / "run").exists()
    tried = [told for what, told in found if what == "tried"]
    assert tried[0] == f"loss on a few tokens: {own}:loss"
    assert re.fullmatch(r"grader\.graders\.short on 'I do not know\.': 0\.\d+", tried[1])
    assert tried[2] == "grader.graders.sure on 'I do not know.': 1.4"
    assert (
        tried[3].startswith("grader.graders.odd on 'I do not know.': 0 (python_grader_runtime: ")
        and "KeyError" in tried[3]
    )
    assert tried[4] == "watch_grader on 'I do not know.': no grade: custom gave None" and len(tried) == 5
    assert dict(checked(tiny_model, tmp_path))["loss"] == "clipped, advantages by grpo"


def test_an_estimator_of_the_users_own_is_told(tiny_model: Path, tmp_path: Path) -> None:
    own = f"{tmp_path}/own.py:centred"
    found = checked(tiny_model, tmp_path, loss={"advantage": {"type": "custom", "target": own}})
    assert ("loss", f"clipped, advantages by custom {own}") in found
    assert ("tried", f"advantages of a few rewards: {own}") in found


def test_weights_of_parts_that_the_users_own_grader_does_not_give_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    penalty = {"slope": 0.01, "floor": -0.1}
    sections: Any = {"grader": {"type": "custom", "target": f"{tmp_path}/own.py:Two"}, "penalties": {}}
    sections["grader"]["pass_threshold"] = 1

    def weighed(**weights: float) -> Any:
        advantage = {"type": "gdpo", "weights": weights}
        return checked(tiny_model, tmp_path, loss={"advantage": advantage}, **sections)

    with pytest.raises(UserError, match=r"\.weights: 'brif' is no part of the reward; it has right, brief; did"):
        weighed(brif=2)
    with pytest.raises(UserError, match=r"loss\.advantage\.weights: those of right, brief, .* are 0"):
        weighed(brief=0, right=0)
    sections["penalties"] = {"tool_calls": penalty}
    assert "tried" in dict(weighed(brief=2, tool_calls=0.5))
    sections["world"] = {"type": "custom", "target": f"{tmp_path}/own.py:Shelf"}
    sections["data"] = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How many?"}\n')
    assert "tried" in dict(weighed(brief=0, right=0, tool_calls=0, turn_rewards=1)), "turns may earn it"


def test_a_grader_is_tried_on_one_row_of_each_kind(tiny_model: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "How many?"}]}
    rows = [row | {"pieces": 3}, row | {"pieces": 4}, row, row | {"pieces": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sections = {"world": {}, "grader": {"type": "custom", "target": f"{tmp_path}/own.py:OfRows"}}
    alike = {"train": f"{tmp_path}/rows.jsonl", "eval": f"{tmp_path}/rows.jsonl"}
    assert dict(checked(tiny_model, tmp_path, data=alike, **sections))["tried"] == "grader on 'I do not know.': 3"
    told = (
        r"more\.jsonl, line 3: grader: tried on the answer 'I do not know\.' to task 'row-3': raised KeyError: 'pieces'"
    )
    with pytest.raises(UserError, match=told) as caught:
        checked(tiny_model, tmp_path, data=alike | {"eval": f"{tmp_path}/more.jsonl"}, **sections)
    assert str(caught.value).count("tried on") == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Huge", "reward is 1e\\+300 for task '.*'; expected a number from"),
        ("Taken", "parts: 'kl' is a part of the reward"),
    ],
)
def test_a_grader_that_no_run_could_learn_from_is_refused(
    tiny_model: Path, tmp_path: Path, name: str, told: str
) -> None:
    given = {"type": "custom", "target": f"{tmp_path}/own.py:{name}"}
    if name == "Huge":
        # One odd answer loses one rollout: it is told, and the check goes on.
        assert re.search(told, dict(checked(tiny_model, tmp_path, grader=given))["tried"])
    else:
        with pytest.raises(UserError, match=told):
            checked(tiny_model, tmp_path, grader=given)


def test_a_grader_that_looks_into_the_users_own_environment_finds_it_open(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "What is there?"}]}) + "\n")
    own = {
        "world": {"type": "custom", "target": str(tmp_path / "own.py:Shelf")},
        "data": {"train": str(rows), "eval": str(rows)},
        "grader": {"type": "custom", "target": "graders.custom:EnvReward"},
    }
    assert ("tried", "grader on 'I do not know.': 0.25") in checked(tiny_model, tmp_path, **own)
    own["world"]["target"] = str(tmp_path / "own.py:Broken")
    with pytest.raises(
        UserError, match=r"^world: open\(\) of task '.*': raised OSError: no shelf \(.*own\.py, line \d+\)"
    ):
        checked(tiny_model, tmp_path, **own)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nan", "grader 'custom' gave nan"),
        ("Forgets", "grader 'custom' gave None; expected a number or a Grade"),
        ("fails", r"raised IndexError: .*own\.py, line \d+"),
    ],
)
def test_a_grader_that_would_end_the_run_is_refused(tiny_model: Path, tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^grader: tried on the answer 'I do not know.' to task '.*': .*{told}"):
        checked(tiny_model, tmp_path, grader={"type": "custom", "target": str(tmp_path / f"own.py:{name}")})


def test_a_check_says_what_no_refusal_is_needed_for(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "How much?"}]
    rows.write_text("".join(json.dumps({"messages": messages, "answer": str(i)}) + "\n" for i in range(2)))
    data = {"train": str(rows), "eval": str(rows)}
    sections = scripted_config(tmp_path / "run", tiny_model) | {"data": data, "world": {}}
    sections |= {"grader": {"type": "multi", "graders": {"a": {"type": "exact"}}, "calculate_output": "a"}}
    sections["penalties"] = {}
    found = dict(check_run(validate_config(sections, source="test")))
    assert found["tasks"].endswith("(eval.num_tasks 2); 2 of those have the prompt of a training task")
    assert found["tools"] == "none" and found["grader"] == "multi of a (exact): a"


def test_a_check_names_the_tools_that_no_row_offers(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    offered = [{"type": "function", "function": {"name": "search"}}]
    row = {"messages": [{"role": "user", "content": "How much?"}], "tools": offered}
    rows.write_text(json.dumps(row | {"answer": "1"}) + "\n")
    sections = scripted_config(tmp_path / "run", tiny_model) | {"data": {"train": str(rows), "eval": str(rows)}}
    found = dict(check_run(validate_config(sections, source="test")))
    assert found["tools"] == "search; offered by no row to train on: list, cat, calculate"


def test_a_cache_that_holds_no_episode_is_refused_before_the_engine_starts(tiny_model: Path, tmp_path: Path) -> None:
    from trainer.prepare import prepare

    sections = scripted_config(tmp_path / "run", tiny_model, engine={"kv_cache_gib": 1e-6})
    with pytest.raises(UserError, match=r"^engine\.kv_cache_gib: 1e-06 GiB hold less than one episode of"):
        prepare(validate_config(sections, source="test"))
    sections = scripted_config(tmp_path / "run", tiny_model, engine={"kv_cache_gib": 1e6})
    with pytest.raises(UserError, match=r"^engine\.kv_cache_gib: 1e\+06 GiB are more than this machine has"):
        prepare(validate_config(sections, source="test"))


@pytest.mark.parametrize(("has_bfloat16", "fits"), [(True, True), (False, False)])
def test_a_cache_on_a_cpu_is_reckoned_in_the_dtype_that_this_one_has(
    has_bfloat16: bool, fits: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.engines.arguments import check_cache

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    # 2 layers of 2 heads of 16, keys and values: 256 bytes a token in 16 bits.
    length, gib = 400, 300 * 400 / 2**30
    sections = scripted_config(tmp_path / "run", tiny_model, engine={"kv_cache_gib": gib})
    sections |= {"model": {"name": str(tiny_model), "dtype": "auto"}}
    sections["rollout"] |= {"max_episode_tokens": length}
    config = validate_config(sections, source="test")
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="hold less than one episode"):
        check_cache(config, config.engine, tiny_model)


OWN_WORLD = """
from envs.tools import tool

@tool
def look() -> str:
    "Look."
    return "12"

class Shelf:
    def __init__(self):
        self.tools = {{"look": look}}
    {is_async}def open(self, task, rollout_id):
        self.pieces = 12
    async def close(self, episode):
        pass
    async def final_state(self):
        return {{"pieces": self.pieces}}

class Pieces:
    async def grade(self, task, episode):
        from graders.types import Grade
        return Grade(reward=float(episode.state["pieces"] == 12), parts={{"pieces": 1.0}})
"""


@pytest.mark.parametrize("is_async", ["async ", ""])
def test_a_grader_is_tried_on_the_environments_final_state(is_async: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_WORLD.format(is_async=is_async))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    rows = {"train": f"{tmp_path}/rows.jsonl", "eval": f"{tmp_path}/rows.jsonl"}
    sections = scripted_config(tmp_path / "run", tiny_model) | {"data": rows, "penalties": {}}
    sections["world"] = {"type": "custom", "target": f"{tmp_path}/own.py:Shelf"}
    sections["grader"] = {"type": "custom", "target": f"{tmp_path}/own.py:Pieces"}
    if is_async:
        assert dict(check_run(validate_config(sections, source="test")))["tried"].endswith(": 1")
    else:
        with pytest.raises(UserError, match="open: expected `async def open`"):
            list(check_run(validate_config(sections, source="test")))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"optim": {"warmup_steps": 4}}, "optim.warmup_steps 4: the learning rate does not come to its peak"),
        ({"loss": {"clip_high": 0.28}}, "loss.clip_high 0.28: with one update a step"),
        ({"loss": {"delta": 3.0}}, "loss.delta 3.0: with one update a step"),
        ({"loss": {"type": "cispo", "ratio_cap": 2.0}}, "loss.ratio_cap 2.0: with one update a step"),
        (
            {"loss": {"advantage": {"type": "gae", "critic": {"value_clip": 0.5}}}},
            "loss.advantage.critic.value_clip 0.5: with one update a step",
        ),
        (
            {"loss": {"advantage": {"type": "gae", "critic": {"warmup_steps": 2}}}, "optim": {"warmup_steps": 2}},
            "optim.warmup_steps 2: the first 2 steps train the critic alone",
        ),
        ({"loss": {"advantage": "turn_discounted"}}, "loss.advantage turn_discounted: nothing gives rewards of turns"),
        ({"optim": {"minibatches": 9}}, "optim.minibatches 9: no rollout is cut, so that the 8 of a step"),
        ({"eval": {"every_steps": 3}}, "eval.every_steps 3: optim.num_steps = 3 has no evaluation on the way"),
        (
            {"penalties": {"reasoning_tokens": {"slope": 0.001, "floor": -0.1}}},
            "penalties.reasoning_tokens: without model.reasoning_parser no token counts as reasoning",
        ),
        (
            {"penalties": {"generated_tokens": {"free": 480, "slope": 0.001, "floor": -0.1}}},
            "penalties.generated_tokens.free 480: no episode has more tokens of its own than 480",
        ),
        ({"loss": {"advantage": {"type": "gigpo", "weight": 0}}}, "loss.advantage.weight 0: gigpo gives no turn an"),
        (
            {"loss": {"advantage": {"type": "turn_discounted", "weight": 0}}},
            "loss.advantage.weight 0: turn_discounted gives no turn an advantage of its own, only the outcome's",
        ),
    ],
)
def test_what_changes_nothing_in_this_run_is_told(tiny_model: Path, tmp_path: Path, sections: Any, told: str) -> None:
    assert [t for t in idle(tiny_model, tmp_path, sections) if t.startswith(told)], told
    less = {"optim": {"warmup_steps": 3}, "eval": {"every_steps": 2}}
    less |= {"penalties": {"generated_tokens": {"free": 479, "slope": 0.001, "floor": -0.1}}}
    assert idle(tiny_model, tmp_path, less) == []
    critic = {"warmup_steps": 1, "value_clip": 0.5}
    less = {"loss": {"clip_high": 0.28, "advantage": {"type": "gae", "critic": critic}}}
    assert idle(tiny_model, tmp_path, less | {"optim": {"num_epochs": 2, "warmup_steps": 2}}) == []
    assert idle(tiny_model, tmp_path, {"loss": {"advantage": "gdpo"}}) == [], "the penalty is a part"
    by_turn = {"tool_calls": {"slope": 0.1, "floor": -0.2, "by_turn": True}}
    assert idle(tiny_model, tmp_path, {"loss": {"advantage": "turn_discounted"}, "penalties": by_turn}) == []


@pytest.mark.parametrize("grader", [{"type": "numeric"}, {"type": "custom", "targets": ["a.py:f", "a.py:g"]}])
def test_gdpo_over_a_reward_of_one_part_is_told(grader: Any) -> None:
    sections = {"output_dir": "x", "grader": grader, "loss": {"advantage": "gdpo"}}
    [told] = idle_settings(validate_config(sections, source="test"))
    assert told.startswith(f"loss.advantage gdpo: the reward has one part, {grader['type']}, so that it is grpo")
    own = {"type": "custom", "target": "a.py:Mine"}
    assert idle_settings(validate_config(sections | {"grader": own}, source="test")) == []


def idle(model: Path, folder: Path, sections: Any) -> list[str]:
    config = validate_config(scripted_config(folder / "run", model, **sections), source="test")
    return [found for what, found in check_run(config) if what == "no effect"]


ODD_WORLD = """
import asyncio
class Odd:
    tools = {{}}
    async def open(self, task, rollout_id): pass
    async def final_state(self): return {{"a": {state}}}
    async def close(self, episode): await asyncio.sleep({closes_s})
class Free:
    def grade(self, task, episode): return 1.0
"""


@pytest.mark.parametrize(
    ("state", "closes_s", "told"),
    [
        ("object()", 0, r"world: final_state\(\) of task 'row-1': raised TypeError: Object of type object is not JSON"),
        ("1", 60, r"world: close\(\): not done within rollout\.settle_timeout_s \(0\.2 s\)"),
    ],
)
def test_what_is_wrong_with_an_environment_is_told_of_the_member_at_fault(
    tiny_model: Path, tmp_path: Path, state: str, closes_s: int, told: str
) -> None:
    (tmp_path / "own.py").write_text(ODD_WORLD.format(state=state, closes_s=closes_s))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    rows = {"train": f"{tmp_path}/rows.jsonl", "eval": f"{tmp_path}/rows.jsonl"}
    sections = scripted_config(tmp_path / "run", tiny_model, rollout={"settle_timeout_s": 0.2})
    sections |= {"data": rows, "penalties": {}, "world": {"type": "custom", "target": f"{tmp_path}/own.py:Odd"}}
    sections["grader"] = {"type": "custom", "target": f"{tmp_path}/own.py:Free"}
    with pytest.raises(UserError, match=told):
        check_run(validate_config(sections, source="test"))


@pytest.mark.parametrize(
    ("member", "told"),
    [
        ("def check(self, task): raise SystemExit(0)", r"grader: check\(\): raised SystemExit: 0"),
        ("async def aclose(self): raise KeyError('held')", r"raised KeyError: 'held' \(.*own\.py, line 4\)"),
        ("async def aclose(self): await asyncio.sleep(60)", r"grader: aclose\(\): not done within rollout\.settle_"),
    ],
)
def test_what_else_a_grader_has_is_tried_too(tiny_model: Path, tmp_path: Path, member: str, told: str) -> None:
    (tmp_path / "own.py").write_text(
        f"import asyncio\nclass Own:\n    def grade(self, task, episode): return 1.0\n    {member}\n"
    )
    sections = scripted_config(tmp_path / "run", tiny_model, rollout={"settle_timeout_s": 0.2}) | {"penalties": {}}
    sections["grader"] = {"type": "custom", "target": f"{tmp_path}/own.py:Own"}
    with pytest.raises(UserError, match=told):
        check_run(validate_config(sections, source="test"))


def test_a_graders_rewards_of_turns_are_counted_before_the_run(tiny_model: Path, tmp_path: Path) -> None:
    own = OWN_WORLD.replace('parts={{"pieces": 1.0}}', "turn_rewards=(0.5, 0.5)")
    (tmp_path / "own.py").write_text(own.format(is_async="async "))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    rows = {"train": f"{tmp_path}/rows.jsonl", "eval": f"{tmp_path}/rows.jsonl"}
    sections = scripted_config(tmp_path / "run", tiny_model) | {"data": rows, "penalties": {}}
    sections["world"] = {"type": "custom", "target": f"{tmp_path}/own.py:Shelf"}
    sections["grader"] = {"type": "custom", "target": f"{tmp_path}/own.py:Pieces"}
    with pytest.raises(UserError, match="gave 2 turn_rewards for an episode of 1 turns"):
        list(check_run(validate_config(sections, source="test")))
