"""The run's config: what loads, what is refused and in which words."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from envs.registry import build_world
from envs.remote.config import RemoteConfig
from tests.support import ROOT
from trainer.config import RunConfig, load_config, validate_config
from trainer.config.load import _WITHOUT_TYPE
from trainer.tasks.load import load_tasks

MINIMAL = {"output_dir": "runs/x", "grader": {"type": "numeric"}}


def write(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        validate_config(MINIMAL | changes, source="c.yaml")
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    assert isinstance(load_config(path), RunConfig)


def test_there_are_shipped_configs():
    assert ROOT / "configs" / "quickstart.yaml" in set((ROOT / "configs").glob("*.yaml"))


def test_the_resolved_config_written_as_yaml_is_the_same_config():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert RunConfig.model_validate(again) == config


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optim.learning_rate=2e-5", lambda c: c.optim.learning_rate, 2e-5),
        ("optim.learning_rate=1.5E-4", lambda c: c.optim.learning_rate, 1.5e-4),
        ("optim.num_steps=7", lambda c: c.optim.num_steps, 7),
        ("loss.tis_cap=null", lambda c: c.loss.tis_cap, None),
        ("engine.enforce_eager=true", lambda c: c.engine.enforce_eager, True),
        ("trackers=[]", lambda c: c.trackers, []),
        ("warmstart.num_steps=3", lambda c: c.warmstart and c.warmstart.num_steps, 3),
        ("output_dir=runs/a=b", lambda c: c.output_dir, Path("runs/a=b")),
        ("grader.partial_credit=0", lambda c: c.grader.partial_credit, 0),
    ],
)
def test_overrides(tmp_path, override, read, value):
    assert read(load_config(write(tmp_path, MINIMAL), [override])) == value


BELOW = {
    "output_dir": "runs/x",
    "grader": {"type": "numeric", "partial_credit": 0.5},
    "loss": {"clip_low": 0.1, "clip_high": 0.3},
    "optim": {"num_steps": 5, "weight_decay": 0.1},
    "warmstart": {"num_steps": 3},
    "trackers": ["wandb", "trackio"],
}


@pytest.mark.parametrize(
    ("above", "changed"),
    [
        ({}, {}),
        ({"optim": {"num_steps": 6}}, {"optim": {"num_steps": 6, "weight_decay": 0.1}}),
        ({"trackers": ["tensorboard"]}, {"trackers": ["tensorboard"]}),
        ({"warmstart": None}, {"warmstart": None}),
        ({"optim": None}, {"optim": {}}),
        ({"grader": {"type": "exact"}}, {"grader": {"type": "exact"}}),
        ({"grader": {"type": "numeric"}}, {}),
        ({"loss": {"type": "clipped", "clip_low": 0.2}}, {"loss": {"clip_low": 0.2, "clip_high": 0.3}}),
        ({"loss": {"type": "custom", "target": "a.py:f"}}, {"loss": {"type": "custom", "target": "a.py:f"}}),
        ({"model": {"lora": {"r": 4}}}, {"model": {"lora": {"r": 4}}}),
    ],
)
def test_a_config_stands_on_its_base_key_by_key(tmp_path, above, changed):
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(BELOW))
    config = load_config(write(tmp_path, above | {"base": "below.yaml"}))
    assert config == validate_config(BELOW | changed, source="")


def test_a_base_lies_beside_the_file_that_names_it_and_may_have_one_itself(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "lowest.yaml").write_text(yaml.safe_dump(BELOW))
    (tmp_path / "a" / "b" / "low.yaml").write_text("base: ../../lowest.yaml\noptim: {num_steps: 6}\nseed: 1\n")
    path = write(tmp_path / "a", {"base": "b/low.yaml", "seed": 2})
    config = load_config(path, ["optim.weight_decay=0.3"])
    assert (config.seed, config.optim.num_steps, config.optim.weight_decay) == (2, 6, 0.3)
    assert "base" not in config.model_dump()
    path.write_text("base: b/low.yaml\noptim: {num_stps: 6}\n")
    with pytest.raises(
        UserError, match=r"config \S+/config.yaml, on \S+/low.yaml, on \S+/lowest.yaml: .*\n  optim.num_stps"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("config.yaml", r"a/config.yaml: base: goes in a circle: \S+a/config.yaml → \S+a/config.yaml$"),
        ("back.yaml", r"a/config.yaml: base: goes in a circle: \S+config.yaml → \S+back.yaml → \S+/a/config.yaml$"),
        ("none.yaml", r"a/config.yaml: base: config \S+/a/none.yaml: No such file or directory"),
        ("list.yaml", r"config \S+/list.yaml: expected a mapping of sections, got list"),
        (3, r"a/config.yaml: base: expected the path of a config from this one's folder, got 3"),
        (["a.yaml"], r"base: expected the path of a config"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, base, told):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back.yaml").write_text("base: ../a/config.yaml\n")
    (tmp_path / "a" / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=told):
        load_config(write(tmp_path / "a", {"base": base}))


def test_a_base_that_no_file_can_be_called_by_and_bases_without_an_end_are_refused(tmp_path):
    path = tmp_path / "0.yaml"
    path.write_text('base: "a\\0b.yaml"\n')
    with pytest.raises(UserError, match=r"^config \S+/0\.yaml: base: config .*: embedded null byte"):
        load_config(path)
    for i in range(1200):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
    with pytest.raises(UserError, match=r"^config \S+/0\.yaml: base: more than 20 configs, each on the next"):
        load_config(path)


def test_no_override_names_a_base(tmp_path):
    with pytest.raises(UserError, match=r"override base=b\.yaml: a config names its base in its file"):
        load_config(write(tmp_path, MINIMAL), ["base=b.yaml"])


@pytest.mark.parametrize(("section", "given"), [("loss", {}), ("world", {})])
def test_a_section_that_names_no_type_is_of_the_one_that_bases_take_it_for(section, given):
    assert getattr(validate_config(MINIMAL | {section: given}, source=""), section).type == _WITHOUT_TYPE[section]


def test_later_overrides_win_and_the_rest_stays(tmp_path):
    path = write(tmp_path, MINIMAL | {"optim": {"num_steps": 5, "weight_decay": 0.1}})
    config = load_config(path, ["optim.num_steps=6", "optim.num_steps=7"])
    assert config.optim.num_steps == 7 and config.optim.weight_decay == 0.1


BY_TURN = {"slope": 0.1, "floor": -0.2, "by_turn": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": {"learning_rte": 1}}, "optim.learning_rte: unknown key; did you mean learning_rate?"),
        ({"lss": {}}, "lss: unknown key; did you mean loss?"),
        ({"rollout": {"zzz": 1}}, "rollout.zzz: unknown key; known keys: answer, episode_t"),
        ({"grader": {"type": "numeric", "partial_credt": 1}}, "grader.partial_credt: unknown key; did you mean"),
        ({"penalties": {"tool_calls": {"slop": 1, "slope": 1, "floor": -0.1}}}, "penalties.tool_calls.slop: unknown"),
        ({"model": {"lora": {"rank": 8}}}, "model.lora.rank: unknown key; known keys: alpha, r, start_from, "),
        ({"world": {"type": "finance", "num_company": 9}}, "world.num_company: unknown key; did you mean num_compan"),
        ({"optim": {"num_steps": "many"}}, "optim.num_steps: Input should be a valid integer"),
        ({"optim": {"learning_rate": -1}}, "optim.learning_rate: Input should be greater than 0 (got -1)"),
        ({"grader": {"type": "numerc"}}, "'exact', 'numeric'"),
        ({"grader": {"type": "numeric", "partial_credit": "a"}}, "grader.partial_credit: Input should be a valid"),
        ({"model": {"lora": {"target_modules": 3}}}, "model.lora.target_modules: Input should be"),
        ({"model": {"lora": {"target_modules": []}}}, "model.lora.target_modules: List should have at least 1 item"),
        ({"model": {"chat_template_kwargs": {"day": date(2024, 7, 26)}}}, "model.chat_template_kwargs: not JSON: "),
        ({"trackers": ["tensorbord"]}, "trackers.0: Input should be 'tensorboard', 'wandb' or 'trackio'"),
        ({"rollout": {"max_turn_tokens": 64, "max_episode_tokens": 64}}, "\n  rollout.max_turn_tokens must be"),
        ({"data": {"train": "a.jsonl"}}, "data.eval: required, but not given"),
        ({"loss": {"advantage": {"type": "rlo"}}}, "loss.advantage.type: expected one of 'grpo', 'dr_grpo', 'rloo', "),
        ({"loss": {"advantage": {"type": "rlo"}}}, "'gae', 'custom' (got 'rlo'); did you mean 'rloo'?"),
        ({"loss": {"advantage": "rlo"}}, "loss.advantage: expected one of 'grpo', "),
        ({"penalties": {"tool_calls": BY_TURN}}, "penalties.tool_calls.by_turn: has no effect with loss.advantage g"),
        ({"rollout": {"tied_groups": "skip"}, "loss": {"advantage": "gae"}}, "skip has no effect with loss.advantage "),
        ({"rollout": {"tied_groups": "replace"}, "loss": {"advantage": "reinforce_pp"}}, "tied_groups: replace has no"),
        ({"rollout": {"tied_groups": "replace"}, "overlap": {"max_staleness": 1}}, "rollout.tied_groups: replace asks"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_key(changes, expected):
    message = refusal(**changes)
    assert message.startswith("config c.yaml: ") and expected in message


RANGE = "loss.correction.mean_range: expected 2 values (got "
BOTH = "Input should be a valid list; or: Input should be 'all-linear'"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"lora": {"target_modules": "all_linear"}}}, f"target_modules: {BOTH} (got 'all_linear')"),
        ({"model": {"lora": {"target_modules": ["q_proj", 1]}}}, "target_modules.1: Input should be a valid string"),
        ({"loss": {"correction": {"mean_range": [0.5]}}}, f"{RANGE}[0.5])"),
        ({"loss": {"correction": {"mean_range": []}}}, f"{RANGE}[])"),
        ({"loss": {"correction": {"mean_range": [0.5, 1, 2]}}}, f"{RANGE}[0.5, 1, 2])"),
        ({"loss": {"correction": {"mean_range": 0.5}}}, f"{RANGE}0.5)"),
        ({"model": {"lora": {"start_from": 3}}}, "model.lora.start_from: expected a path (got 3)"),
    ],
)
def test_one_mistake_is_one_problem_in_words_of_the_file(changes, expected):
    message = refusal(**changes)
    assert message.startswith("config c.yaml: 1 problem\n") and expected in message


@pytest.mark.parametrize("advantage", ["reinforce_pp", "mt_grpo", "gigpo", "turn_discounted", "gae"])
def test_penalties_by_turn_go_with_advantages_by_turn(advantage):
    sections = {"penalties": {"tool_calls": BY_TURN}, "loss": {"advantage": advantage}}
    assert validate_config(MINIMAL | sections, source="").penalties.tool_calls.by_turn


def test_tied_groups_are_skipped_beside_rollouts_that_run_ahead():
    sections = {"rollout": {"tied_groups": "skip"}, "overlap": {"max_staleness": 1}}
    assert validate_config(MINIMAL | sections, source="").rollout.tied_groups == "skip"


def test_penalties_that_could_turn_a_judgement_are_an_error_of_the_config():
    message = refusal(penalties={"tool_calls": {"slope": 0.1, "floor": -0.5}})
    assert "penalties: the floors sum to -0.5" in message and "Value error" not in message


def test_a_mistake_inside_a_grader_of_a_multi_is_named_by_its_key_in_the_file():
    inner = {
        "type": "string_check",
        "name": "a",
        "operation": "x",
        "input": "{{ sample.output_text }}",
        "refrence": "b",
    }
    message = refusal(grader={"type": "multi", "graders": {"a": inner}, "calculate_output": "a"})
    assert "  grader.graders.a.operation: Input should be" in message and "(got 'x')" in message
    assert "  grader.graders.a.refrence: unknown key; did you mean reference?" in message


def test_a_long_value_is_cut_in_the_message():
    assert len(refusal(seed="x" * 10_000)) < 400


def test_all_problems_are_named_at_once_but_on_one_screen():
    assert refusal(optim={"a": 1, "b": 2}).count("unknown key") == 2
    many = refusal(**{f"key{i}": i for i in range(50)})
    assert len(many.splitlines()) <= 22 and "config c.yaml: 50 problems" in many and "and 31 more" in many


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[1, 2]", "expected a mapping of sections, got list"), ("a: [", "not valid YAML"), ("", "got NoneType")],
)
def test_files_that_are_no_config(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_config(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"output_dir: \xff")
    with pytest.raises(UserError, match=r"c\.yaml: not UTF-8 text: .* at byte 12"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.num_steps", "expected KEY=VALUE"),
        ("output_dir.x=1", "output_dir is not a section"),
        ("optim.num_steps=[", "the value is not valid YAML"),
        ("optim.nm_steps=3", "did you mean num_steps"),
    ],
)
def test_bad_overrides(tmp_path, override, expected):
    with pytest.raises(UserError, match=expected):
        load_config(write(tmp_path, MINIMAL), [override])


SAY = {"role": "user", "content": "x"}
MULTI = {
    "type": "multi",
    "graders": {
        "near": {
            "type": "text_similarity",
            "name": "near",
            "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}",
            "evaluation_metric": "fuzzy_match",
        },
        "tone": {
            "type": "label_model",
            "name": "tone",
            "model": "judge",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Is it polite? {{sample.output_text}}"}]}
            ],
            "labels": ["polite", "rude"],
            "passing_labels": ["polite"],
        },
    },
    "calculate_output": "0.5 * near + 0.5 * tone",
}


@pytest.mark.parametrize(
    "graders",
    [MULTI["graders"], list(MULTI["graders"].values()), MULTI["graders"]["near"]],
    ids=["dict", "list", "one"],
)
def test_the_graders_inside_a_multi_come_as_mapping_list_or_one(graders):
    formula = "near" if "type" in graders else MULTI["calculate_output"]
    grader = MULTI | {"graders": graders, "calculate_output": formula}
    config = validate_config(MINIMAL | {"grader": grader}, source="c.yaml")
    assert "near" in config.grader.graders


def test_a_grader_is_read_from_the_hosted_services_json(tmp_path):
    (tmp_path / "grader.json").write_text(json.dumps(MULTI))
    config = validate_config(MINIMAL | {"grader": str(tmp_path / "grader.json")}, source="c.yaml")
    assert config.grader.calculate_output == MULTI["calculate_output"]
    # The run folder keeps the settings, not the path.
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_file_named_in_a_config_is_read_as_json_or_yaml_whichever_it_is(tmp_path):
    near = {"type": "string_check", "name": "é 😀", "operation": "eq", "input": "{{item.a}}", "reference": "b"}
    texts = {
        # Escapes beyond 16 bits and tabs, as programs write them, and the mark that editors put before them.
        **{"escaped.json": json.dumps(near), "tabs.json": json.dumps(near, indent="\t")},
        **{"marked.JSON": "\ufeff" + json.dumps(near), "marked.yaml": "\ufeff" + yaml.safe_dump(near)},
        **{"no_suffix": json.dumps(near, indent="\t"), "other.txt": yaml.safe_dump(near)},
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        config = validate_config(MINIMAL | {"grader": str(tmp_path / name)}, source="c.yaml")
        assert config.grader.name == "é 😀", name


@pytest.mark.parametrize(
    ("grader", "expected"),
    [
        ("nowhere.json", "grader: grader file nowhere.json: No such file"),
        (MULTI | {"graders": {"inner": MULTI}}, "'multi'"),
        (MULTI["graders"]["tone"], "'label_model'"),
        (MULTI["graders"]["near"] | {"evaluation_metric": "rouge_9"}, "grader.evaluation_metric: "),
        (MULTI["graders"]["near"] | {"metric": "bleu"}, "grader.metric: unknown key"),
        ({"type": "score_model", "model": "m", "input": [SAY], "range": [1, 0]}, "low below high"),
        ({"type": "python", "source": "x" * 256_000}, "less than 256 kB"),
    ],
)  # fmt: skip
def test_a_bad_hosted_grader_is_named_by_its_key(grader, expected):
    assert expected in refusal(grader=grader)


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        ({"type": "remote", "tools": [{"name": "a", "server_url": "http://x", "url": "y"}]}, "url"),
        ({"type": "finance", "companies": 3}, "world.companies: unknown key"),
        ({"companies": 3}, "world.companies: unknown key"),
        ({"type": "finanze"}, "world"),
    ],
)
def test_a_bad_world_is_named_by_its_key(world, expected):
    assert expected in refusal(world=world)


@pytest.mark.parametrize("sections", [{}, {"world": None}, {"world": {}}, {"world": {"type": "remote"}}])
def test_without_a_world_there_are_no_tools_and_never_those_of_the_demo(sections):
    data = {"train": "a.jsonl", "eval": "b.jsonl"}
    config = validate_config(MINIMAL | {"data": data} | sections, source="c.yaml")
    assert config.world == RemoteConfig() and not build_world(config.world).make_env().tools


def test_without_world_and_data_there_is_nothing_to_train_on():
    config = validate_config(dict(MINIMAL), source="c.yaml")
    with pytest.raises(UserError, match=r"^data: expected a data section with train and eval"):
        load_tasks(config, build_world(config.world), "train")


def test_the_engine_can_judge_only_beside_an_adapter():
    message = refusal(judge={"base_url": "engine"}, engine={"publish": "merged"})
    assert "set engine.publish to lora" in message
