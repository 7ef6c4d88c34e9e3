"""A config that is only looked at: `scripts/train.py --check`."""

import json
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from tests.support.configs import scripted_config
from trainer.config import validate_config
from trainer.preflight.check import check_run


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


def test_a_cache_that_holds_no_episode_is_refused_before_the_engine_starts(tiny_model: Path, tmp_path: Path) -> None:
    from trainer.prepare import prepare

    sections = scripted_config(tmp_path / "run", tiny_model, engine={"kv_cache_gib": 1e-6})
    with pytest.raises(UserError, match=r"^engine\.kv_cache_gib: 1e-06 GiB hold less than one episode of"):
        prepare(validate_config(sections, source="test"))
    sections = scripted_config(tmp_path / "run", tiny_model, engine={"kv_cache_gib": 1e6})
    with pytest.raises(UserError, match=r"^engine\.kv_cache_gib: 1e\+06 GiB are more than this machine has"):
        prepare(validate_config(sections, source="test"))
