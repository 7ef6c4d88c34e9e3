"""What a user got wrong: exit code 2, one screen that names file, line or key and what was expected, nothing loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.reading.documents import read_document
from tests.support.configs import scripted_config
from tests.support.scripts import run_script

ROW = {"messages": [{"role": "user", "content": "How much?"}], "answer": "1 million"}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Any]:
    """A good config; every test spoils one thing in it."""
    return scripted_config(tmp_path / "run", tmp_path / "model")


def refused(tmp_path: Path, config: object, *overrides: str) -> str:
    """Run `scripts/train.py`; the message on standard error."""
    path = tmp_path / "config.yaml"
    if config is not None:
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    before = sorted(p for p in (tmp_path / "run").rglob("*"))
    result = run_script("train", "--config", path, *overrides)
    message = result.stderr
    assert result.returncode == 2, f"{result.returncode}: {message}"
    assert "Traceback" not in message and message.startswith("error: ")
    assert 0 < len(message.splitlines()) <= 24
    assert not result.loaded and not result.stdout
    assert before == sorted(p for p in (tmp_path / "run").rglob("*")), "nothing is written"
    return message


def with_rows(tmp_path: Path, config: dict[str, Any], *rows: object) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return config | {"data": {"train": str(path), "eval": str(path)}}


def test_unknown_key(tmp_path, setting):
    setting["optim"]["learning_rte"] = 1e-4
    message = refused(tmp_path, setting)
    assert f"config {tmp_path / 'config.yaml'}" in message
    assert "optim.learning_rte: unknown key; did you mean learning_rate?" in message


def test_wrong_type(tmp_path, setting):
    message = refused(tmp_path, setting, "optim.num_steps=many")
    assert "optim.num_steps: Input should be a valid integer" in message and "(got 'many')" in message


def test_a_hundred_unknown_keys_still_fit_on_a_screen(tmp_path, setting):
    message = refused(tmp_path, setting | {f"key_{i}": i for i in range(100)})
    assert "100 problems" in message and "more" in message


def test_missing_config_file(tmp_path):
    assert f"config {tmp_path / 'config.yaml'}: No such file" in refused(tmp_path, None)


def test_a_config_that_is_not_yaml(tmp_path):
    assert "not valid YAML" in refused(tmp_path, "optim: [")


def test_a_section_that_stands_twice(tmp_path):
    message = refused(tmp_path, "optim: {num_steps: 1}\nrollout: {}\noptim: {num_steps: 2}\n")
    assert "the key 'optim' stands twice in one mapping" in message and "line 3" in message


def test_merged_mappings_give_way_to_what_stands_beside_them(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: *b\n  y: 3\n")
    assert read_document(path, "merged") == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 2, "y": 3}}


def test_bad_override(tmp_path, setting):
    assert "override 'optim.num_steps': expected KEY=VALUE" in refused(tmp_path, setting, "optim.num_steps")


def test_penalties_that_could_turn_a_judgement(tmp_path, setting):
    message = refused(tmp_path, setting, "penalties.tool_calls.floor=-0.9")
    assert "penalties: the floors sum to -0.9" in message


def test_missing_data_file(tmp_path, setting):
    config = setting | {"data": {"train": str(tmp_path / "none.jsonl"), "eval": str(tmp_path / "none.jsonl")}}
    assert f"data.train {tmp_path / 'none.jsonl'}: No such file" in refused(tmp_path, config)


def test_malformed_line(tmp_path, setting):
    message = refused(tmp_path, with_rows(tmp_path, setting, ROW, ROW | {"task_id": "b"}, '{"messages": ['))
    assert f"{tmp_path / 'rows.jsonl'}, line 3: not valid JSON" in message


def test_a_row_without_messages(tmp_path, setting):
    message = refused(tmp_path, with_rows(tmp_path, setting, ROW, {"answer": "1"}))
    assert f"{tmp_path / 'rows.jsonl'}, line 2: messages: required (a list of chat messages)" in message


def test_a_tool_that_is_not_offered(tmp_path, setting):
    tools = [{"type": "function", "function": {"name": "browse"}}]
    message = refused(tmp_path, with_rows(tmp_path, setting, ROW | {"tools": tools}))
    assert "line 1: tools: 'browse' is not offered by the world; it offers search, list, cat, calculate" in message


def test_a_row_that_the_grader_cannot_grade(tmp_path, setting):
    message = refused(tmp_path, with_rows(tmp_path, setting, ROW, ROW | {"answer": "none"}))
    assert "row-2" in message and "the numeric grader needs exactly one number" in message


@pytest.mark.parametrize("name", ["./no/such/model", "/no/such/model"])
def test_model_not_found(tmp_path, setting, name):
    message = refused(tmp_path, setting, f"model.name={name}")
    assert f"model.name: '{name}' can't be loaded" in message and "Expected 'smollm2-135m-instruct'" in message


def test_a_folder_that_is_no_model(tmp_path, setting):
    (tmp_path / "model").mkdir()
    assert "holds no config.json" in refused(tmp_path, setting)


def test_output_folder_of_another_run(tmp_path, setting):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(setting | {"seed": 5}))
    message = refused(tmp_path, setting)
    assert f"output_dir {tmp_path / 'run'}: holds a run with another config" in message


def test_output_folder_with_other_files(tmp_path, setting):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("")
    assert "is not empty and holds no run" in refused(tmp_path, setting)


def test_a_tracker_that_is_not_installed(tmp_path, setting):
    try:
        import wandb  # noqa: F401
    except ImportError:
        assert "trackers: the package wandb is not installed" in refused(tmp_path, setting | {"trackers": ["wandb"]})
    else:
        pytest.skip("wandb is installed")


def test_a_key_to_stratify_by_that_a_task_lacks_or_that_never_differs(tmp_path, setting):
    config = with_rows(tmp_path, setting, ROW | {"kind": "sum"}, ROW | {"kind": "sum", "part": 1})
    message = refused(tmp_path, config, "rollout.stratify_by=part")
    assert "rollout.stratify_by: the training task 'row-1' has no key 'part'; it has messages, answer, kind" in message
    assert "every training task has the same 'kind'" in refused(tmp_path, config, "rollout.stratify_by=kind")


def test_two_rules_that_choose_the_tasks(tmp_path, setting):
    message = refused(tmp_path, setting | {"curriculum": {}}, "rollout.stratify_by=kind")
    assert "rollout.stratify_by: the curriculum chooses by difficulty; leave one of the two out" in message


def test_a_check_ends_as_training_would(tmp_path, setting):
    message = refused(tmp_path, setting, "--check", "optim.num_steps=many")
    assert "optim.num_steps: Input should be a valid integer" in message
    message = refused(tmp_path, setting, "--check", "model.name=./no/such/model")
    assert "model.name: './no/such/model' can't be loaded" in message


def test_a_misspelt_key_of_a_data_set_and_a_source_of_neither_kind(tmp_path, setting):
    data = {"train": {"dataset": "a/b", "spilt": "test"}, "eval": 5}
    message = refused(tmp_path, setting | {"data": data})
    assert "2 problems" in message and "data.train.spilt: unknown key; did you mean split?" in message
    assert "data.eval: expected the path of a JSONL file, or a data set" in message and "(got 5)" in message
