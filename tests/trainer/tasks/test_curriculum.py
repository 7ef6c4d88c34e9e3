"""The curriculum in a run: which tasks come, what is remembered over a resume, what a preflight brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task
from graders.types import Grade
from trainer.config import CurriculumConfig, OverlapConfig, RunConfig
from trainer.runs.folder import RunFolder
from trainer.tasks.curriculum import Curriculum, load_preflight
from trainer.tasks.load import tasks_of_step
from trainer.types import Rollout

TASKS = [Task(task_id=f"t{i}", messages=(Message(role="user", content="?"),)) for i in range(6)]
TIED = {"t0", "t1", "t2"}


def make_config(**curriculum: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "grader": {"type": "numeric"},
            "rollout": {"tasks_per_step": 2, "group_size": 4},
            "curriculum": curriculum or None,
        }
    )


def rollouts_of(tasks: list[Task]) -> list[Rollout]:
    """Groups of four; the tied tasks always fail."""
    return [
        Rollout(
            episode=Episode(
                rollout_id=f"{task.task_id}-{k}",
                task_id=task.task_id,
                messages=(),
                turns=(),
                stop_reason=StopReason.ANSWERED,
            ),
            task=task,
            ledgers=(),
            grade=Grade(reward=0.0 if task.task_id in TIED else float(k % 2)),
        )
        for task in tasks
        for k in range(4)
    ]


def open_run(folder: Path) -> RunFolder:
    return RunFolder(folder, run_id="run-1", rank=0)


def test_without_a_curriculum_every_task_comes_in_turn(tmp_path):
    config = make_config()
    curriculum = Curriculum(config, TASKS, open_run(tmp_path), {})
    for step in (1, 2, 3):
        chosen = curriculum.choose(step)
        assert chosen == tasks_of_step(TASKS, seed=0, step=step - 1, num_tasks=2)
        assert curriculum.learn(step, rollouts_of(chosen)) == {}
    assert not (tmp_path / "visits.jsonl").exists()


def test_tasks_that_teach_nothing_come_more_rarely_and_the_share_is_told(tmp_path):
    curriculum = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path), {})
    counts = dict.fromkeys((t.task_id for t in TASKS), 0)
    for step in range(1, 31):
        chosen = curriculum.choose(step)
        metrics = curriculum.learn(step, rollouts_of(chosen))
        for task in chosen:
            counts[task.task_id] += 1
    assert metrics == {"curriculum/tied_share": 0.5}
    assert all(2 <= counts[t] < min(counts[u] for u in counts if u not in TIED) / 2 for t in TIED)


def test_every_process_goes_by_what_the_main_one_reads(tmp_path, monkeypatch):
    """A file that nodes share may be old on another one, which would choose other tasks."""
    for name in ("main", "stale"):
        (tmp_path / name).mkdir()
    whole = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path / "main"), {})
    for step in range(1, 9):
        whole.learn(step, rollouts_of(whole.choose(step)))
    alone = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path / "stale"), {})
    monkeypatch.setattr("trainer.processes.from_main", lambda make: open_run(tmp_path / "main").visits())
    told = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path / "stale"), {})
    assert told.choose(9) == whole.choose(9) != alone.choose(9)


def test_a_resumed_run_goes_on_with_the_same_tasks(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path / "whole"), {})
    visited = []
    for step in range(1, 13):
        chosen = whole.choose(step)
        visited.append(chosen)
        whole.learn(step, rollouts_of(chosen))
        if step == 9:
            # Killed after step 9; the newest checkpoint is that of step 7.
            (tmp_path / "cut").mkdir()
            (tmp_path / "cut/visits.jsonl").write_text((tmp_path / "whole/visits.jsonl").read_text())
            open_run(tmp_path / "cut").rewind(7)
    resumed = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path / "cut"), {})
    for step in range(8, 13):
        assert resumed.choose(step) == visited[step - 1]
        resumed.learn(step, rollouts_of(visited[step - 1]))
    assert (tmp_path / "cut/visits.jsonl").read_text() == (tmp_path / "whole/visits.jsonl").read_text()


def test_a_run_that_asks_ahead_chooses_the_same_tasks_however_much_it_knows_by_then(tmp_path):
    config = make_config(floor=0.25)
    config = config.model_copy(update={"overlap": OverlapConfig(max_staleness=2)})
    whole = Curriculum(config, TASKS, open_run(tmp_path), {})
    visited = {step: whole.choose(step) for step in (1, 2)}
    for step in range(1, 13):
        visited[step + 2] = whole.choose(step + 2)
        whole.learn(step, rollouts_of(visited[step]))
    # Killed after step 9: at the first step that it asks for now all nine have been learned.
    open_run(tmp_path).rewind(9)
    resumed = Curriculum(config, TASKS, open_run(tmp_path), {})
    assert [resumed.choose(step) for step in (10, 11, 12)] == [visited[step] for step in (10, 11, 12)]
    at_once = Curriculum(make_config(floor=0.25), TASKS, open_run(tmp_path), {})
    assert [at_once.choose(step) for step in (10, 11, 12)] != [visited[step] for step in (10, 11, 12)]


def test_what_a_preflight_has_shown_counts_from_the_first_step(tmp_path):
    rows = {
        t.task_id: {"n": 8, "mean": 0.0, "best": 0.0 if t.task_id in TIED else 1.0, "worst": 0.0, "std": 0.0}
        for t in TASKS
    }
    file = tmp_path / "preflight.json"
    file.write_text(json.dumps({"tasks": rows}))
    config = make_config(preflight=str(file))
    curriculum = Curriculum(config, TASKS, open_run(tmp_path), load_preflight(config.curriculum))
    first = {t.task_id for step in (1, 2) for t in curriculum.choose(step)[:1]}
    assert not first & TIED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"tasks": {"t0": {"n": 3}}}', r"tasks\.t0: expected numbers"),
    ],
)
def test_a_preflight_that_cannot_be_read_is_named(tmp_path, text, expected):
    file = tmp_path / "preflight.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"curriculum\.preflight .*preflight\.json: .*{expected}"):
        load_preflight(CurriculumConfig(preflight=file))
