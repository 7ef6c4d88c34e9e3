"""Several processes as one run: started as asked or refused, and in touch however long one of them takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from envs.errors import UserError
from tests.support import ROOT
from trainer import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def run_script(folder: Path, command: list[str], script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.run(
        [*command, str(path), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- how they were started

SAYS_WHAT_IT_SEES = """
    import os
    from envs.errors import UserError
    from trainer import processes
    try:
        said = f"accepted: {processes.start().num_processes}"
    except UserError as e:
        said = f"refused: {e}"
    os.write(1, (said + chr(10)).encode())  # at once, or the processes' lines would mix
"""


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (TORCHRUN, "WORLD_SIZE"),
        (
            [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"],
            "accelerate launch --num_processes",
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_that_asked_for_two_processes_where_each_would_be_one_is_refused(tmp_path, command, where):
    result = run_script(tmp_path, command, SAYS_WHAT_IT_SEES, ACCELERATE_USE_CPU="false")
    refused = [line for line in result.stdout.splitlines() if "refused" in line]
    assert refused and len(refused) == len(result.stdout.splitlines()), (result.stdout, result.stderr[-2000:])
    assert all(f"was asked for 2 processes ({where}), but accelerate sees 1" in line for line in refused)
    assert all("`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 scripts/train.py ...`" in line for line in refused)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_processes_that_a_launcher_counts_and_accelerate_does_not_are_refused(name, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for other in LAUNCHERS:
        monkeypatch.setenv(other, "1")
    assert processes.start().num_processes == 1
    monkeypatch.setenv(name, "3")
    with pytest.raises(UserError, match=re.escape(f"asked for 3 processes ({name}), but accelerate sees 1")):
        processes.start()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /usr/bin/accelerate launch --cpu --num_processes 2 train.py --num_processes 5", 2),
        ("accelerate launch --num-processes=4 -m train", 4),
        ("python -m accelerate.commands.launch --num_processes 3 train.py", 3),
        ("/usr/bin/accelerate-launch --num_processes 8 --num_machines 2 --machine_rank 0 train.py", 8),
        ("accelerate launch --cpu train.py", 0),
        ("python train.py output_dir=runs/a data.train=b accelerate launch --num_processes 2", 0),
        ("accelerate launch --no-such-option 2 --num_processes", 0),
        ("accelerate config", 0),
        ("", 0),
    ],
)
def test_the_number_of_processes_is_read_from_a_command_line_as_accelerate_reads_it(command, expected, capfd):
    assert processes._accelerate_asked(command.split()) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ACCELERATE_USE_FSDP", "true", "told to use FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "told to use DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "told to use Megatron-LM"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision bf16, which has no effect here"),
    ],
)
def test_what_accelerate_was_told_to_do_and_would_not_do_here_is_refused(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        processes.start()
    monkeypatch.setenv(name, "no" if "PRECISION" in name else "false")
    processes.start()


# --- what they tell each other

IN_TOUCH = """
    import datetime, os, sys, time
    from pathlib import Path
    import torch, torch.distributed as dist
    from envs.errors import UserError
    from trainer import processes

    calls = []
    def recorded(name):
        original = getattr(dist, name)
        def call(*arguments, **options):
            calls.append((name, options))
            return original(*arguments, **options)
        setattr(dist, name, call)
    for name in ("new_group", "all_gather_object", "barrier"):
        recorded(name)

    # As short as NCCL's ten minutes are beside an episode of an hour.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
    accelerator = processes.start(cpu=True)
    rank = accelerator.process_index
    time.sleep(2.5 * rank)
    assert processes.gather([rank, str(rank)]) == [0, "0", 1, "1"]
    time.sleep(2.5 * rank)
    processes.wait_for_all()
    made = []
    assert processes.from_main(lambda: made.append(rank) or "made") == "made" and made == [0] * (rank == 0)

    def refuse():
        raise UserError("wrong")
    try:
        processes.from_main(refuse)
        raise SystemExit("not refused")
    except UserError as e:
        assert str(e) == "wrong"

    (_, made), *others = calls
    assert made == {"backend": "gloo", "timeout": datetime.timedelta(days=7)}, made
    group = processes._control_group()
    assert {name for name, _ in others} == {"all_gather_object", "barrier"}
    assert all(options["group"] is group for _, options in others)
    assert dist.get_backend(group) == "gloo" and group is not dist.group.WORLD
    print("well")

    # A process that waits for another hears Ctrl-C and SIGTERM.
    if rank == 0:
        (Path(sys.argv[1]) / "waiting").write_text(str(os.getpid()))
        try:
            processes.wait_for_all()
        except KeyboardInterrupt:
            (Path(sys.argv[1]) / "heard").write_text("")
            os._exit(0)
    else:
        while not (waiting := Path(sys.argv[1]) / "waiting").exists() or not waiting.read_text():
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int(waiting.read_text()), 2)
        for _ in range(600):
            if (Path(sys.argv[1]) / "heard").exists():
                print("heard")
                os._exit(0)
            time.sleep(0.1)
"""


def test_processes_wait_for_the_slowest_on_a_group_of_their_own_and_hear_signals_meanwhile(tmp_path):
    result = run_script(tmp_path, TORCHRUN, IN_TOUCH, ACCELERATE_USE_CPU="true")
    # Lines of two processes may run into each other.
    said = result.stdout
    assert (said.count("heard"), said.count("well")) == (1, 2), said + result.stderr[-3000:]


TOLD_TO_EACH = """
    import asyncio
    import os
    import sys
    from pathlib import Path

    from envs.errors import UserError, WorldError
    from trainer import processes
    from trainer.rollouts.stream import release_left_open
    from trainer.runs.canary_record import CANARY, of_base, of_policy
    from trainer.runs.files import append_line
    from trainer.runs.folder import RunFolder

    class Progress:
        def say(self, told):
            pass

        def warn(self, told):
            os.write(1, (told + chr(10)).encode())

    accelerator = processes.start(cpu=True)
    run = RunFolder(Path(sys.argv[1]), run_id="r", rank=accelerator.process_index)
    if run.is_main:
        (run.path / "live.rank1.jsonl").write_text("[]" + chr(10))
        append_line(run.path / CANARY, of_base([[1, 2]], [-1.0]))
        append_line(run.path / CANARY, of_policy(0, [-1.0]))
    processes.wait_for_all()

    class Sweeping:
        async def sweep(self, rollout_ids):
            raise KeyError("no shelf") if rollout_ids == ["r-1"] else WorldError("gone")

    def released():
        with asyncio.Runner() as loop:
            release_left_open(Sweeping(), run, Progress(), loop, timeout_s=1)

    def open_now(name):
        if run.is_main:
            (run.path / "live.rank1.jsonl").unlink()
            append_line(run.path / "live.rank1.jsonl", {"opened": name})
        return released()

    for look in (
        released,
        lambda: open_now("r-1"),
        lambda: open_now("r-2"),
        lambda: run.keep_canary(of_base([[1, 2]], [-2.0]), tolerance=0.1),
    ):
        try:
            look()
        except UserError as e:
            os.write(1, (str(e) + chr(10)).encode())
"""


def test_what_the_main_process_finds_wrong_with_the_folder_ends_every_process_with_its_cause(tmp_path):
    said = run_script(tmp_path, TORCHRUN, TOLD_TO_EACH, ACCELERATE_USE_CPU="true").stdout
    told_to_all = (
        "live.rank1.jsonl, line 1: is damaged",
        "world: sweep(): raised KeyError: 'no shelf' (",
        "the base model is not the one",
    )
    for told in told_to_all:
        assert said.count(told) == 2, said
    assert said.count("1 rollouts that an earlier process left open could not be released: gone") == 1, said


def test_alone_a_process_talks_to_itself():
    assert processes.gather([1]) == [1] and processes.from_main(lambda: 2) == 2
    processes.wait_for_all()


def test_objects_and_waiting_go_by_way_of_this_module_only():
    """Whatever else waited for all processes, or sent them objects, would do so on NCCL."""
    collective = re.compile(r"gather_object|broadcast_object_list|wait_for_everyone|gather_for_metrics|dist\.barrier")
    for path in (ROOT / "trainer").glob("*.py"):
        assert path.name == "processes.py" or not collective.search(path.read_text()), path
