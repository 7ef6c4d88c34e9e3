"""The record of a sweep: what is written and read back, what is drawn, in SQLite and in PostgreSQL."""

from __future__ import annotations

import contextlib
import math
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.errors import FoundLate, UserError
from tests.support.servers import free_port
from trainer.sweeps.config import SweepConfig
from trainer.sweeps.study import Study

SPACE = {
    "optim.learning_rate": {"type": "log_range", "low": 1e-6, "high": 1.0},
    "rollout.group_size": {"type": "range", "low": 2, "high": 16},
    "model.lora.target_modules": [["q_proj"], "all-linear", None, 8],
}


def config(folder: Path, **settings: Any) -> SweepConfig:
    given = {"base": "base.yaml", "output_dir": folder, "space": SPACE, "method": {"type": "random", "num_trials": 9}}
    return SweepConfig.model_validate(given | settings)


def peak(rate: float) -> float:
    """Best at 1e-3."""
    return -((math.log10(rate) + 3) ** 2)


def test_points_are_read_back_as_they_were_drawn(tmp_path: Path) -> None:
    study = Study(made := config(tmp_path), sweep_id="a", is_new=True)
    points = [study.propose(index) for index in range(9)]
    for index, point in enumerate(points):
        study.begin(index, point)
    again = Study(made, sweep_id="a", is_new=False)
    assert [trial.point for trial in again.trials().values()] == points
    assert {type(p["rollout.group_size"]) for p in points} == {int}
    assert all(p["model.lora.target_modules"] in SPACE["model.lora.target_modules"] for p in points)
    assert all(1e-6 <= p["optim.learning_rate"] <= 1 for p in points)


def test_what_is_drawn_at_random_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    study = Study(config(tmp_path), sweep_id="a", is_new=True)
    points = [study.propose(index) for index in range(6)]
    study.begin(0, points[0])
    study.tell(0, 1.0)
    assert [study.propose(index) for index in reversed(range(6))] == points[::-1]
    other = config(tmp_path, method={"type": "random", "num_trials": 9, "seed": 1})
    assert Study(other, sweep_id="b", is_new=True).propose(0) != points[0]


def test_tpe_draws_where_trials_went_well_and_the_same_after_a_new_start(tmp_path: Path) -> None:
    method = {"type": "tpe", "num_trials": 30, "startup_trials": 8}
    space = {"optim.learning_rate": SPACE["optim.learning_rate"]}
    made = config(tmp_path, method=method, space=space)
    rates = []
    for index in range(30):
        study = Study(made, sweep_id="a", is_new=not index)
        point = study.propose(index)
        assert point == study.propose(index)
        study.begin(index, point)
        study.tell(index, peak(point["optim.learning_rate"]))
        rates.append(point["optim.learning_rate"])
    near = [1e-4 < rate < 1e-2 for rate in rates]
    assert sum(near[15:]) > 7, "a third of the draws at random lies there"


def test_trials_end_as_told_and_a_failed_one_may_be_tried_again(tmp_path: Path) -> None:
    study = Study(config(tmp_path), sweep_id="a", is_new=True)
    for index in range(4):
        study.begin(index, study.propose(index))
    study.tell(0, 0.5)
    study.give_up(1, "failed", "exit code 1: no card")
    study.give_up(2, "pruned", "after step 2")
    assert not study.report(3, 1, 0.25) and not study.report(3, 2, 0.5)
    trials = study.trials()
    assert [t.state for t in trials.values()] == ["complete", "failed", "pruned", "running"]
    assert (trials[0].value, trials[1].reason, trials[3].last_step) == (0.5, "exit code 1: no card", 2)
    assert trials[0].seconds is not None and trials[3].seconds is None
    study.begin(1, trials[1].point)
    study.tell(1, 0.75)
    trials = study.trials()
    assert [*trials] == [0, 1, 2, 3] and (trials[1].state, trials[1].value) == ("complete", 0.75)
    assert trials[1].reason == ""


@pytest.mark.parametrize(
    ("pruner", "ends"),
    [
        ({"type": "median", "startup_trials": 3}, [False, True]),
        ({"type": "median", "startup_trials": 3, "warmup_steps": 3}, [False, False]),
        ({"type": "successive_halving", "min_steps": 1, "reduction_factor": 3}, [True, True]),
        ({"type": "successive_halving", "min_steps": 4, "reduction_factor": 3}, [False, False]),
        (None, [False, False]),
    ],
)
def test_a_pruner_ends_what_lies_behind(pruner: dict[str, Any] | None, ends: list[bool], tmp_path: Path) -> None:
    made = config(tmp_path, pruner=pruner, objective={"key": "eval/tool_calls", "goal": "minimise"})
    study = Study(made, sweep_id="a", is_new=True)
    for index in range(3):
        study.begin(index, study.propose(index))
        for step in (1, 2):
            study.report(index, step, 4.0 - step)
        study.tell(index, 2.0)
    study.begin(3, study.propose(3))
    # More calls than the others: at step 1 as good as they, at step 2 far behind.
    first = study.report(3, 1, 3.0 if pruner and pruner["type"] == "median" else 9.0)
    second = study.report(3, 2, 9.0)
    assert first == ends[0] and (first or second == ends[1])


def test_importance_tells_which_setting_makes_trials_good(tmp_path: Path) -> None:
    study = Study(config(tmp_path), sweep_id="a", is_new=True)
    assert study.importance() == {}
    for index in range(24):
        point = study.propose(index)
        study.begin(index, point)
        study.tell(index, peak(point["optim.learning_rate"]))
    importance = study.importance()
    assert next(iter(importance)) == "optim.learning_rate" and importance["optim.learning_rate"] > 0.5
    assert sum(importance.values()) == pytest.approx(1)


def test_a_database_that_has_gone_is_told_on_one_line(tmp_path: Path) -> None:
    study = Study(config(tmp_path), sweep_id="a", is_new=True)
    (tmp_path / "study.db").write_bytes(b"not a database any more" * 1000)
    with pytest.raises(FoundLate) as said:
        study.begin(0, study.propose(0))
    assert "study.db: can't be used: " in str(said.value) and "\n" not in str(said.value)


# ---- PostgreSQL


def _programs() -> Path | None:
    found = [Path(at).parent for name in ("initdb",) if (at := shutil.which(name))]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "postgres").exists()), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of its own, which listens on this machine alone."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder, port = Path(tmp_path_factory.mktemp("postgres")), free_port()
    # It refuses to run as root.
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            user = {"user": pwd.getpwnam("postgres").pw_uid}
        if not user:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        folder = Path("/tmp") / f"agent-rft-postgres-{port}"
        folder.mkdir()
        os.chown(folder, user["user"], -1)
    data = folder / "data"
    try:
        password = folder / "password"
        password.write_text("hunter22")
        password.chmod(0o644)
        made = [programs / "initdb", "-D", data, "-U", "me", "--auth=scram-sha-256", f"--pwfile={password}"]
        subprocess.run([*map(str, made)], check=True, capture_output=True, cwd=folder, **user)
        server = [programs / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", folder]
        process = subprocess.Popen([*map(str, server)], stderr=subprocess.PIPE, text=True, cwd=folder, **user)
        assert process.stderr is not None
        for line in process.stderr:
            if "ready to accept connections" in line:
                break
        yield f"postgresql://me:hunter22@127.0.0.1:{port}/postgres"
        # It would wait for its clients after SIGTERM.
        process.send_signal(signal.SIGINT)
        process.communicate()
    finally:
        if user:
            shutil.rmtree(folder)


def test_a_sweep_is_recorded_in_postgresql(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPS_URL", postgres)
    made = config(tmp_path, storage="${SWEEPS_URL}")
    study = Study(made, sweep_id="a", is_new=True)
    Study(made, sweep_id="b", is_new=True).begin(0, study.propose(5))
    point = study.propose(0)
    study.begin(0, point)
    study.report(0, 1, 0.25)
    study.tell(0, 0.5)
    again = Study(made, sweep_id="a", is_new=False)
    assert [(t.point, t.state, t.value) for t in again.trials().values()] == [(point, "complete", 0.5)]
    assert not (tmp_path / "study.db").exists()
    with pytest.raises(
        UserError, match=r"storage: holds no study .*-c', which .* began, but .*-a, .*-b: it belongs to"
    ):
        Study(made, sweep_id="c", is_new=False)


def test_what_postgresql_says_names_no_password(postgres: str, tmp_path: Path) -> None:
    for wrong, told in ((postgres.replace("hunter22", "hunter23"), "password authentication failed"),
                        (postgres.replace("/postgres", "/nowhere"), 'database "nowhere" does not exist')):  # fmt: skip
        with pytest.raises(UserError) as said:
            Study(config(tmp_path, storage=wrong), sweep_id="a", is_new=True)
        text = str(said.value)
        assert text.startswith("storage: can't be used: ") and told in text and "\n" not in text
        assert "hunter" not in text


@pytest.mark.parametrize("name", ["q?x", "p%20x", "a b#c", "größe"])
def test_the_record_lies_in_the_sweeps_folder_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    Study(config(folder), sweep_id="a", is_new=True)
    assert [path.name for path in folder.iterdir()] == ["study.db"] and [*tmp_path.iterdir()] == [folder]
