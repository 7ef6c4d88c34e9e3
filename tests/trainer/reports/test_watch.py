"""A run as it is seen while it works: whatever state its folder is in, and nothing in it is touched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from envs.errors import UserError
from envs.types import StopReason, ToolErrorKind
from graders.types import GraderErrorKind
from tests.support import ROOT
from tests.support.run_server import SMALL, Server, write_config
from tests.support.terminal import installed, terminal
from tests.support.written_runs import make_rollout, write_run
from tests.trainer.runs.test_run_lock import Holder
from trainer.reports.watch.screen import screen
from trainer.reports.watch.snapshot import RunWatch, Snapshot, State
from trainer.runs.files import append_line
from trainer.runs.lock import LOCK_NAME, RunLock
from trainer.runs.records import rollout_to_json

CONFIG = """model: {name: some/model}
rollout: {tasks_per_step: 2, group_size: 2}
eval: {num_tasks: 2, samples_per_task: 1}
optim: {num_steps: 3}
"""
SCRIPT = str(ROOT / "scripts" / "watch.py")
in_a_terminal = pytest.mark.skipif(not installed(), reason="tmux is not installed")


def young_run(folder: Path) -> Path:
    """A run that is in its second step."""
    evaluated = [make_rollout("e0", reward=0.25), make_rollout("e1", reward=0.75)]
    first = [make_rollout(f"a{i}", reward=i / 3) for i in range(4)]
    second = [make_rollout("b0", reward=0.9, error=ToolErrorKind.TIMEOUT), make_rollout("b1", malformed=True)]
    rollouts = {
        "evals/step-000000.jsonl": evaluated,
        "rollouts/step-000001.jsonl": first,
        "rollouts/step-000002.jsonl": second,
    }
    write_run(folder, rollouts, advantage=None)
    (folder / "config.yaml").write_text(CONFIG)
    rows = [
        {"step": 0, "eval/rollouts": 2, "eval/reward": 0.5},
        {"step": 1, "train/reward": 0.5, "train/tool_calls": 1.0, "groups/tied_share": 0.5}
        | {"time/step_s": 12.0, "time/rollouts_s": 9.0, "time/training_s": 2.5, "staleness/mean": 0.75}
        | {"staleness/max": 2, "time/waiting_for_rollouts_s": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.log").write_text(
        "a library says\n[10:00:00 progress] phase: rollouts\n[10:00:01 progress] warning: look out\n"
    )
    return folder


def look(folder: Path) -> Snapshot:
    return RunWatch(folder).look()


def text_of(snapshot: Snapshot, *, width: int = 100, height: int = 50) -> str:
    return "\n".join(line.plain for line in screen(snapshot, width=width, height=height))


def printed(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
    )


def test_a_run_at_work_shows_its_phase_rewards_with_intervals_errors_times_and_transcripts(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    holder = Holder(folder)
    try:
        shown = text_of(look(folder))
    finally:
        holder.kill()
    assert "run · at work · step 1 of 3 · some/model" in shown
    assert "at rollouts since 10:00:00 · left about 24 s" in shown and "2/4 rollouts" in shown
    assert re.search(r"^reward +0\.500 +0\.500 +0\.950 *$", shown, re.M)
    assert re.search(r"^  95 % interval +0\.25–0\.75 +0\.17–0\.83 +0\.90–1\.00 *$", shown, re.M)
    assert "12 s: rollouts 9.0 s, training 2.5 s" in shown
    assert "0.75 updates, at most 2, trainer waited 1.5 s" in shown
    assert "tool: timeout 1" in shown and "malformed call 1" in shown
    assert "50% of step 1" in shown and "10:00:01 look out" in shown
    assert 'calls  search(query="revenue")' in shown and "gives  Revenue 42" in shown and "says  42" in shown


def test_what_a_step_lost_to_the_world_is_told_apart_from_what_the_model_did_wrong(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    lost = make_rollout("b2", reward=None, stop=StopReason.WORLD_FAULT)
    append_line(folder / "rollouts" / "step-000002.jsonl", rollout_to_json(lost))
    shown = text_of(look(folder))
    assert "no grade         1 × world: no cause given" in shown
    assert "ended by world_fault" not in shown
    judged = make_rollout("b3")
    assert judged.grade is not None
    of_grader = replace(judged, grade=replace(judged.grade, errors=(GraderErrorKind.PYTHON_GRADER_RUNTIME,)))
    append_line(folder / "rollouts" / "step-000002.jsonl", rollout_to_json(of_grader))
    shown = text_of(look(folder))
    assert "model's errors   tool: timeout 1, malformed call 1\n" in shown
    assert "grader's errors  python_grader_runtime 1" in shown


def test_an_evaluation_under_way_takes_no_other_ones_place(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    evaluated = [make_rollout(f"e{i}", reward=i / 4) for i in range(4)]
    write_run(folder, {"evals/step-000001.jsonl": evaluated}, advantage=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "eval/rollouts": 4, "eval/reward": 0.375}) + "\n")
        file.write(json.dumps({"step": 2, "train/reward": 0.9}) + "\n")
    (folder / "run.log").write_text("[10:00:00 progress] phase: evaluating\n")
    assert "evaluation after" not in text_of(look(folder)), "it has begun, and none of its rollouts is there"
    write_run(folder, {"evals/step-000002.jsonl": evaluated[:1]}, advantage=None)
    shown = text_of(look(folder))
    assert "evaluation after step 2" in shown and " 1/4 rollouts" in shown
    intervals = next(line for line in shown.splitlines() if "95 % interval" in line)
    assert len(re.findall(r"\d–\d", intervals)) == 4, "of two evaluations and two steps"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (20, 3), (1, 1), (200, 60)])
def test_no_line_is_wider_and_no_screen_is_higher_than_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    folder = young_run(tmp_path / "run")
    wide = make_rollout("漢字" * 60, output="漢字 👩‍👩‍👧 é\n" * 500)
    append_line(folder / "rollouts" / "step-000002.jsonl", rollout_to_json(wide))
    lines = screen(look(folder), width=width, height=height)
    assert 0 < len(lines) <= height and all(cell_len(line.plain) <= width for line in lines)
    assert all("\n" not in line.plain for line in lines)


def test_the_states_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text(CONFIG)
    assert look(begun).state is State.NOT_BEGUN and "nothing is written yet" in text_of(look(begun))
    folder = young_run(tmp_path / "run")
    assert look(folder).state is State.INTERRUPTED and "was at rollouts" in text_of(look(folder))
    (folder / LOCK_NAME).symlink_to(folder / "run.json")
    assert look(folder).state is State.UNKNOWN
    (folder / LOCK_NAME).unlink()
    (folder / LOCK_NAME).write_text('{"pid": 7, "host": "another machine"}')
    assert look(folder).state is State.UNKNOWN, "a copy of a run that may be at work there"
    (folder / LOCK_NAME).write_text("torn")
    assert look(folder).state is State.UNKNOWN
    (folder / LOCK_NAME).unlink()
    (folder / "run.json").write_text(json.dumps({"run_id": "run-1", "finished_steps": 3}))
    assert look(folder).state is State.FINISHED


def test_a_run_that_is_being_written_is_read_as_far_as_its_lines_are_whole(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    path = folder / "rollouts" / "step-000002.jsonl"
    watch = RunWatch(folder)
    whole = json.dumps(rollout_to_json(make_rollout("b2", reward=0.0)))
    with path.open("a") as file:
        file.write(whole[:200])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/rew')
    torn = watch.look()
    assert torn.train[2].num_done == 2 and not torn.notes and torn.last_step == 1
    with path.open("a") as file:
        file.write(whole[200:] + "\n" + "no JSON\n")
    after = watch.look()
    assert after.train[2].num_done == 3 and after.episodes[0].episode.rollout_id == "b2"
    assert after.notes == ["rollouts/step-000002: 1 lines are no rollouts"]


def test_a_step_that_a_resumed_run_does_anew_is_counted_anew(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    path = folder / "rollouts" / "step-000002.jsonl"
    watch = RunWatch(folder)
    assert watch.look().train[2].num_done == 2
    path.unlink()
    assert 2 not in watch.look().train
    append_line(path, rollout_to_json(make_rollout("c0", reward=0.1)))
    again = watch.look().train[2]
    assert again.num_done == 1 and again.means()["reward"] == pytest.approx(0.1)
    path.with_name("new").write_text(json.dumps(rollout_to_json(make_rollout("d0", reward=0.2))) + "\n")
    path.with_name("new").replace(path)
    assert watch.look().train[2].means()["reward"] == pytest.approx(0.2)


def test_rollouts_of_all_processes_and_of_steps_ahead_count(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    append_line(folder / "rollouts" / "step-000002.rank1.jsonl", rollout_to_json(make_rollout("b9")))
    append_line(folder / "rollouts" / "step-000003.jsonl", rollout_to_json(make_rollout("c0")))
    shown = text_of(look(folder))
    assert "3/4 rollouts, ahead: 1 of step 3" in shown


def test_nothing_of_the_folder_is_written_and_its_lock_stays_free(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    with RunLock(folder):
        pass
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        done = printed("--once", str(folder))
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
    assert done.returncode == 0, done.stderr
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    assert after == before
    holder = Holder(folder)
    assert look(folder).state is State.AT_WORK
    holder.release()
    again = Holder(folder)
    again.kill()
    holder.kill()


def test_without_a_terminal_one_picture_is_printed_without_colour(tmp_path: Path) -> None:
    done = printed(str(young_run(tmp_path / "run")), environment={"COLUMNS": "80"})
    assert done.returncode == 0 and "interrupted · step 1 of 3" in done.stdout and "\x1b" not in done.stdout
    assert all(cell_len(line) <= 80 for line in done.stdout.splitlines())
    ascii_only = printed("--once", str(tmp_path / "run"), environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ascii_only.returncode == 0 and ascii_only.stdout.isascii() and "reward" in ascii_only.stdout


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.write_text("a file"), "is a file; expected the folder of a run"),
        (lambda path: path.mkdir(), "holds no config.yaml or run.json or run.lock; expected the folder of a run"),
    ],
)
def test_what_is_no_run_is_one_clear_line(tmp_path: Path, make, said: str) -> None:
    make(tmp_path / "run")
    done = printed("--once", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_goes_away_while_it_is_watched_is_told(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    watch = RunWatch(folder)
    watch.look()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        watch.look()


def test_links_pipes_and_folders_in_a_files_place_hold_nobody_up(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    os.mkfifo(folder / "rollouts" / "step-000003.jsonl")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/zero")
    (folder / "run.log").unlink()
    (folder / "run.log").mkdir()
    shown = text_of(look(folder))
    assert "metrics.jsonl: is a link" in shown and "rollouts/step-000003.jsonl" in shown


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202edesrever\x00 end"


@in_a_terminal
def test_nothing_that_stands_in_the_folder_acts_on_the_terminal(tmp_path: Path) -> None:
    folder = young_run(tmp_path / f"run{HOSTILE.replace(chr(0), '')}")
    append_line(folder / "rollouts" / "step-000002.jsonl", rollout_to_json(make_rollout("b2", output=HOSTILE)))
    (folder / "config.yaml").write_text(CONFIG.replace("some/model", json.dumps(HOSTILE)))
    with (folder / "run.log").open("a") as log:
        log.write(f"[10:00:02 progress] phase: {HOSTILE}\n[10:00:03 progress] warning: {HOSTILE}\n")
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"step": 1, f"memory/{HOSTILE}_gib": 1.0, f"x/{HOSTILE}": "?"}) + "\n")
    shown = text_of(look(folder))
    assert not {*"\x1b\x07\x9b\x00\u202e"} & {*shown} and "desrever" in shown
    (tmp_path / "link").symlink_to(folder)
    with terminal([sys.executable, SCRIPT, str(tmp_path / "link")], width=120, height=40) as window:
        seen = window.wait(lambda text: "desrever" in text and "last written" in text)
        title = window.tmux("display-message", "-p", "-t", "main", "#{pane_title}").strip()
        assert "gives" in seen and title != "owned"


@in_a_terminal
def test_a_real_run_is_followed_on_a_terminal_that_changes_its_size_until_it_has_finished(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_model, 4, **SMALL)
    server.start(config)
    while not (tmp_path / "run" / "run.json").exists():
        pass
    watched = [sys.executable, SCRIPT, "--every", "0.2", str(tmp_path / "run")]
    with terminal(watched, environment={"NO_COLOR": "1"}) as window:
        window.wait(lambda text: "run · " in text)
        window.resize(50, 12)
        assert server.wait() == 0
        window.resize(100, 30)
        end = window.wait(lambda text: "ended: 0" in text)
    assert "run · finished · step 4 of 4" in end and "reward" in end


@in_a_terminal
def test_ctrl_c_ends_the_view_and_gives_the_terminal_back(tmp_path: Path) -> None:
    folder = young_run(tmp_path / "run")
    with terminal([sys.executable, SCRIPT, str(folder)]) as window:
        window.wait(lambda text: "run · interrupted" in text)
        window.keys("C-c")
        end = window.wait(lambda text: "ended: 130" in text)
        assert "interrupted\nended: 130" in end and "run · interrupted" not in end
        assert window.tmux("display-message", "-p", "-t", "main", "#{cursor_flag}#{alternate_on}").strip() == "10"
