"""The run folder: what belongs to a run, what survives a kill, and rollouts read back exactly."""

import asyncio
import contextlib
import copy
import itertools
import json
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.reading.json_text import read_strict_json
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.hosted.view import item_of
from graders.types import Grade, GraderErrorKind
from trainer import processes
from trainer.config import RunConfig
from trainer.rollouts.stream import RolloutStream
from trainer.runs.about import files_named
from trainer.runs.canary_record import CANARY, of_base, of_policy, read_canary
from trainer.runs.files import append_line, read_lines
from trainer.runs.folder import RunFolder
from trainer.runs.lock import RunLock
from trainer.runs.manifest import adapter_of
from trainer.runs.progress import Progress
from trainer.runs.records import rollout_from_json, rollout_to_json
from trainer.types import Kind, Ledger, Phase, Rollout, RolloutRequest

TEXT = st.text(max_size=12)
FLOATS = st.floats(-50, 0)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    ledger = Ledger()
    ledger.append_context(draw(st.lists(st.integers(0, 50_000), min_size=1, max_size=5)))
    for version in draw(st.lists(st.integers(0, 5), max_size=3)):
        logprobs = draw(st.lists(FLOATS, max_size=5))
        ledger.append_sampled(list(range(len(logprobs))), logprobs, version)
        ledger.append_context(draw(st.lists(st.integers(0, 50_000), max_size=4)))
    return ledger


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    call = ToolCall(call_id="c0", name=draw(TEXT), arguments=draw(TEXT))
    message = Message(role="assistant", content=draw(TEXT), reasoning=draw(TEXT), tool_calls=(call,))
    error = draw(st.none() | st.sampled_from(ToolErrorKind))
    result = ToolResult(call_id="c0", name=call.name, output=draw(TEXT), error=error, latency_s=draw(st.floats(0, 9)))
    turn = Turn(message=message, results=(result,), malformed=draw(st.booleans()), num_tokens=3, generation_s=0.1)
    question = Message(role="user", content=draw(TEXT))
    tools = draw(st.none() | st.lists(TEXT, max_size=2).map(tuple))
    item = draw(
        st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(st.integers(), max_size=2), max_size=3)
    )
    task = Task(task_id=draw(TEXT), messages=(question,), tools=tools, item=item)
    episode = Episode(
        rollout_id=draw(TEXT),
        task_id=task.task_id,
        messages=(question, message),
        turns=(turn,) * draw(st.integers(0, 2)),
        stop_reason=draw(st.sampled_from(StopReason)),
        error=draw(TEXT),
        latency_s=draw(st.floats(0, 1e4)),
    )
    grade, watch = (
        Grade(
            reward=draw(FLOATS),
            parts={"exact": draw(FLOATS)},
            explanation=draw(TEXT),
            passed=draw(st.none() | st.booleans()),
            scores={"a": draw(FLOATS)},
            errors=tuple(draw(st.lists(st.sampled_from(GraderErrorKind), max_size=2))),
            judge_tokens={draw(TEXT): 3},
        )
        for _ in range(2)
    )
    return Rollout(
        episode=episode,
        task=task,
        ledgers=tuple(draw(st.lists(ledgers(), max_size=2))),
        grade=draw(st.none() | st.just(grade)),
        watch=draw(st.none() | st.just(watch)),
        num_drifted_turns=draw(st.integers(0, 3)),
        num_attempts=draw(st.integers(1, 3)),
    )


def make_rollout(rollout_id: str) -> Rollout:
    question = Message(role="user", content="?")
    episode = Episode(
        rollout_id=rollout_id, task_id="t", messages=(question,), turns=(), stop_reason=StopReason.MAX_EPISODE_TOKENS
    )
    return Rollout(episode=episode, task=Task(task_id="t", messages=(question,)), ledgers=(), grade=Grade(reward=0.0))


def make_config(folder: Path, **more: Any) -> RunConfig:
    return RunConfig.model_validate({"output_dir": folder, "grader": {"type": "numeric"}} | more)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run")


@pytest.fixture
def run(config: RunConfig) -> RunFolder:
    RunFolder.create(config)
    return RunFolder.open(config, rank=0)


# --- rollouts


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(rollout=rollouts())
def test_a_rollout_written_and_read_is_the_same_to_the_last_bit(rollout):
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(rollout)))) == rollout


def test_a_row_that_is_its_tasks_item_is_stored_once_and_graders_find_it_whole_again():
    rollout = make_rollout("r")
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    row = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "answer": "1", "parallel_tool_calls": True}
    rollout = replace(rollout, task=replace(rollout.task, tools=("f",), definitions={"f": tool}, item=row))
    stored = json.loads(json.dumps(rollout_to_json(rollout)))
    assert stored["task"]["item"] == {"answer": "1", "parallel_tool_calls": True}
    assert item_of(rollout_from_json(stored).task) == row


def test_finished_rollouts_go_by_the_first_attempts_id_and_a_torn_line_is_cut_off(run):
    path = run.rollouts_file(Kind.TRAIN, 1)
    for name in ("run-step1-0-a-0", "run-step1-0-a-1-retry2", "run-step1-0-x-retry1-2"):
        append_line(path, rollout_to_json(make_rollout(name)))
    with path.open("a") as file:
        file.write('{"episode": {"rollout')
    assert list(run.finished_rollouts(Kind.TRAIN, 1)) == [
        "run-step1-0-a-0",
        "run-step1-0-a-1",
        "run-step1-0-x-retry1-2",
    ]
    append_line(path, rollout_to_json(make_rollout("run-step1-0-a-3")))
    assert len(read_lines(path)) == 4


class NoWorker:
    """For a step of which everything has been rolled out."""

    async def run(self, requests: list[RolloutRequest], **how: object) -> list[Rollout]:
        assert requests == []
        return []


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_what_two_processes_rolled_out_is_not_rolled_out_again_by_another_number(config, run, num_processes):
    task = Task(task_id="t", messages=(Message(role="user", content="?"),))
    requests = [RolloutRequest(task=task, rollout_id=f"r{i}", seed=i) for i in range(6)]
    for i, request in enumerate(requests):
        path = RunFolder.open(config, rank=i % 2).rollouts_file(Kind.TRAIN, 1)
        append_line(path, rollout_to_json(make_rollout(request.rollout_id)))
    before = {p.name: p.read_text() for p in (run.path / "rollouts").iterdir()}
    with path.open("a") as file:
        file.write('{"episode": ')
    for rank in range(num_processes):
        with asyncio.Runner() as loop:
            stream = RolloutStream(
                RunFolder.open(config, rank=rank),
                NoWorker(),
                SimpleNamespace(process_index=rank, num_processes=num_processes),
                Progress(None, 0, show=False),
                loop,
            )
            # Only this process's share comes back: there is no other to gather from.
            with contextlib.suppress(KeyError):
                stream.submit(Kind.TRAIN, 1, requests, temperature=1.0)
                stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
    after = {p.name: p.read_text() for p in (run.path / "rollouts").iterdir() if p.stat().st_size}
    assert after == before | ({} if num_processes > 1 else {path.name: before[path.name] + '{"episode": '})


def test_a_step_not_begun_has_no_finished_rollouts(run):
    assert run.finished_rollouts(Kind.TRAIN, 9) == {}


def test_each_process_writes_a_file_of_its_own(config, run):
    other = RunFolder.open(config, rank=1)
    assert other.run_id == run.run_id and run.is_main and not other.is_main
    assert other.rollouts_file(Kind.TRAIN, 1).name == "step-000001.rank1.jsonl"
    other.log({"step": 1})
    assert run.metrics() == []


# --- whose folder it is


def test_a_new_folder_an_empty_one_and_the_runs_own_are_taken(config):
    RunFolder.check(config)
    config.output_dir.mkdir()
    RunFolder.check(config)
    RunFolder.create(config)
    run_id = RunFolder.open(config, rank=0).run_id
    RunFolder.create(config)
    assert RunFolder.open(config, rank=0).run_id == run_id


def test_a_run_may_be_made_longer(config, run):
    RunFolder.create(make_config(config.output_dir, optim={"num_steps": 500}))


def test_a_run_that_is_past_the_steps_asked_for_is_refused(config, run):
    (run.path / "checkpoints" / f"step-{config.optim.num_steps + 1:06d}").mkdir()
    with pytest.raises(UserError, match=r"past optim\.num_steps"):
        RunFolder.check(config)


def test_the_folder_of_another_run_is_refused_and_the_difference_named(config, run):
    other = make_config(config.output_dir, optim={"learning_rate": 1e-5}, seed=3)
    with pytest.raises(UserError, match=r"holds a run with another config; it differs in seed, optim\.learning_rate"):
        RunFolder.check(other)


NAMED = {
    "loss": {"type": "custom", "target": "{}/loss.py:f", "kwargs": {"target": "os:path"}},
    "grader": {"type": "custom", "targets": [{"target": "{}/grader.py:f"}, "{}/other.py:g"]},
    "world": {"type": "custom", "target": "{}/world.py:World"},
    "data": {"train": "{}/train.jsonl", "eval": {"dataset": "some/where"}},
    "model": {"chat_template": "{}/mine.jinja"},
}


@pytest.mark.parametrize("file", ["loss.py", "grader.py", "other.py", "world.py", "train.jsonl", "mine.jinja"])
def test_a_file_that_the_config_names_is_as_much_of_a_run_as_the_config(tmp_path, file):
    for name in ("loss.py", "grader.py", "other.py", "world.py", "train.jsonl", "mine.jinja"):
        (tmp_path / name).write_text("1")
    raw = json.loads(json.dumps(NAMED).replace("{}", str(tmp_path)))
    named = make_config(tmp_path / "run", **raw)
    RunFolder.create(named)
    (tmp_path / file).write_text("2")
    RunFolder.create(named)  # nothing has been made of it yet
    (named.output_dir / "checkpoints" / "step-000000").mkdir()
    RunFolder.check(named)
    (tmp_path / file).write_text("3")
    with pytest.raises(UserError, match=rf"made with other contents of {tmp_path / file}\. .* delete \"files\" from"):
        RunFolder.check(named)
    path = named.output_dir / "run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "files"}))
    RunFolder.create(named)
    RunFolder.check(named)
    (tmp_path / file).unlink()  # what needs it will say so
    RunFolder.check(named)


def test_the_file_of_a_target_in_a_package_is_known_too(config):
    named = make_config(config.output_dir, grader={"type": "custom", "target": "graders.custom:EnvReward"})
    assert list(files_named(named)) == ["graders.custom"] and files_named(config) == {}


def test_a_key_that_an_older_version_did_not_know_stands_for_its_default_wherever_it_is(config, run):
    path = config.output_dir / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    without = copy.deepcopy(saved)
    del without["rollout"]["temperature"], without["checkpoint"], without["model"]["lora"]["alpha"]
    path.write_text(yaml.safe_dump(without))
    RunFolder.check(config)
    changed = make_config(config.output_dir, rollout={"temperature": 0.5}, checkpoint={"keep": 7})
    with pytest.raises(UserError, match=r"it differs in rollout\.temperature, checkpoint\."):
        RunFolder.check(changed)
    path.write_text(yaml.safe_dump(saved | {"gone": 1}))
    with pytest.raises(UserError, match="it differs in gone"):
        RunFolder.check(config)


ALIASES = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    "text", ["", "a: [", "{" * 5000, "? [1]: 2\n: {}", "a: 2024-13-45", "- 1", "a: !!python/name:os.system", ALIASES]
)
def test_a_config_that_cannot_be_read_is_named(config, run, text):
    (config.output_dir / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml|holds a run with another config"):
        RunFolder.check(config)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "[" * 100_000, "{}", '{"run_id": 1}', '{"run_id": "a\\u001b[2J"}', "1" * 5000]
)
def test_a_record_of_the_run_that_cannot_be_read_is_named_and_made_anew_once_it_is_deleted(config, run, text):
    (config.output_dir / "run.json").write_text(text)
    (config.output_dir / "checkpoints" / "step-000001").mkdir()
    for look in (lambda: RunFolder.open(config, rank=0), lambda: RunFolder.check(config)):
        with pytest.raises(
            UserError, match=r"run\.json: is damaged: .*; delete it, and the same command makes it anew"
        ):
            look()
    (config.output_dir / "run.json").unlink()
    RunFolder.create(config)
    RunFolder.open(config, rank=0)


def test_what_is_read_has_a_bound_however_large_the_file_is(config, run):
    for name in ("config.yaml", "run.json"):
        path = config.output_dir / name
        kept = path.read_bytes()
        os.truncate(path, 2**40)  # without a byte on the disk
        with pytest.raises(UserError, match=rf"{name}: holds more than 64 MiB"):
            RunFolder.is_finished(config)
        path.write_bytes(kept)
    endless = run.rollouts_file(Kind.TRAIN, 1)
    append_line(endless, rollout_to_json(make_rollout("r")))
    os.truncate(endless, 2**40)
    assert list(run.finished_rollouts(Kind.TRAIN, 1)) == ["r"] and endless.stat().st_size < 10_000


def test_foreign_files_and_a_file_in_its_place_are_refused(config):
    config.output_dir.write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        RunFolder.check(config)
    config.output_dir.unlink()
    config.output_dir.mkdir()
    (config.output_dir / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder.check(config)


def test_checking_writes_nothing(config):
    RunFolder.check(config)
    assert not config.output_dir.exists()


@pytest.mark.parametrize("there", ["nothing", "another folder"])
def test_a_process_that_finds_another_folder_than_the_main_one_names_its_machine(config, monkeypatch, there):
    # As on a node whose disk is its own.
    if there == "another folder":
        RunFolder.create(config)
    monkeypatch.setattr(processes, "from_main", lambda make: "run-of-the-main-process")
    own = f"is not the main process's folder on {platform.node()}; choose one on a file system that all nodes share"
    with pytest.raises(UserError, match=own), RunFolder.held(config, rank=1):
        pass
    assert config.output_dir.exists() == (there == "another folder")


def test_texts_are_left_beside_the_config_by_the_run_that_holds_the_folder(config):
    with RunFolder.held(config, rank=0, beside={"job.yaml": "a: 1"}) as run:
        assert (run.path / "job.yaml").read_text() == "a: 1" and run.is_main
        assert run.run_id == RunFolder.open(config, rank=0).run_id


def test_a_folder_in_which_a_run_was_killed_at_once_is_taken(config):
    with RunLock(config.output_dir):
        pass
    RunFolder.create(config)


# --- resuming


def test_the_newest_checkpoint_counts_and_unfinished_ones_are_cleared(config, run):
    assert run.last_checkpoint() is None and run.resume_step == 0
    for name in ("step-000002", "step-000010", ".unfinished-step-000011"):
        (run.path / "checkpoints" / name).mkdir()
    assert run.last_checkpoint() == (10, run.path / "checkpoints" / "step-000010") and run.resume_step == 10
    RunFolder.create(config)
    assert not (run.path / "checkpoints" / ".unfinished-step-000011").exists()


def test_rewinding_forgets_what_came_after_the_checkpoint_but_the_rollouts_in_flight(run):
    for step in range(5):
        run.log({"step": step})
        for kind in Kind:
            append_line(run.rollouts_file(kind, step), {"step": step})
    append_line(run.path / "rollouts" / "step-000004.rank1.jsonl", {})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "re')
    run.rewind(2)
    assert not (run.path / "visits.jsonl").exists(), "this run has no curriculum"
    assert run.metrics() == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert sorted(p.name[5:11] for p in (run.path / "rollouts").iterdir()) == ["000000", "000001", "000002", "000003"]
    assert sorted(p.name[5:11] for p in (run.path / "evals").iterdir()) == ["000000", "000001", "000002"]
    run.log({"step": 3})
    assert run.metrics()[-1] == {"step": 3}


def test_what_is_said_of_the_canary_stays_readable_after_a_kill_in_the_midst_of_a_line(run):
    run.rewind(0)
    assert not (run.path / CANARY).exists()
    for step in (0, 1):
        run.keep_canary(of_base([[1, 2, 3]], [-1.0, -2.0]), tolerance=1.0)
        run.keep_canary(of_policy(step, [-3.0, -4.0]), tolerance=1.0)
    path = run.path / CANARY
    path.write_bytes(path.read_bytes()[:-9])
    run.rewind(0)
    run.keep_canary(of_base([[1, 2, 3]], [-1.0, -2.0]), tolerance=1.0)
    run.keep_canary(of_policy(1, [-5.0, -6.0]), tolerance=1.0)
    assert read_canary(run.path, 1).policies == {0: [-3.0, -4.0], 1: [-5.0, -6.0]}


def test_no_file_of_a_run_holds_a_nan_which_is_no_json(run):
    odd = {"a": math.nan, "b": [math.inf, {"c": (-math.inf, 1.5)}], "d": 2}
    run.log({"step": 1, **odd})
    run.note(odd=odd)
    rollout = make_rollout("r")
    run.keep_rollout(Kind.TRAIN, 1, replace(rollout, task=replace(rollout.task, item=odd)))
    for path in (run.path / "metrics.jsonl", run.path / "run.json", run.rollouts_file(Kind.TRAIN, 1)):
        read_strict_json(path.read_text())
    assert run.metrics() == [{"step": 1, "a": None, "b": [None, {"c": [None, 1.5]}], "d": 2}]


def test_notes_are_added_to_what_is_known_of_the_run(config, run):
    run.note(adapter="a")
    run.note(serve_command="b")
    about = json.loads((run.path / "run.json").read_text())
    assert about["adapter"] == "a" and about["serve_command"] == "b" and about["run_id"] == run.run_id
    assert {"python", "torch", "transformers"} <= about["versions"].keys()


def test_rollouts_that_a_kill_left_open_are_known_of_all_processes(tmp_path):
    ranks = [RunFolder(tmp_path, run_id="run-1", rank=rank) for rank in (0, 1)]
    for run in ranks:
        run.opened(f"done-{run.is_main}")
        run.opened(f"open-{run.is_main}")
        run.closed(f"done-{run.is_main}")
    with (tmp_path / "live.rank1.jsonl").open("a") as file:
        file.write('{"closed": "open-Fal')  # cut off by the kill
    assert ranks[0].left_open() == ["open-True", "open-False"]
    ranks[0].forget_left_open()
    assert ranks[0].left_open() == []


def test_the_newest_adapter_of_a_run_is_found_before_and_after_its_end(tmp_path):
    with pytest.raises(UserError, match="neither a final adapter nor a checkpoint"):
        adapter_of(tmp_path)
    for name in ("checkpoints/step-000001/adapter", "checkpoints/step-000010/adapter", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_model.safetensors").touch()
        assert adapter_of(tmp_path) == tmp_path / name
