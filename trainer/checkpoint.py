"""What a run needs to go on exactly where it was, and when it is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from trainer.policy import Policy
from trainer.runs import RunFolder


def save_checkpoint(run: RunFolder, policy: Policy, *, step: int, keep: int) -> Path:
    """Write `checkpoints/step-N` whole or not at all, and delete all but the `keep` newest. Main process only.

    Task order and seeds are pure functions of the config and the step, and finished rollouts of the step in flight lie
    in `rollouts/`; so the policy's own state (adapter, optimizer, schedule, random states) is all there is to save.
    """
    folder = run.path / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f".unfinished-{folder.name}")
    policy.save_adapter(temporary / "adapter")
    with (temporary / "policy.pt").open("wb") as file:
        torch.save(policy.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder)
    for old in sorted(folder.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(policy: Policy, folder: Path) -> None:
    """Put the policy into the state saved in `folder`."""
    policy.load_state_dict(torch.load(folder / "policy.pt", map_location="cpu", weights_only=False))
