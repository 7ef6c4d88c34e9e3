"""What a run needs to go on exactly where it was, and when it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.learning.adapter import adapter_state
from trainer.learning.policy import Policy
from trainer.runs.files import UNFINISHED, clear, open_to_read
from trainer.runs.folder import RunFolder
from trainer.runs.manifest import OLD_STATE, STATE, checkpoints, write_manifest
from trainer.runs.resuming import refusal_of

_COUNTERS = ("num_updates", "num_steps")
_MOST_OVERHEAD_BYTES = 64 * 2**20
"""Of a state's file over its tensors: their names."""


def write_checkpoint(run: RunFolder, policy: Policy, *, step: int) -> Path:
    """Write all of `checkpoints/step-N`, which counts only once `keep_checkpoint` gave it its name. Main process only.

    What the run writes of the step itself (its metrics) belongs between the two calls: a run that is killed there
    repeats the step, one that is killed later has nothing left to write.

    Task order and seeds are pure functions of the config and the step, and finished rollouts of the step in flight lie
    in `rollouts/`; so the policy's own state (adapter, reference, optimizer, two counters) is all there is to save.
    """
    written = run.path / "checkpoints" / f"{UNFINISHED}step-{step:06d}"
    clear(written)
    policy.save_adapter(written / "adapter")
    save_file(_flat(policy.state_dict()), written / STATE)
    return written


def keep_checkpoint(run: RunFolder, written: Path, *, keep: int) -> None:
    """Make it the one to resume from, at once or not at all, and delete all but the `keep` newest.

    It rests on what the run has written until now.
    """
    folder = written.with_name(written.name.removeprefix(UNFINISHED))
    write_manifest(written, run.path, step=int(folder.name.removeprefix("step-")), run_id=run.run_id)
    clear(folder)
    written.replace(folder)
    for _, old in checkpoints(run.path)[keep:]:
        shutil.rmtree(old)


def load_checkpoint(policy: Policy, folder: Path) -> None:
    """Put the policy into the state saved in `folder`; no file of it can hold code.

    Raises `UserError` that names the file and the newest checkpoint that is whole.
    """
    path = folder / STATE if (folder / STATE).exists() else folder / OLD_STATE
    weights = adapter_state(policy.model)
    of_critic = [] if policy.critic is None else policy.critic.parameters
    try:
        # Weights, reference and two moments: whatever is much larger is no state of this policy.
        most = 4 * sum(4 * w.numel() for w in (*weights.values(), *of_critic)) + _MOST_OVERHEAD_BYTES
        with open_to_read(path, ours=True) as file:
            size = file.seek(0, 2)
        if size > most:
            raise ValueError(f"holds {size:,} bytes, where this model's state takes {most:,} at most")
        state = _read(path, list(weights)) if path.name == STATE else _read_old(path)
        _check_shapes(state, list(weights.values()))
        policy.load_state_dict(state)
    except OSError as e:
        raise refusal_of(folder, folder.parents[1], f"{path}: {e.strerror or e}") from e
    except Exception as e:
        # Whatever a reader of damaged bytes raises.
        cause = str(e).split("\n", 1)[0][:200]
        raise refusal_of(folder, folder.parents[1], f"{path}: is damaged or of another model: {cause}") from e


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """The policy's state as safetensors takes it: tensors by name."""
    flat = {f"adapter/{name}": tensor for name, tensor in state["adapter"].items()}
    flat |= {f"reference/{i}": tensor for i, tensor in enumerate(state["reference"] or ())}
    flat |= {f"moments/{i}/{key}": tensor for i, of in enumerate(state["moments"]) for key, tensor in of.items()}
    flat |= {name: torch.tensor(state[name]) for name in _COUNTERS}
    critic = state["critic"] or {"weights": (), "moments": ()}
    flat |= {f"critic/{i}": tensor for i, tensor in enumerate(critic["weights"])}
    flat |= {f"critic_moments/{i}/{key}": x for i, of in enumerate(critic["moments"]) for key, x in of.items()}
    flat |= {"entropy": torch.tensor(state["entropy"], dtype=torch.float64)} if state["entropy"] else {}
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def _read(path: Path, names: list[str]) -> dict[str, Any]:
    """`_flat` undone, for an adapter of these tensors."""
    with safe_open(path, "pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    if unknown := set(parts) - {"adapter", "reference", "moments", "entropy", "critic", "critic_moments", *_COUNTERS}:
        raise ValueError(f"holds {min(unknown)!r}")
    reference, critic = parts.get("reference"), parts.get("critic")
    of_critic = None
    if critic is not None:
        weights = [critic[str(i)] for i in range(len(critic))]
        of_critic = {"weights": weights, "moments": _moments(parts.get("critic_moments", {}), len(weights))}
    return {
        "adapter": parts["adapter"],
        "reference": [reference[str(i)] for i in range(len(names))] if reference else None,
        "moments": _moments(parts.get("moments", {}), len(names)),
        "critic": of_critic,
        "entropy": tuple(flat["entropy"].tolist()) if "entropy" in flat else None,
    } | {name: int(flat[name]) for name in _COUNTERS}


def _moments(tensors: dict[str, Tensor], num_parameters: int) -> list[dict[str, Tensor]]:
    """Of each parameter, by their keys."""
    moments: list[dict[str, Tensor]] = [{} for _ in range(num_parameters)]
    for name, tensor in tensors.items():
        i, _, key = name.partition("/")
        moments[int(i)][key] = tensor
    return moments


def _read_old(path: Path) -> dict[str, Any]:
    """What torch's own format holds that is data; nothing in it is run."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_shapes(state: dict[str, Any], weights: list[Tensor]) -> None:
    """What the optimizer would only find at its first step."""
    tensors = [*enumerate(state["reference"] or ())]
    tensors += [(i, t) for i, moments in enumerate(state["moments"]) for t in moments.values()]
    for i, tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.shape not in (weights[i].shape, torch.Size([])):
            raise ValueError(f"tensor {i} has the shape {tuple(tensor.shape)} and the type {tensor.dtype}")
