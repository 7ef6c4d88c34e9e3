"""The curriculum's rule: laws over random histories, and the figures it is made of."""

import json
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from trainer.tasks.difficulty import (
    Rule,
    Visit,
    choose_tasks,
    pooled,
    preflight_visits,
    stats_of,
    tied_share,
    weight,
    with_visits,
)

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.96, 1.0]), max_size=8)
IDS = st.lists(st.text("abc", min_size=1, max_size=3), unique=True, min_size=1, max_size=12)


@given(REWARDS, REWARDS, REWARDS)
def test_pooled_parts_have_the_statistics_of_all_their_rollouts(a, b, c):
    whole, parts = stats_of([*a, *b, *c]), pooled([stats_of(a), stats_of(b), stats_of(c)])
    assert (parts.n, parts.best, parts.worst) == (whole.n, whole.best, whole.worst)
    assert parts.mean == pytest.approx(whole.mean) and parts.std == pytest.approx(whole.std)
    assert parts.tied == whole.tied


@given(st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=9))
def test_statistics_are_those_of_the_standard_library_and_masked_rollouts_do_not_count(rewards):
    stats = stats_of(rewards)
    present = [r for r in rewards if r is not None]
    assert stats.n == len(present)
    if present:
        expected = (fmean(present), max(present), min(present))
        assert (stats.mean, stats.best, stats.worst) == pytest.approx(expected, abs=1e-12)
    if len(present) > 1:
        assert stats.std == pytest.approx(stdev(present), abs=1e-12)


def test_equal_rewards_whose_mean_rounds_are_tied_without_a_residue():
    stats = stats_of([0.1] * 3)
    assert stats.tied and stats.std == 0 and stats.mean == 0.1
    assert pooled([stats, stats_of([0.1] * 7)]).std == 0


def test_what_only_rounding_tells_apart_is_tied_over_several_visits_too():
    a, b = 0.1 + 0.2, 0.3
    assert a != b
    stats = pooled([stats_of([a, a]), stats_of([b, b])])
    assert stats.tied and stats.std == 0
    assert weight(history([a, a], [b, b]), Rule(floor=0.1)) == 0.1
    noted = preflight_visits({"t": {"n": 4, "mean": b, "best": a, "worst": b, "std": 0}}, where="p")
    assert weight(noted["t"], Rule(floor=0.1)) == 0.1


def history(*groups: list[float]) -> list[Visit]:
    return [Visit(step=i + 1, stats=stats_of(group)) for i, group in enumerate(groups)]


def test_a_task_is_called_tied_only_once_enough_rollouts_are_known():
    rule = Rule(floor=0.2, min_rollouts=4)
    assert weight([], rule) == 1
    assert weight(history([0.0, 0.0, 0.0]), rule) == 1
    assert weight(history([0.0, 0.0], [0.0, 0.0]), rule) == 0.2
    assert weight(history([1.0] * 4), rule) == 0.2
    assert weight(history([1.0, 1.0, 0.96, 1.0]), rule) == 1


def test_old_visits_are_forgotten_as_soon_as_newer_ones_are_enough():
    rule = Rule(min_rollouts=4)
    assert weight(history([0.0, 1.0, 0.0, 1.0], [1.0] * 4), rule) == rule.floor
    assert weight(history([0.0] * 4, [0.0, 1.0, 0.0, 0.0]), rule) == 1
    # Too few new ones: the older visit still counts.
    assert weight(history([0.0, 1.0, 0.0, 1.0], [1.0] * 2), rule) == 1


@given(IDS, st.integers(0, 3), st.integers(1, 5), st.integers(1, 15), st.data())
def test_a_choice_depends_on_its_arguments_alone_and_repeats_no_task_needlessly(ids, seed, step, num_tasks, data):
    visits = {
        task_id: [
            Visit(step=data.draw(st.one_of(st.none(), st.integers(1, 4))), stats=stats_of(data.draw(REWARDS)))
            for _ in range(data.draw(st.integers(0, 3)))
        ]
        for task_id in ids
    }
    rule = Rule()
    chosen = choose_tasks(ids, visits, seed=seed, step=step, num_tasks=num_tasks, rule=rule)
    assert len(chosen) == num_tasks and set(chosen) <= set(ids)
    counts = [chosen.count(task_id) for task_id in ids]
    assert max(counts) - min(counts) <= 1
    # What was written after the step, and the order of the tasks in the data set, change nothing.
    later = {t: [*known, Visit(step=step, stats=stats_of([0.0, 1.0]))] for t, known in visits.items()}
    again = choose_tasks(ids[::-1], later, seed=seed, step=step, num_tasks=num_tasks, rule=rule)
    assert again == chosen


def simulate(ids: list[str], rewards: dict[str, list[float]], *, steps: int, num_tasks: int, rule: Rule, seed: int = 0):
    """The tasks of each step, where a task's group always shows the same rewards."""
    visits: dict[str, list[Visit]] = {}
    for step in range(1, steps + 1):
        chosen = choose_tasks(ids, visits, seed=seed, step=step, num_tasks=num_tasks, rule=rule)
        visits = with_visits(visits, step=step, rewards={t: rewards[t] for t in chosen})
        yield chosen


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_without_tied_tasks_each_is_visited_once_before_any_is_visited_twice(num_ids, num_tasks, seed):
    ids = [f"t{i}" for i in range(num_ids)]
    rewards = {t: [0.0, 1.0, 1.0, 0.0] for t in ids}
    visited: list[str] = []
    for chosen in simulate(ids, rewards, steps=12, num_tasks=num_tasks, rule=Rule(), seed=seed):
        visited += chosen
    for start in range(0, len(visited), num_ids) if num_ids % num_tasks == 0 else [0]:
        whole = visited[start : start + num_ids]
        assert len(set(whole)) == len(whole)


def test_tied_tasks_come_back_at_the_floor_and_are_never_dropped():
    ids = [f"t{i}" for i in range(40)]
    rewards = {t: ([0.0] * 4 if i < 20 else [0.0, 1.0, 0.0, 1.0]) for i, t in enumerate(ids)}
    counts = dict.fromkeys(ids, 0)
    for chosen in simulate(ids, rewards, steps=400, num_tasks=4, rule=Rule(floor=0.1)):
        for task_id in chosen:
            counts[task_id] += 1
    tied, varied = [counts[t] for t in ids[:20]], [counts[t] for t in ids[20:]]
    assert min(tied) >= 5
    assert fmean(tied) / fmean(varied) == pytest.approx(0.1, rel=0.25)
    assert max(varied) - min(varied) <= 2


def test_a_task_that_begins_to_vary_is_back_at_full_weight():
    ids = [f"t{i}" for i in range(10)]
    visits = with_visits({}, step=1, rewards={t: [0.0] * 4 for t in ids})
    visits = with_visits(visits, step=2, rewards={"t3": [0.0, 0.0, 1.0, 0.0]})
    assert tied_share(ids, visits, Rule()) == 0.9
    assert choose_tasks(ids, visits, seed=0, step=3, num_tasks=1, rule=Rule()) == ["t3"]


def test_a_group_lost_to_the_world_is_a_visit_that_says_nothing():
    visits = with_visits({}, step=1, rewards={"a": [None, None]})
    assert visits["a"][0].stats.n == 0 and weight(visits["a"], Rule()) == 1
    assert choose_tasks(["a", "b"], visits, seed=0, step=2, num_tasks=1, rule=Rule()) == ["b"]


def test_the_preflight_decides_the_first_steps_and_its_json_is_read_back():
    stats = {"easy": stats_of([1.0] * 8), "mixed": stats_of([0.0, 1.0] * 4), "hard": stats_of([0.0] * 8)}
    text = json.dumps({task_id: s.to_json() for task_id, s in stats.items()})
    visits = preflight_visits(json.loads(text), where="preflight.json")
    assert {t: v[0].stats for t, v in visits.items()} == stats
    for seed in range(5):
        chosen = choose_tasks(["easy", "hard", "mixed", "new"], visits, seed=seed, step=1, num_tasks=2, rule=Rule())
        assert set(chosen) == {"mixed", "new"}


@pytest.mark.parametrize(
    "tasks", [None, [], {"a": 1}, {"a": {"n": 1}}, {"a": stats_of([1.0]).to_json() | {"std": "x"}}]
)
def test_a_damaged_preflight_file_is_named_with_what_was_expected(tasks):
    with pytest.raises(UserError, match=r"^p\.json: tasks.*expected"):
        preflight_visits(tasks, where="p.json")
