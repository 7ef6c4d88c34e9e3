"""What a GPU shows of this project, in at most 25 minutes: `python scripts/rehearse_gpu.py`, or `make rehearse-gpu`.

Piece by piece, each in processes of its own and within a time limit:

environment   driver, cards, versions, free memory, /dev/shm; a Triton kernel and `torch.compile` on the card
quickstart    twenty steps of configs/quickstart.yaml through scripts/train.py; every adapter published and proved
model         scripts/bench/random_model.py: random weights of a 1.5B shape, with the default model's tokenizer
rollouts      scripts/bench/rollout_throughput.py on those weights
training      scripts/bench/training_throughput.py on those weights
together      two steps of scripts/train.py on those weights, the engine asleep while the trainer trains

A piece leaves OUT/pieces/NAME.json when it is done, and is not done again: the same command goes on where it was ended.
After all, OUT/rehearsal.json holds everything, and a table goes to standard output. Exit code 1 when a piece failed, of
which OUT/logs/NAME.log says more. `memory` is the most of the first card that was in use while the piece ran (with
--cpu: what its processes held), looked at every half second: rollouts is the engine alone, training the trainer alone.

`--cpu` takes the same way with the smallest shapes, for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from program import UserError, run, say

from envs.reading.documents import override_of
from trainer.runs.files import read_lines, read_object, write_atomically

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"
Figures = dict[str, float | str]
"""By name and unit, `sampled, tokens/s` say."""

_POLL_S = 0.5
_END_S = 30
"""What a piece that ran past its limit is given to end its engine."""

_COMMON = ["engine.publish=lora", "trackers=[]"]
_QUICKSTART = {
    False: ["optim.num_steps=20", "engine.enforce_eager=false", "eval={num_tasks: 16, samples_per_task: 2}"],
    True: [
        "optim.num_steps=1",
        "warmstart={num_steps: 1, episodes_per_step: 2}",
        # One kind of layer to probe; each takes some seconds.
        "model.lora.target_modules=[q_proj]",
        "engine.kv_cache_gib=1",
        "rollout.tasks_per_step=1",
        "rollout.group_size=2",
        "rollout.max_turns=2",
        "rollout.max_turn_tokens=16",
        "eval={num_tasks: 1, samples_per_task: 1}",
    ],
}
_RANDOM = {
    False: [
        "model.gradient_checkpointing=true",
        "engine.enforce_eager=false",
        "engine.max_num_seqs=128",
        "engine.gpu_memory_utilization=0.6",
        "engine.sleep=weights",
        "rollout.tasks_per_step=8",
        "rollout.group_size=16",
        "rollout.max_turn_tokens=256",
        "rollout.max_episode_tokens=4096",
        "optim.max_microbatch_tokens=16384",
    ],
    True: [
        "model.dtype=float32",
        "engine.kv_cache_gib=1",
        "rollout.tasks_per_step=1",
        "rollout.group_size=2",
        "rollout.max_turns=2",
    ],
}
_TOGETHER = {
    # Random weights earn nothing, so that every group is tied: the KL term makes rows worth an update.
    False: ["optim.num_steps=2", "loss.kl_coef=0.001", "warmstart={num_steps: 2, episodes_per_step: 8}"],
    True: ["optim.num_steps=1", "loss.kl_coef=0.001", "warmstart={num_steps: 1, episodes_per_step: 2}"],
}
_NO_EVALUATION = "eval={num_tasks: 1, samples_per_task: 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One part of the rehearsal."""

    name: str
    limit_s: int
    command: Sequence[str]
    """Behind the interpreter, from the repository's root."""
    figures: Callable[[], Figures]
    """Read when the command has ended."""


def pieces(out: Path, *, on_cpu: bool) -> list[Piece]:
    """In their order; their limits add up to 25 minutes on a GPU, and to four times that on a CPU."""
    model, form = out / "model", ["--cpu"] if on_cpu else []
    on_random = [override_of("model.name", str(model)), *_COMMON, *_RANDOM[on_cpu]]
    rows = ["--repeats", "1" if on_cpu else "2"]

    def bench(name: str, limit_s: int, script: str, *options: str) -> Piece:
        path = out / "logs" / f"{name}.figures.json"
        command = [f"scripts/bench/{script}", *on_random, *rows, *options, "--json", str(path)]
        return Piece(name=name, limit_s=limit_s, command=command, figures=lambda: bench_figures(path))

    def training_run(name: str, limit_s: int, overrides: Sequence[str]) -> Piece:
        run = out / name
        command = [
            "scripts/train.py",
            "--config",
            "configs/quickstart.yaml",
            override_of("output_dir", str(run)),
            *overrides,
        ]
        return Piece(name=name, limit_s=limit_s, command=command, figures=lambda: run_figures(run))

    def of_its_own(name: str, limit_s: int, script: str, *options: str) -> Piece:
        path = out / "logs" / f"{name}.figures.json"
        command = [f"scripts/{script}", *form, *options, str(path)]
        return Piece(name=name, limit_s=limit_s, command=command, figures=lambda: json.loads(path.read_text()))

    in_order = [
        of_its_own("environment", 120, "rehearse_gpu.py", "--environment"),
        training_run("quickstart", 600, [*_COMMON, *_QUICKSTART[on_cpu]]),
        of_its_own("model", 120, "bench/random_model.py", str(model), "--json"),
        bench("rollouts", 240, "rollout_throughput.py"),
        bench("training", 180, "training_throughput.py", "--rows", "2" if on_cpu else "32"),
        training_run("together", 240, [*on_random, *_TOGETHER[on_cpu], _NO_EVALUATION]),
    ]
    return [replace(piece, limit_s=piece.limit_s * (4 if on_cpu else 1)) for piece in in_order]


# ---- what a piece shows


def bench_figures(path: Path) -> Figures:
    """The medians of a benchmark's JSON."""
    return {f"{f['name']}, {f['unit']}": f["median"] for f in json.loads(path.read_text())["figures"]}


def run_figures(run: Path) -> Figures:
    """Of a run's metrics: medians over its steps, and the worst of what proved its publishes."""
    records = read_lines(run / "metrics.jsonl")
    steps = [record for record in records if "time/step_s" in record]
    keys = ["time/rollouts_s", "time/training_s", "time/publish_s", "time/step_s"]
    keys += ["throughput/sampled_tokens_per_s", "throughput/trained_tokens_per_s"]
    figures: Figures = {"steps": float(len(steps))}
    figures |= {f"{key}, median of the steps": median(step[key] for step in steps) for key in keys}
    figures["canary/mismatch, nats, largest"] = max(step["canary/mismatch"] for step in steps)
    if shares := [s["canary/applied_since_version"] for s in steps if "canary/applied_since_version" in s]:
        figures["canary/applied_since_version, smallest"] = min(shares)
    rewards = [record["eval/reward"] for record in records if "eval/reward" in record]
    return figures | {"eval/reward before": rewards[0], "eval/reward after": rewards[-1]}


def look_at_environment(*, on_cpu: bool) -> Figures:
    """What the machine has. Raises `UserError` without a card, and what torch or Triton raise on one of no use."""
    import torch

    if not on_cpu and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; with --cpu the rehearsal takes its smallest form")
    import psutil
    import vllm
    from vllm.platforms import current_platform

    figures: Figures = {
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "vllm": vllm.__version__,
        "vllm's platform": str(current_platform.device_type),
        "cards": float(torch.cuda.device_count()),
        "/dev/shm, GiB free": shutil.disk_usage("/dev/shm").free / 2**30,
        "memory, GiB free": psutil.virtual_memory().available / 2**30,
        "nvcc": shutil.which("nvcc") or "none",
    }
    if on_cpu:
        return figures
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        figures[f"card {i}"] = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    figures["driver"] = nvidia_smi("driver_version")[0]
    # Triton compiles a kernel and launches it.
    x = torch.randn(1000, device="cuda")
    compiled = torch.compile(lambda x: (x.sin() + 1).relu())(x)
    torch.testing.assert_close(compiled, (x.sin() + 1).relu())
    figures["a compiled kernel"] = "right"
    return figures


def nvidia_smi(what: str) -> list[str]:
    """A value of every card."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()


# ---- one after the other


class PeakMemory:
    """The most memory in use while it is entered, GiB: of the first card, or of a process and its descendants."""

    def __init__(self, *, on_cpu: bool) -> None:
        self.gib = 0.0
        self._on_cpu = on_cpu
        self._ended = threading.Event()

    def watch(self, process: psutil.Process) -> threading.Thread:
        thread = threading.Thread(target=self._watch, args=(process,), daemon=True)
        thread.start()
        return thread

    def end(self) -> None:
        self._ended.set()

    def _watch(self, process: psutil.Process) -> None:
        import psutil

        while not self._ended.wait(_POLL_S):
            with contextlib.suppress(psutil.Error, OSError, subprocess.SubprocessError, ValueError, IndexError):
                self.gib = max(self.gib, self._now(process))

    def _now(self, process: psutil.Process) -> float:
        if not self._on_cpu:
            return float(nvidia_smi("memory.used")[0]) / 1024
        family = [process, *process.children(recursive=True)]
        return sum(float(member.memory_info().rss) for member in family) / 2**30


def run_piece(piece: Piece, out: Path, *, on_cpu: bool) -> dict[str, Any]:
    """What is written of it: `ok`, seconds, memory, and its figures or why there are none."""
    import psutil

    log = out / "logs" / f"{piece.name}.log"
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    memory = PeakMemory(on_cpu=on_cpu)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *piece.command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        thread = memory.watch(psutil.Process(process.pid))
        try:
            code = process.wait(piece.limit_s)
            why = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"not done after {piece.limit_s} s"
        finally:
            _end(process)
            memory.end()
            thread.join()
    figures: Figures = {}
    if not why:
        try:
            figures = piece.figures()
        except (OSError, KeyError, ValueError, IndexError) as e:
            why = f"it left no figures: {type(e).__name__}: {e}"
    done = {"piece": piece.name, "ok": not why, "seconds": time.monotonic() - start, "memory_gib": memory.gib}
    return done | {"command": list(piece.command)} | ({"why": why, "log": str(log)} if why else {"figures": figures})


def _end(process: subprocess.Popen[bytes]) -> None:
    """The piece and what it started, engines included, which are of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kept_result(path: Path) -> dict[str, Any] | None:
    """What an earlier call left of a piece; None where it left nothing, or something damaged: it is done again."""
    with contextlib.suppress(UserError):
        result = read_object(path)
        if result is not None and {"ok", "seconds", "memory_gib", "figures", "command"} <= set(result):
            return result
    return None


def rehearse(out: Path, *, on_cpu: bool) -> list[dict[str, Any]]:
    """All pieces, those that were finished before as they were."""
    for name in ("pieces", "logs"):
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {out}: {e.strerror or e}; expected a folder that can be written") from None
    done = []
    for piece in pieces(out, on_cpu=on_cpu):
        path = out / "pieces" / f"{piece.name}.json"
        result = kept_result(path)
        if result is not None and result["command"] != list(piece.command):
            raise UserError(f"--out {out}: holds another rehearsal's {piece.name}; choose another folder")
        if result is None:
            say(f"{piece.name}: at most {piece.limit_s} s", file=sys.stderr)
            result = run_piece(piece, out, on_cpu=on_cpu)
            if result["ok"]:
                write_atomically(path, json.dumps(result, indent=1))
            else:
                say(f"{piece.name}: {result['why']}, see {result['log']}", file=sys.stderr)
        done.append(result)
    write_atomically(out / "rehearsal.json", json.dumps({"on_cpu": on_cpu, "pieces": done}, indent=1))
    return done


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for every figure of every piece."""
    rows = ["| piece | figure | value |", "|---|---|---|"]
    for piece in done:
        shown = {"seconds": piece["seconds"], "memory, GiB": piece["memory_gib"], **piece.get("figures", {})}
        for name, value in ({} if piece["ok"] else {"failed": piece["why"]} | {"log": piece["log"]}).items():
            rows.append(f"| {piece['piece']} | {name} | {value} |")
        for name, value in shown.items():
            rows.append(f"| {piece['piece']} | {name} | {value if isinstance(value, str) else f'{value:.4g}'} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="folder (default runs/rehearsal)")
    parser.add_argument("--cpu", action="store_true", help="the smallest form, on a machine without a GPU")
    parser.add_argument("--environment", type=Path, metavar="JSON", help="write what the machine has there, and end")
    given = parser.parse_args()
    try:
        if given.environment is not None:
            write_atomically(given.environment, json.dumps(look_at_environment(on_cpu=given.cpu)))
            return 0
        done = rehearse(given.out.resolve(), on_cpu=given.cpu)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # A terminal that was closed takes no more words.
        with contextlib.suppress(OSError):
            say("interrupted; the same command goes on", file=sys.stderr)
        return 130
    say(table(done))
    return 0 if all(piece["ok"] for piece in done) else 1


if __name__ == "__main__":
    run(main)
