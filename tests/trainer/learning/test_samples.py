import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.learning.samples import rollout_samples, sample_of
from trainer.types import Ledger

LOGPROBS = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)
SEGMENTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 10**6), max_size=5),
        st.tuples(st.lists(st.tuples(st.integers(0, 10**6), LOGPROBS), max_size=5), st.integers(0, 10**4)),
    ),
    max_size=8,
)


def ledger_of(segments) -> Ledger:
    ledger = Ledger()
    ledger.append_context([1])
    for segment in segments:
        if isinstance(segment, list):
            ledger.append_context(segment)
        else:
            pairs, version = segment
            ledger.append_sampled([t for t, _ in pairs], [x for _, x in pairs], version)
    return ledger


def test_the_mask_of_the_documented_episode():
    ledger = Ledger()
    ledger.append_context([10, 11, 12])
    ledger.append_sampled([20, 21], [-1.2, -0.1], 7)
    ledger.append_context([13, 42, 12])
    assert ledger.prompt_ids == [10, 11, 12, 20, 21, 13, 42, 12]
    ledger.append_sampled([42, 21], [-0.4, -0.1], 7)
    sample = sample_of(ledger, advantage=0.5, rollout_id="r", task_id="t")
    assert sample.token_ids == (10, 11, 12, 20, 21, 13, 42, 12, 42, 21)
    assert sample.trainable == tuple(map(bool, (0, 0, 0, 1, 1, 0, 0, 0, 1, 1)))
    assert sample.logprobs == (0.0, 0.0, 0.0, -1.2, -0.1, 0.0, 0.0, 0.0, -0.4, -0.1)
    assert sample.versions == (-1, -1, -1, 7, 7, -1, -1, -1, 7, 7)
    assert (sample.num_trainable, len(ledger)) == (4, 10)


@given(SEGMENTS)
def test_a_ledger_survives_json_bit_for_bit(segments):
    ledger = ledger_of(segments)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json(), allow_nan=False)))
    assert again == ledger
    as_sample = {"advantage": 0.0, "rollout_id": "r", "task_id": "t"}
    assert sample_of(again, **as_sample) == sample_of(ledger, **as_sample)


@given(SEGMENTS)
def test_a_ledger_keeps_every_token_in_order(segments):
    expected = [1]
    for segment in segments:
        expected += segment if isinstance(segment, list) else [t for t, _ in segment[0]]
    assert ledger_of(segments).prompt_ids == expected


def test_the_prompt_is_a_copy():
    ledger = Ledger()
    ledger.append_context([1, 2])
    ledger.prompt_ids.append(3)
    assert ledger.prompt_ids == [1, 2]


def test_a_policy_version_may_change_within_a_turn():
    ledger = Ledger()
    ledger.append_context([1])
    ledger.append_sampled([2], [-1.0], 3)
    ledger.append_sampled([3], [-1.0], 4)
    assert ledger.to_json()["sampled"] == [[1, 2, 3], [2, 3, 4]]
    assert Ledger.from_json(ledger.to_json()) == ledger


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_refused(logprob):
    ledger = Ledger()
    ledger.append_context([1])
    with pytest.raises(AssertionError, match="log-probability"):
        ledger.append_sampled([2], [logprob], 0)


def test_rows_of_a_rollout_carry_its_advantage_and_rows_without_sampled_tokens_are_left_out():
    rows = [ledger_of([([(5, -1.0)], 0)]), ledger_of([[7]]), ledger_of([([(6, -2.0)], 1)])]
    samples = rollout_samples(rows, advantage=-0.5, rollout_id="r", task_id="t")
    assert [s.token_ids for s in samples] == [(1, 5), (1, 6)]
    assert {(s.advantage, s.rollout_id, s.task_id) for s in samples} == {(-0.5, "r", "t")}
    for sample in samples:
        assert sample.advantages == tuple(-0.5 if on else 0.0 for on in sample.trainable) and sample.has_advantage
