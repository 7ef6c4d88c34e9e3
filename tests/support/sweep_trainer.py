"""What stands for scripts/train.py in tests of sweeps: it leaves what a run leaves, and learns by a formula at once.

`python -m tests.support.sweep_trainer scripts/train.py --config FILE KEY=VALUE ...`, as a launcher is called. The
reward is best near a learning rate of 3e-4 and rises with the steps. The environment says what goes wrong: PAUSE_S
before each step, FAULTS as `{"trial-0003": 1}`, by run the exit code, or the name of a figure that evaluations lack.
A line of STARTED says which run began, and after which step.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

from envs.errors import UserError
from envs.terminal import end_on_signals
from trainer.config import RunConfig, load_config
from trainer.runs.files import append_line, append_text
from trainer.runs.folder import RunFolder
from trainer.runs.lock import RunLock
from trainer.runs.resuming import export_digests


def figures(config: RunConfig, step: int) -> dict[str, float]:
    """Of the evaluation after a step."""
    peak = 1 - (math.log10(config.optim.learning_rate) + 3.5) ** 2 / 4
    reward = round(peak * (step + 1) / (config.optim.num_steps + 1) + 0.01 * config.seed, 6)
    calls = 6 - 3 * reward + config.rollout.group_size / 8
    return {"eval/rollouts": 4, "eval/masked_rollouts": 0, "eval/reward": reward, "eval/tool_calls": calls}


def train(config: RunConfig) -> None:
    folder = config.output_dir
    fault = json.loads(os.environ.get("FAULTS", "{}")).get(folder.name)
    with RunLock(folder):
        RunFolder.create(config)
        run = RunFolder.open(config, rank=0)
        done = max((record["step"] for record in run.metrics()), default=-1)
        append_text(Path(os.environ["STARTED"]), f"{folder.name} {done}")
        for step in range(done + 1, config.optim.num_steps + 1):
            time.sleep(float(os.environ.get("PAUSE_S", "0")))
            if fault == 2:
                raise UserError("model.name: there is no such model")
            if fault == 1 and step == 1:
                raise RuntimeError("the card fell off the bus")
            row = {"step": step, **figures(config, step)}
            row.pop(str(fault), None)
            append_line(folder / "metrics.jsonl", row)
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").write_text(str(config.optim.learning_rate))
        digests = export_digests(folder / "adapter")
        run.note(adapter=str(folder / "adapter"), serve_command="vllm serve", adapter_files=digests)
        (folder / "report.html").write_text("<!doctype html><title>a run</title>")
        run.note(finished_steps=config.optim.num_steps)


def main() -> int:
    end_on_signals()
    _, config, path, *overrides = sys.argv[1:]
    assert config == "--config"
    try:
        asked = load_config(Path(path), overrides)
        if not RunFolder.is_finished(asked):
            train(asked)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
