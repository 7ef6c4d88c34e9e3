"""canary.jsonl: what the trainer said of the canary at a step, whatever became of the run meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from envs.errors import UserError
from trainer.runs.canary_record import CANARY, of_base, of_policy, read_canary
from trainer.runs.files import append_text
from trainer.runs.folder import RunFolder

TOKENS = [[1, 2, 3], [4, 5]]


def written(folder: Path, *records: object) -> Path:
    (folder / CANARY).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def scores(value: float) -> list[float]:
    return [value, value - 1, value - 2]


def test_a_step_is_read_with_its_tokens_its_base_and_its_fellows(tmp_path):
    run = written(tmp_path, of_base(TOKENS, scores(-1)), of_policy(0, scores(-1.5)), of_policy(1, scores(-1.123456789)))
    record = read_canary(run, 1)
    assert record.token_ids == TOKENS and record.base == scores(-1)
    assert record.policies == {0: scores(-1.5), 1: [-1.12346, -2.12346, -3.12346]}


def test_what_a_resumed_run_says_of_a_step_takes_the_place_of_what_it_said_before(tmp_path):
    first = [of_base(TOKENS, scores(-1)), of_policy(0, scores(-2)), of_policy(1, scores(-3)), of_policy(2, scores(-4))]
    resumed = [of_base(TOKENS, scores(-1)), of_policy(1, scores(-3)), of_policy(2, scores(-5))]
    assert read_canary(written(tmp_path, *first, *resumed), 2).policies == {
        0: scores(-2),
        1: scores(-3),
        2: scores(-5),
    }


def test_a_run_goes_on_with_no_other_base_than_its_own(tmp_path):
    run = RunFolder(tmp_path, run_id="r", rank=0)
    run.keep_canary(of_base(TOKENS, scores(-1)), tolerance=0.1)
    run.keep_canary(of_base(TOKENS, scores(-3)), tolerance=0.1)  # Nothing had been trained on the first.
    run.keep_canary(of_policy(0, scores(-3)), tolerance=0.1)
    run.keep_canary(of_base(TOKENS, scores(-3.05)), tolerance=0.1)
    run.keep_canary(of_base([[1, 2, 3, 9]], scores(-5)), tolerance=0.1)
    with pytest.raises(UserError, match=r"the base model is not the one that .* by 0\.450 nats a token"):
        run.keep_canary(of_base(TOKENS, scores(-3.5)), tolerance=0.1)
    assert len((tmp_path / CANARY).read_text().splitlines()) == 5


def test_versions_that_were_scored_on_other_tokens_are_not_compared(tmp_path):
    other = [[7, 8, 9, 10]]
    first = [of_base(TOKENS, scores(-1)), of_policy(0, scores(-2)), of_policy(1, scores(-3))]
    run = written(tmp_path, *first, of_base(other, scores(-1)), of_policy(1, scores(-4)))
    assert read_canary(run, 0).policies == {0: scores(-2), 1: scores(-3)}
    record = read_canary(run, 1)
    assert record.token_ids == other and record.policies == {1: scores(-4)}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [of_base(TOKENS, scores(-1))],
        [of_base(TOKENS, scores(-1)), of_policy(3, scores(-1)[:2])],
    ],
    ids=["no file", "no step", "too short"],
)
def test_a_step_that_was_not_kept_is_told(tmp_path, records):
    run = written(tmp_path, *records) if records else tmp_path
    with pytest.raises(UserError, match=r"canary.jsonl: does not hold .* at step 3"):
        read_canary(run, 3)


@pytest.mark.parametrize(
    "damaged",
    [{"step": 1}, {"step": "one", "policy": [0.0]}, {"token_ids": 3, "base": []}, {"step": 1, "policy": [None]}],
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    run = written(tmp_path, of_base(TOKENS, scores(-1)), damaged)
    with pytest.raises(UserError, match=r"canary.jsonl, line 2: is damaged"):
        read_canary(run, 1)


def test_a_line_that_is_no_object_is_named_with_what_to_do(tmp_path):
    run = written(tmp_path, of_base(TOKENS, scores(-1)))
    append_text(run / CANARY, "[]")
    with pytest.raises(UserError, match=r"canary.jsonl, line 2: is damaged: holds no JSON object; delete the file to"):
        read_canary(run, 1)


def test_a_policy_before_any_base_is_damage(tmp_path):
    with pytest.raises(UserError, match=r"canary.jsonl, line 1: is damaged"):
        read_canary(written(tmp_path, of_policy(1, scores(-1))), 1)
