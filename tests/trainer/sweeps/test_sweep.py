"""Whole sweeps over a stand-in of scripts/train.py: what is run, what a kill and an interrupt leave, what fails."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.scripts import run_script, wait_for
from tests.support.sweeps import SMALL, SweepUnderTest
from trainer.config import load_config
from trainer.sweeps.plan import make_plan
from trainer.sweeps.study import Study
from trainer.sweeps.work import marked_processes

RANDOM = {
    "space": {"optim.learning_rate": {"type": "log_range", "low": 1e-5, "high": 1e-2}, "rollout.group_size": [4, 8]},
    "method": {"type": "random", "num_trials": 7, "seed": 3},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepUnderTest:
    """A grid that nothing has disturbed."""
    sweep = SweepUnderTest(tmp_path_factory.mktemp("whole"), beside=["eval/tool_calls"])
    done = sweep.run()
    assert done.returncode == 0, done.stderr
    return sweep


def test_a_grid_runs_every_combination_once_and_names_the_best(whole: SweepUnderTest) -> None:
    names = [f"trial-{i:04d}" for i in range(8)]
    assert sorted(name for name, _ in whole.started()) == names and whole.finished() == set(names)
    seen = [load_config(whole.folder / "trials" / name / "config.yaml") for name in names]
    rates = [config.optim.learning_rate for config in seen]
    assert rates[::2] == rates[1::2] == pytest.approx([1e-5 * 10**i for i in range(4)], rel=1e-4)
    assert [config.rollout.group_size for config in seen] == [4, 8] * 4
    best = load_config(whole.folder / "best.yaml")
    assert best.optim.learning_rate == rates[2] and best.rollout.group_size == 4
    assert best.optim.num_steps == 3 and best.output_dir == whole.folder / "best"


def test_a_sweep_that_has_ended_is_not_run_again(whole: SweepUnderTest) -> None:
    before = whole.started()
    done = whole.run()
    assert done.returncode == 0 and "going on with 8 of 8 trials: 8 complete" in done.stdout
    assert whole.started() == before


def kill_between(sweep: SweepUnderTest, **environment: str) -> None:
    """SIGKILL the sweep when some trials have ended and two are at work."""
    with sweep.at_work(PAUSE_S="0.4", **environment) as process:
        wait_for(lambda: len(sweep.finished()) >= 3 and len(sweep.started()) >= 5, process)
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_grid_goes_on_runs_no_trial_twice_and_finds_the_same_best(
    whole: SweepUnderTest, tmp_path: Path
) -> None:
    sweep = SweepUnderTest(tmp_path, beside=["eval/tool_calls"])
    kill_between(sweep)
    # What was at work goes on by itself: its results are taken, whether it is still there or has ended meanwhile.
    done = sweep.run()
    assert done.returncode == 0, done.stderr
    assert "going on with " in done.stdout
    assert sweep.begun() == dict.fromkeys([f"trial-{i:04d}" for i in range(8)], 1), "each began once"
    assert len(sweep.started()) == 8, "and none was started again"
    mine, other = sweep.best(), whole.best()
    assert mine.pop("output_dir") != other.pop("output_dir") and mine == other


def test_a_killed_random_sweep_tries_what_it_would_have_tried(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, **RANDOM)
    kill_between(sweep)
    assert sweep.run().returncode == 0
    assert [*sweep.begun().values()] == [1] * 7 and len(sweep.started()) == 7
    tried = [load_config(path).optim.learning_rate for path in sorted(sweep.folder.glob("trials/*/config.yaml"))]
    plan = make_plan(sweep.path, [f"output_dir={tmp_path / 'other'}"], train=Path("train.py"), launch=None)
    plan.folder.mkdir()
    study = Study(plan.config, sweep_id="0", is_new=True)
    assert tried == [study.propose(index)["optim.learning_rate"] for index in range(7)]
    assert len({*tried}) == 7 and sweep.best()["optim"]["learning_rate"] in tried


def test_a_sweep_whose_runs_were_killed_with_it_resumes_them_where_they_were(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path)
    with sweep.at_work(PAUSE_S="0.4") as process:
        wait_for(lambda: len(sweep.finished()) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    sweep_id = json.loads((sweep.folder / "sweep.json").read_text())["sweep_id"]
    killed = marked_processes(sweep_id)
    assert 1 <= len(killed) <= 2
    for processes in killed.values():
        for one in processes:
            one.kill()
    wait_for(lambda: not marked_processes(sweep_id))
    done = sweep.run()
    assert done.returncode == 0, done.stderr
    assert sweep.begun().keys() == {f"trial-{i:04d}" for i in range(8)}
    again = {name for name, count in sweep.begun().items() if count > 1}
    resumed = {name for name, step in sweep.started() if step >= 0}
    assert again | resumed <= killed.keys(), "only what was killed was started again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_runs_once_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-4, 3e-4]})
    with sweep.at_work(PAUSE_S="0.4") as process:
        wait_for(lambda: len(sweep.started()) == 2, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.strip().endswith("interrupted")
    assert not sweep.finished()
    done = sweep.run()
    assert done.returncode == 0 and len(sweep.finished()) == 2
    assert sweep.best()["optim"]["learning_rate"] == 3e-4


def test_a_second_process_is_refused_while_one_drives_the_sweep(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-4, 3e-4]})
    with sweep.at_work(PAUSE_S="1") as process:
        wait_for(lambda: len(sweep.started()) == 2, process)
        second = sweep.run()
        assert second.returncode == 2 and f"is in use by process {process.pid} on " in second.stderr
        assert second.stderr.count("\n") == 1


# ---- failures


def test_a_trial_that_fails_is_told_with_its_reason_and_does_not_end_the_sweep(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-5, 3e-4, 1e-2]})
    faults = json.dumps({"trial-0001": 1, "trial-0002": 2})
    done = sweep.run(FAULTS=faults)
    assert done.returncode == 0, done.stderr
    assert "trial 1: failed: trial-0001: exit code 1: RuntimeError: the card fell off the bus" in done.stdout
    assert "trial 2: failed: trial-0002: exit code 2: model.name: there is no such model" in done.stdout
    page = (sweep.folder / "report.html").read_text()
    assert "trial 1 failed: trial-0001: exit code 1: RuntimeError: the card fell off the bus" in page
    assert sweep.best()["optim"]["learning_rate"] == 1e-5
    before = sweep.started()
    assert sweep.run().returncode == 0 and sweep.started() == before, "what failed stays so"
    done = sweep.run("--retry-failed")
    assert done.returncode == 0 and sweep.best()["optim"]["learning_rate"] == 3e-4
    assert {name for name, _ in sweep.started()[len(before) :]} == {"trial-0001", "trial-0002"}


def test_a_sweep_all_of_whose_trials_are_refused_ends_with_the_reason(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path)
    done = sweep.run(FAULTS=json.dumps({f"trial-{i:04d}": 2 for i in range(8)}))
    assert done.returncode == 2
    assert "error: every trial was refused, 3 until now; the last one says: " in done.stderr
    assert "model.name: there is no such model" in done.stderr and len(sweep.started()) <= 5


def test_a_sweep_without_a_result_says_so(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-5, 3e-4]})
    done = sweep.run(FAULTS=json.dumps({"trial-0000": 1, "trial-0001": 1}))
    assert done.returncode == 1 and "error: no trial came to its end" in done.stderr
    assert not (sweep.folder / "best.yaml").exists()


def test_a_figure_that_no_evaluation_has_ends_the_sweep_at_the_first_result(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, objective={"key": "eval/kindness"})
    done = sweep.run()
    assert done.returncode == 1
    assert "objective.key: trial-000" in done.stderr and "has no eval/kindness; its evaluation has eval/" in done.stderr


# ---- choosing, measuring, cutting short


def test_a_sweep_by_tpe_may_be_made_longer_and_wider(tmp_path: Path) -> None:
    method = {"type": "tpe", "num_trials": 3, "startup_trials": 2}
    space = {"optim.learning_rate": {"type": "log_range", "low": 1e-6, "high": 1.0}}
    sweep = SweepUnderTest(tmp_path, method=method, space=space, parallel={"num": 1})
    assert sweep.run().returncode == 0 and len(sweep.started()) == 3
    sweep.write(method=method | {"num_trials": 5}, space=space, parallel={"num": 2})
    done = sweep.run()
    assert done.returncode == 0 and len(sweep.started()) == 5
    drawn = [load_config(path).optim.learning_rate for path in sorted(sweep.folder.glob("trials/*/config.yaml"))]
    assert len({*drawn}) == 5


def test_each_trial_is_the_mean_of_its_seeds(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-4, 3e-4]}, seeds=[1, 5])
    done = sweep.run()
    assert done.returncode == 0
    assert {name for name, _ in sweep.started()} == {f"trial-000{i}-seed-{s}" for i in (0, 1) for s in (1, 5)}
    [row] = [line for line in done.stdout.splitlines() if line.startswith("trial 1 ") and "0.0003" in line]
    assert "1.030 (1.010 to 1.050)" in row, "0.01 a seed more"
    assert sweep.best()["seed"] == 1


def test_the_median_pruner_cuts_short_what_lies_behind(tmp_path: Path) -> None:
    rates = [3e-4, 2e-4, 4e-4, 5e-4, 1e-6]
    pruner = {"type": "median", "startup_trials": 3}
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": rates}, pruner=pruner, parallel={"num": 1})
    done = sweep.run(PAUSE_S="0.7")
    assert done.returncode == 0, done.stderr
    assert "trial 4: pruned after step " in done.stdout and "trial-0004" not in sweep.finished()
    assert "1 cut short" not in done.stdout and "cut short: after step " in (sweep.folder / "report.html").read_text()
    before = sweep.started()
    assert sweep.run().returncode == 0 and sweep.started() == before, "it is not taken up again"


def test_runs_see_the_gpus_that_are_handed_to_them(tmp_path: Path) -> None:
    trainer = tmp_path / "with_gpus.py"
    trainer.write_text(
        "import os, runpy, sys\n"
        f"open({str(tmp_path / 'seen')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n"
        "runpy.run_module('tests.support.sweep_trainer', run_name='__main__', alter_sys=True)\n"
    )
    sweep = SweepUnderTest(
        tmp_path,
        space={"optim.learning_rate": [1e-4, 2e-4, 3e-4, 4e-4]},
        parallel={"type": "gpus", "ids": [0, 1, "GPU-7a", "GPU-7b", 9], "per_run": 2},
        launch=f"{sys.executable} {trainer}",
    )
    assert sweep.run(PAUSE_S="0.3").returncode == 0
    seen = (tmp_path / "seen").read_text().split()
    assert len(seen) == 4 and set(seen) == {"0,1", "GPU-7a,GPU-7b"}


@pytest.fixture
def two_cores() -> Iterator[list[int]]:
    """For this test's processes, whatever pytest's worker has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core can't be shared out")
def test_runs_keep_to_the_cores_that_are_handed_to_them(two_cores: list[int], tmp_path: Path) -> None:
    trainer = tmp_path / "on_cores.py"
    trainer.write_text(
        "import os, runpy, sys\n"
        f"open({str(tmp_path / 'seen')!r}, 'a').write(f'{{os.sched_getaffinity(0)}}\\n')\n"
        "runpy.run_module('tests.support.sweep_trainer', run_name='__main__', alter_sys=True)\n"
    )
    sweep = SweepUnderTest(
        tmp_path,
        space={"optim.learning_rate": [1e-4, 2e-4, 3e-4]},
        parallel={"type": "cores", "num": 2},
        launch=f"{sys.executable} {trainer}",
    )
    # Scripts that are forked have the cores of what they are forked from.
    with sweep.at_work(PAUSE_S="0.3") as process:
        assert process.wait() == 0
    seen = (tmp_path / "seen").read_text().splitlines()
    assert len(seen) == 3 and set(seen) == {f"{{{core}}}" for core in two_cores}


# ---- what cannot be meant


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"space": {"optim.learning_rat": [1, 2]}}, "optim.learning_rat: unknown key; did you mean learning_rate?"),
        ({"space": {"optim.learning_rate": [1e-4, -1.0]}}, "space: optim.learning_rate=-1: config "),
        ({"space": {"rollout.group_size": {"type": "range", "low": 1, "high": 10**12}}}, "too many values of a grid"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: No such file or directory"),
        ({"launch": "acelerate launch"}, "launch 'acelerate launch': no such command"),
        ({"parallel": {"type": "gpus", "ids": [0], "per_run": 2}}, "parallel: 1 GPU, and each run takes 2"),
        ({"settings": {}, "pruner": {"type": "median"}}, "pruner: would never see an evaluation on the way"),
        ({"storage": "postgresql://127.0.0.1:9/none", "method": None}, "error: storage: can't be used: connection"),
        ({"storage": "${NO_SUCH_URL}"}, "storage: the environment variable NO_SUCH_URL is not set"),
        ({"spaces": {}}, "spaces: unknown key; did you mean space?"),
    ],
)
def test_sweeps_that_cannot_be_meant_are_refused_before_anything_starts(
    change: dict[str, object], told: str, tmp_path: Path
) -> None:
    sweep = SweepUnderTest(tmp_path, **change)
    done = run_script("sweep", sweep.path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
    assert not sweep.started() and "Traceback" not in done.stderr and not done.loaded


def test_all_configs_of_a_grid_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    space = {"rollout.max_turn_tokens": [64, 128], "rollout.max_episode_tokens": [700, 100]}
    done = run_script("sweep", SweepUnderTest(tmp_path, space=space).path)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "space: rollout.max_turn_tokens=128 rollout.max_episode_tokens=100: config " in done.stderr


def test_a_folder_belongs_to_one_sweep(whole: SweepUnderTest, tmp_path: Path) -> None:
    text = whole.path.read_text()
    try:
        whole.write(beside=["eval/tool_calls"], objective={"key": "eval/tool_calls", "goal": "minimise"})
        done = run_script("sweep", whole.path)
        assert done.returncode == 2 and "holds another sweep; it differs in sweep.objective.key" in done.stderr
    finally:
        whole.path.write_text(text)
    done = run_script("sweep", whole.path, "rollout.max_turns=7")
    assert done.returncode == 2 and "holds another sweep; it differs in sweep.settings.rollout.max_turns" in done.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    done = run_script("sweep", SweepUnderTest(tmp_path).path)
    assert done.returncode == 2 and "out: is not empty and holds no sweep" in done.stderr


def test_a_storage_of_another_sweep_is_refused(whole: SweepUnderTest, tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-4, 3e-4]})
    assert sweep.run().returncode == 0
    (sweep.folder / "study.db").write_bytes((whole.folder / "study.db").read_bytes())
    done = run_script("sweep", sweep.path)
    assert done.returncode == 2 and "it belongs to another sweep" in done.stderr and done.stderr.count("\n") == 1
    (sweep.folder / "study.db").write_bytes(b"no database" * 100)
    done = run_script("sweep", sweep.path)
    assert done.returncode == 2 and "study.db: can't be used: file is not a database" in done.stderr


def test_what_holds_for_all_trials_may_stand_behind_the_file(tmp_path: Path) -> None:
    sweep = SweepUnderTest(tmp_path, space={"optim.learning_rate": [1e-4, 3e-4]})
    elsewhere = tmp_path / "elsewhere"
    assert sweep.run("rollout.max_turns=7", f"output_dir={elsewhere}").returncode == 0
    config = yaml.safe_load((elsewhere / "trials" / "trial-0001" / "config.yaml").read_text())
    assert config["rollout"]["max_turns"] == 7 and config["optim"]["num_steps"] == SMALL["settings"]["optim.num_steps"]
    assert not sweep.folder.exists()
