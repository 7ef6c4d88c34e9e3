"""Whatever became of a run folder's files, the run ends with the same adapter and metrics or says what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.run_server import SMALL, Server, num_rollouts, result, write_config
from trainer.runs.files import append_text

NUM_STEPS = 3
NOBODY = 65534


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run's folder, and copies of it at two moments."""

    folder: Path
    config: Path
    killed: Path
    """In its third step: checkpoints 0 and 2 are there, and a part of the step's rollouts."""
    finished: Path

    def restore(self, state: str) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(getattr(self, state), self.folder)
        return self.folder

    @property
    def outside(self) -> Path:
        """Where links lead."""
        return self.folder.with_name("outside")


@pytest.fixture(scope="module")
def ran(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    config = write_config(folder, tiny_model, NUM_STEPS, **SMALL)
    killed, finished = folder.with_name("killed"), folder.with_name("finished")
    pid = server.start(config)
    while num_rollouts(folder, "step-000003.jsonl") < 2:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    shutil.copytree(folder, killed)
    assert {p.name for p in (killed / "checkpoints").iterdir()} == {"step-000000", "step-000002"}
    assert server.outcome(config) == ""
    shutil.copytree(folder, finished)
    return Ran(folder=folder, config=config, killed=killed, finished=finished)


@pytest.fixture(scope="module")
def undisturbed(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert server.outcome(write_config(folder, tiny_model, NUM_STEPS, **SMALL)) == ""
    return folder


def written(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def garbled(content: bytes, num_bytes: int) -> bytes:
    middle = len(content) // 2
    block = bytes(byte ^ 1 for byte in content[middle : middle + num_bytes])
    return content[:middle] + block + content[middle + len(block) :]


def linked(path: Path, outside: Path) -> None:
    path.rename(outside)
    path.symlink_to(outside)


def piped(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, outside: path.unlink(),
    "emptied": lambda path, outside: written(path, b""),
    "truncated": lambda path, outside: written(path, path.read_bytes()[: path.stat().st_size // 2]),
    "a byte is another": lambda path, outside: written(path, garbled(path.read_bytes(), 1)),
    "a block is another": lambda path, outside: written(path, garbled(path.read_bytes(), 512)),
    "a link": linked,
    "a hard link": lambda path, outside: outside.hardlink_to(path),
    "a pipe": piped,
}


PLAINEST = {("killed", "a byte is another"), ("finished", "missing")}


@pytest.mark.parametrize(
    ("state", "damage"),
    [
        pytest.param(state, damage, marks=() if (state, damage) in PLAINEST else pytest.mark.damages)
        for state in ("killed", "finished")
        for damage in DAMAGES
    ],
)
def test_whichever_file_is_damaged_the_run_ends_as_it_would_have_or_names_it(server, ran, undisturbed, state, damage):
    names = sorted(str(p.relative_to(getattr(ran, state))) for p in getattr(ran, state).rglob("*") if p.is_file())
    assert {"config.yaml", "run.json", "metrics.jsonl", "visits.jsonl", "run.log", "run.lock"} <= set(names)
    expected, wrong = result(undisturbed), []
    for name in names:
        folder = ran.restore(state)
        ran.outside.unlink(missing_ok=True)
        DAMAGES[damage](folder / name, ran.outside)
        before = ran.outside.read_bytes() if ran.outside.exists() else b""
        said = server.outcome(ran.config)
        if said and (name not in said or "\n" in said):
            wrong.append(f"{name}: {said}")
        with contextlib.suppress(OSError, ValueError):
            if said or result(folder) == expected:
                if ran.outside.exists() and ran.outside.read_bytes() != before:
                    wrong.append(f"{name}: what it is linked with was overwritten")
                continue
        wrong.append(f"{name}: another result, without a word")
    assert wrong == []


# --- checkpoints


def test_a_run_whose_checkpoints_were_deleted_does_not_start_again_on_top_of_the_old_one(server, ran, tiny_model):
    folder = ran.restore("killed")
    shutil.rmtree(folder / "checkpoints")
    said = server.outcome(ran.config)
    assert said.startswith(f"{folder / 'checkpoints'}: holds no checkpoint to go on from, but an earlier run has left ")
    assert "metrics.jsonl" in said and f"delete {folder} to start anew" in said

    folder = ran.restore("finished")
    shutil.rmtree(folder / "checkpoints")
    assert server.outcome(ran.config) == "", "what it made is there"
    longer = folder.with_name("longer.yaml")
    longer.write_text(ran.config.read_text().replace("num_steps: 3", "num_steps: 4"))
    assert server.outcome(longer).startswith(f"{folder / 'checkpoints'}: holds no checkpoint")
    (folder / "metrics.jsonl").unlink()
    (folder / "visits.jsonl").unlink()
    assert "rollouts" in server.outcome(longer)


def test_without_its_newest_checkpoint_a_run_goes_on_exactly_from_the_one_before(server, ran, undisturbed):
    folder = ran.restore("killed")
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)


def test_the_newest_whole_checkpoint_is_offered_and_the_run_goes_on_from_it_exactly(server, ran, undisturbed):
    folder = ran.restore("killed")
    state = folder / "checkpoints" / "step-000002" / "policy.safetensors"
    written(state, garbled(state.read_bytes(), 1))
    whole = folder / "checkpoints" / "step-000000"
    assert server.outcome(ran.config) == (
        f"{state}: is damaged: it is not what was written; the newest whole checkpoint is {whole}: to go on from it, "
        "delete step-000002 beside it"
    )
    shutil.rmtree(state.parent)
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)

    folder = ran.restore("killed")
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "policy.safetensors").write_bytes(b"")
    assert f"no older checkpoint is whole: restore the file from a copy, or delete {folder}" in server.outcome(
        ran.config
    )


def test_a_run_goes_on_without_lost_metrics_where_its_user_says_so_and_tells_it(server, ran, undisturbed):
    folder = ran.restore("killed")
    (folder / "metrics.jsonl").unlink()
    proof = folder / "checkpoints" / "step-000002" / "checkpoint.json"
    assert f"to go on without what the file has lost, delete {proof}" in server.outcome(ran.config)
    proof.unlink()
    assert server.outcome(ran.config) == ""
    assert result(folder)[0] == result(undisturbed)[0]
    assert "step-000002 has no checkpoint.json" in (folder / "run.log").read_text()


def test_stray_names_are_passed_over(server, ran, undisturbed):
    folder = ran.restore("killed")
    (folder / "checkpoints" / "step-000009.bak").mkdir()
    (folder / "checkpoints" / "step-9").mkdir()
    (folder / "checkpoints" / "step-000008").write_text("")
    (folder / "checkpoints" / ".unfinished-x").write_text("")
    (folder / ".unfinished-metrics.jsonl").symlink_to(ran.folder)
    for kind in ("rollouts", "evals", "tokens"):
        (folder / kind / "step-last.jsonl").write_text("?")
        (folder / kind / "step-000003.jsonl.bak").write_text("?")
        (folder / kind / "notes").mkdir()
        (folder / kind / "step-000009.jsonl").mkdir()
    (folder / "evals" / "step-000003.jsonl").mkdir()
    (folder / "checkpoints" / "step-000003").symlink_to("nowhere")
    (folder / ".unfinished-run.json").mkdir()
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)


def test_a_line_of_rollouts_that_reads_well_but_was_changed_is_rolled_out_again_and_told(server, ran, undisturbed):
    folder = ran.restore("killed")
    path = folder / "rollouts" / "step-000003.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    changed = json.loads(first)
    changed["grade"]["reward"] += 9
    path.write_text(json.dumps(changed) + "\n" + "".join(rest))
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)
    assert (
        "step-000003.jsonl: 1 lines are damaged, of another step, or there twice: left out"
        in (folder / "run.log").read_text()
    )


def test_a_damaged_line_of_an_evaluation_that_is_over_is_left_out_and_told_as_that(server, ran, undisturbed):
    folder = ran.restore("killed")
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    path = folder / "evals" / "step-000000.jsonl"
    path.write_bytes(garbled(path.read_bytes(), 1))
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)
    said = (folder / "run.log").read_text()
    assert re.search(r"step-000000.jsonl: 1 lines are damaged, .*: left out; what the metrics say of them stays", said)


def test_rollouts_of_another_step_and_those_that_stand_twice_are_left_out_and_told(server, ran, undisturbed):
    folder = ran.restore("killed")
    whole, in_flight = folder / "rollouts" / "step-000002.jsonl", folder / "rollouts" / "step-000003.jsonl"
    mine = in_flight.read_bytes()
    mine = mine[: mine.rfind(b"\n") + 1]
    in_flight.write_bytes(mine + whole.read_bytes() + mine)
    # As a process of its own has left them.
    in_flight.with_suffix(".rank1.jsonl").write_bytes(mine)
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)
    assert num_rollouts(folder, "step-000003*.jsonl") == num_rollouts(undisturbed, "step-000003.jsonl")
    said, many = (folder / "run.log").read_text(), mine.count(b"\n")
    assert f"step-000003.jsonl: {many + 4} lines are damaged, of another step, or there twice" in said
    assert f"step-000003.rank1.jsonl: {many} lines are damaged, of another step, or there twice" in said


def test_what_is_damaged_behind_all_that_a_checkpoint_rests_on_is_done_anew(server, ran, undisturbed):
    folder = ran.restore("killed")
    for name in ("metrics.jsonl", "visits.jsonl"):
        append_text(folder / name, "\0\0 no object")
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)


# --- run folders of other versions and of other people


def as_an_older_version_left_it(folder: Path) -> None:
    """State in torch's own format, no manifests, no digests, and a config without a newer key."""
    for checkpoint in (folder / "checkpoints").iterdir():
        flat = load_file(checkpoint / "policy.safetensors")
        adapter = {name.removeprefix("adapter/"): t for name, t in flat.items() if name.startswith("adapter/")}
        moments: list[dict[str, torch.Tensor]] = [{} for _ in adapter]
        for name, tensor in flat.items():
            if name.startswith("moments/"):
                _, i, key = name.split("/")
                moments[int(i)][key] = tensor
        state = {"adapter": adapter, "reference": None, "moments": moments}
        torch.save(state | {n: int(flat[n]) for n in ("num_updates", "num_steps")}, checkpoint / "policy.pt")
        (checkpoint / "policy.safetensors").unlink()
        (checkpoint / "checkpoint.json").unlink()
    for path in folder.glob("*/step-*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "sha256"}) + "\n" for r in rows))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["rollout"]["temperature"], config["checkpoint"]["keep"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_a_run_that_an_older_version_began_is_taken_up_exactly_and_what_cannot_be_known_is_told(
    server, ran, undisturbed
):
    folder = ran.restore("killed")
    as_an_older_version_left_it(folder)
    assert server.outcome(ran.config) == "" and result(folder) == result(undisturbed)
    log = (folder / "run.log").read_text()
    assert "step-000002 has no checkpoint.json (versions before it wrote none)" in log
    assert "are damaged" not in log


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_holds_code_runs_none_of_it(server, ran):
    folder = ran.restore("killed")
    checkpoint = folder / "checkpoints" / "step-000002"
    (checkpoint / "policy.safetensors").unlink()
    (checkpoint / "checkpoint.json").unlink()
    torch.save({"adapter": Runs(folder.with_name("was run"))}, checkpoint / "policy.pt")
    said = server.outcome(ran.config)
    assert said.startswith(f"{checkpoint / 'policy.pt'}: is damaged or of another model: ") and "step-000000" in said
    assert not folder.with_name("was run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize(
    "name", [".", "config.yaml", "run.json", "checkpoints", "checkpoints/step-000002/policy.safetensors", "run.lock"]
)
def test_what_another_user_put_there_is_not_taken_up(server, ran, name):
    folder = ran.restore("killed")
    os.chown(folder / name, NOBODY, NOBODY)
    said = server.outcome(ran.config)
    assert (f"belongs to user {NOBODY}" in said and str(folder / name) in said) or (name == "run.lock" and name in said)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a link to another user")
def test_a_link_that_another_user_made_is_not_followed_and_ones_own_is(server, ran, undisturbed):
    folder = ran.restore("killed")
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    try:
        assert f"is a link that user {NOBODY} made" in server.outcome(ran.config)
        os.chown(folder, 0, 0, follow_symlinks=False)
        assert server.outcome(ran.config) == "" and result(elsewhere) == result(undisturbed)
    finally:
        folder.unlink()
        shutil.rmtree(elsewhere)


@pytest.mark.parametrize("name", ["rollouts", "evals", "tokens", "checkpoints"])
def test_a_folder_in_the_run_folder_that_is_a_link_is_refused_and_nothing_behind_it_touched(server, ran, name):
    folder = ran.restore("killed")
    elsewhere = folder.with_name("elsewhere")
    shutil.copytree(folder / name, elsewhere)
    before = {p: p.stat().st_mtime_ns for p in elsewhere.rglob("*")}
    shutil.rmtree(folder / name)
    (folder / name).symlink_to(elsewhere)
    try:
        assert server.outcome(ran.config) == f"{folder / name}: is a link or a file; expected a folder"
        assert {p: p.stat().st_mtime_ns for p in elsewhere.rglob("*")} == before
    finally:
        shutil.rmtree(elsewhere)


# --- those who only read


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_report_is_made_of_a_damaged_folder_or_says_what_is_wrong(ran, damage, tmp_path):
    """Not in a process a file: the reports come from the functions that the scripts call."""
    from trainer.reports.run_report import write_report
    from trainer.reports.transcripts.write import write_transcripts

    names = sorted(str(p.relative_to(ran.finished)) for p in ran.finished.rglob("*") if p.is_file())
    for name in (n for n in names if n.endswith((".json", ".jsonl", ".yaml", ".html"))):
        folder = shutil.copytree(ran.finished, tmp_path / "run")
        outside = tmp_path / "outside"
        DAMAGES[damage](folder / name, outside)
        before = outside.read_bytes() if outside.exists() else b""
        write_transcripts(folder, None)
        assert "<!doctype html>" in write_report(folder).read_text(), name
        assert not outside.exists() or outside.read_bytes() == before
        shutil.rmtree(folder)
        outside.unlink(missing_ok=True)
