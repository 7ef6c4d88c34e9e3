"""What a run needs to go on exactly where it was, and when it is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from trainer.policy import Policy
from trainer.runs import RunFolder

_UNFINISHED = ".unfinished-"


def write_checkpoint(run: RunFolder, policy: Policy, *, step: int) -> Path:
    """Write all of `checkpoints/step-N`, which counts only once `keep_checkpoint` gave it its name. Main process only.

    What the run writes of the step itself (its metrics) belongs between the two calls: a run that is killed there
    repeats the step, one that is killed later has nothing left to write.

    Task order and seeds are pure functions of the config and the step, and finished rollouts of the step in flight lie
    in `rollouts/`; so the policy's own state (adapter, optimizer, schedule, random states) is all there is to save.
    """
    folder = run.path / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f"{_UNFINISHED}{folder.name}")
    policy.save_adapter(temporary / "adapter")
    with (temporary / "policy.pt").open("wb") as file:
        torch.save(policy.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def keep_checkpoint(written: Path, *, keep: int) -> None:
    """Make it the one to resume from, at once or not at all, and delete all but the `keep` newest."""
    folder = written.with_name(written.name.removeprefix(_UNFINISHED))
    written.replace(folder)
    for old in sorted(folder.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(policy: Policy, folder: Path) -> None:
    """Put the policy into the state saved in `folder`."""
    policy.load_state_dict(torch.load(folder / "policy.pt", map_location="cpu", weights_only=False))
