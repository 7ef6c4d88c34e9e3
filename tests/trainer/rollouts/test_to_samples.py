"""From a step's rollouts to samples: advantages by turn reach the turn's tokens, and a KL in the reward its turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from envs.types import Episode, Message, StopReason, Task, Turn
from graders.types import Grade
from trainer.config import EngineConfig, RunConfig
from trainer.learning.advantages.attempts import attempt_of
from trainer.rollouts.collect import to_samples, warn_of_mismatch
from trainer.runs.records import rollout_from_json, rollout_to_json
from trainer.types import NO_TURN, Ledger, Rollout


def rollout(
    number: int, reward: float | None, turns: Sequence[Sequence[int]], *, turn_rewards=None, forked: bool = False
) -> Rollout:
    """Turn k samples `turns[k]`; between turns stands a tool's result, token 9. Forked: each turn is a row."""
    ledgers = [Ledger()]
    ledgers[0].append_context([1, 2])
    for k, tokens in enumerate(turns):
        if k:
            if forked:
                ledgers.append(Ledger())
                ledgers[-1].append_context([1, 2, 3, *turns[k - 1]])
            ledgers[-1].append_context([9])
        ledgers[-1].append_sampled(tokens, [-1.0] * len(tokens), 0, turn=k)
    said = Message(role="assistant", content="x")
    return Rollout(
        episode=Episode(
            rollout_id=f"r{number}",
            task_id="t",
            messages=(said,),
            turns=tuple(Turn(message=said, num_tokens=len(tokens)) for tokens in turns),
            stop_reason=StopReason.ANSWERED,
        ),
        task=Task(task_id="t", messages=(Message(role="user", content="?"),)),
        ledgers=tuple(ledgers),
        grade=None
        if reward is None
        else Grade(reward=reward, parts={"score": reward}, turn_rewards=turn_rewards and tuple(turn_rewards)),
    )


def config(group_size: int, **loss: object) -> RunConfig:
    data = {"output_dir": "x", "grader": {"type": "numeric"}, "rollout": {"group_size": group_size}, "loss": loss}
    return RunConfig.model_validate(data)


@pytest.mark.parametrize("forked", [False, True])
def test_the_advantage_of_a_turn_stands_on_the_tokens_that_it_sampled_and_nowhere_else(forked):
    turns = [[5, 6], [7]]
    group = [
        rollout(0, 1.0, turns, turn_rewards=(1.0, 0.0), forked=forked),
        rollout(1, 1.0, turns, turn_rewards=(0.0, 1.0), forked=forked),
        rollout(2, None, turns),
    ]
    samples, metrics = to_samples(group, config(3, advantage={"type": "turn_discounted", "gamma": 0.0}))
    assert {s.rollout_id for s in samples} == {"r0", "r1"}
    for number, signs in ((0, (1, -1)), (1, (-1, 1))):
        rows = [s for s in samples if s.rollout_id == f"r{number}"]
        assert len(rows) == (2 if forked else 1)
        for sample in rows:
            ledger = group[number].ledgers[sample.row]
            for advantage, turn in zip(sample.advantages, ledger.turns, strict=True):
                assert (advantage > 0) - (advantage < 0) == (0 if turn == NO_TURN else signs[turn])
    # Equal rewards: by episode the group would be tied.
    assert metrics["groups/tied_share"] == 0.0 and metrics["groups/reward_std"] == 0.0
    assert to_samples(group, config(3))[1]["groups/tied_share"] == 1.0


def test_a_kl_in_the_reward_is_taken_off_before_advantages_are_made():
    turns = [[5, 6], [7]]
    group = [rollout(0, 1.0, turns), rollout(1, 1.0, turns), rollout(2, None, turns)]
    asked = []

    def divergences(samples, loss, temperature):
        asked.append((len(samples), temperature))
        return [[0.1, 0.3, 1.0] if s.rollout_id == "r0" else [0.0, 0.0, 0.0] for s in samples]

    in_reward = {"kl_coef": 0.5, "kl": {"place": "reward", "estimator": "k1"}}
    samples, metrics = to_samples(
        group, config(3, advantage="dr_grpo", **in_reward), SimpleNamespace(divergences=divergences)
    )
    assert asked == [(2, 1.0)]
    assert metrics["groups/kl_in_reward"] == pytest.approx(1.4 / 6)
    assert [s.advantage for s in samples] == pytest.approx([-0.35, 0.35])
    # By turn, the second turn pays for its own tokens alone.
    by_turn = config(3, advantage={"type": "turn_discounted", "gamma": 0.0, "weight": 1.0}, **in_reward)
    [first, _] = to_samples(group, by_turn, SimpleNamespace(divergences=divergences))[0]
    assert first.advantages[-1] < first.advantages[2] < 0


def test_gdpo_may_weigh_the_kl_as_a_part_of_the_reward():
    """It is one only when it has been taken off, and which groups are tied is told before."""
    group = [rollout(0, 1.0, [[5]]), rollout(1, 0.0, [[5]]), rollout(2, 1.0, [[5]])]

    def divergences(samples, loss, temperature):
        return [[1.0], [1.0], [0.0]]

    def advantages(weight: float) -> list[float]:
        gdpo = {"type": "gdpo", "weights": {"kl": weight}}
        of = config(3, advantage=gdpo, kl_coef=0.5, kl={"place": "reward", "estimator": "k1"})
        return [s.advantage for s in to_samples(group, of, SimpleNamespace(divergences=divergences))[0]]

    first, _, third = advantages(0.0)
    assert first == third > 0
    first, _, third = advantages(0.5)
    assert 0 < first < third


def test_rollouts_in_the_same_state_are_those_that_were_shown_the_same_tokens():
    same, other = rollout(0, 1.0, [[5], [7]]), rollout(1, 1.0, [[6], [7]])
    states, others = attempt_of(same).states_T, attempt_of(other).states_T
    assert states[0] == others[0] and states[1] != others[1]
    assert attempt_of(rollout(2, 0.0, [[5], [8]])).states_T[1] == states[1]
    assert attempt_of(same).num_tokens_T == (1, 1)


@pytest.mark.parametrize("forked", [False, True])
def test_turns_survive_json_and_older_files_count_a_turn_a_run(forked):
    before = rollout(0, 1.0, [[5, 6], [7], [8]], turn_rewards=(0.5, 0.0, 0.0), forked=forked)
    record = json.loads(json.dumps(rollout_to_json(before)))
    assert [ledger.turns for ledger in rollout_from_json(record).ledgers] == [x.turns for x in before.ledgers]
    assert rollout_from_json(record).grade == before.grade
    for ledger in record["ledgers"]:
        del ledger["turns"]
    del record["grade"]["turn_rewards"]
    again = rollout_from_json(record)
    assert [ledger.turns for ledger in again.ledgers] == [x.turns for x in before.ledgers]
    assert again.grade.turn_rewards is None


def test_turns_that_follow_one_another_without_glue_stay_two():
    ledger = Ledger()
    ledger.append_context([1])
    ledger.append_sampled([2], [-1.0], 3)
    ledger.append_sampled([3], [-1.0], 3)
    assert ledger.turns == (NO_TURN, 0, 1)
    assert Ledger.from_json(ledger.to_json()).turns == ledger.turns


@pytest.mark.parametrize(("share", "is_told"), [(1.0, True), (0.99, False)])
def test_masks_that_leave_no_token_are_told(share: float, is_told: bool) -> None:
    told: list[str] = []
    progress = SimpleNamespace(warn=told.append)
    figures = {"mismatch_abs": 0.0, "mismatch_masked_share": share}
    warn_of_mismatch(figures, SimpleNamespace(engine=EngineConfig()), progress)
    assert ["masks every token of this step" in text for text in told] == [True] * is_told
