"""Which trained policy of a run is meant, and whether its files are those that the run wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from trainer.config import RunConfig, load_config
from trainer.models.cache import resolve_model
from trainer.runs.about import changed_files, check_run_folder, read_about
from trainer.runs.manifest import checkpoints, fault_of
from trainer.runs.resuming import export_is_whole

if TYPE_CHECKING:
    from trainer.templates.chat import Chat

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The policy of one step of a run."""

    run: Path
    step: int
    is_final: bool
    """Of the run's end: what lies in its `adapter/`. Else that of a checkpoint, which the run deletes in its time."""
    adapter: Path
    """Holds adapter_model.safetensors and adapter_config.json."""
    config: RunConfig
    about: Mapping[str, Any]
    """`run.json`."""

    @property
    def name(self) -> str:
        """Of folders that are made of it."""
        return self.run.resolve().name if self.is_final else f"{self.run.resolve().name}-step-{self.step}"

    @cached_property
    def model_path(self) -> Path:
        """The folder of the base model. Raises `UserError` where it can't be had."""
        return resolve_model(self.config.model.name)

    @property
    def hub_id(self) -> str:
        """Of the base on a hub; empty for a folder, and for the embedded model."""
        name = self.config.model.name
        is_one = _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
        return name if is_one else ""

    @property
    def dtype(self) -> str:
        """torch's name of the dtype in which the run held the base."""
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        resolved = self.about.get("resolved")
        noted = resolved.get("model.dtype") if isinstance(resolved, Mapping) else None
        return noted if noted in ("bfloat16", "float16", "float32") else "bfloat16"


def find_trained(run: Path, step: int | None = None) -> Trained:
    """The policy at the run's end, or after `step` where its checkpoint is still kept.

    Raises `UserError` where there is no run, no such policy yet or any more, or where its files are damaged.
    """
    check_run_folder(run, "config.yaml")
    config = load_config(run / "config.yaml").model_copy(update={"output_dir": run})
    about = read_about(run)
    if step is not None:
        return _of_checkpoint(run, step, config, about)
    adapter, finished = run / "adapter", about.get("finished_steps")
    if not isinstance(finished, int) or "adapter" not in about:
        kept = _kept(run)
        told = f"--step takes a checkpoint's: {kept}" if kept else "it keeps no checkpoint yet either"
        raise UserError(f"{run}: has not ended, so there is no final adapter yet; {told}")
    if not export_is_whole(run, about):
        raise UserError(f"{adapter}: is not what the run wrote; the command that made the run writes it anew")
    return Trained(run=run, step=finished, is_final=True, adapter=adapter, config=config, about=about)


def _of_checkpoint(run: Path, step: int, config: RunConfig, about: Mapping[str, Any]) -> Trained:
    folder = dict(checkpoints(run)).get(step)
    if folder is None:
        kept = _kept(run)
        told = (
            f"but of {kept} (the newest {config.checkpoint.keep} are kept: checkpoint.keep)" if kept else "nor any yet"
        )
        raise UserError(f"--step {step}: {run} keeps no checkpoint of this step, {told}")
    if fault := fault_of(folder, run):
        raise UserError(f"--step {step}: {fault}")
    adapter = folder / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"--step {step}: {adapter}: holds no adapter_model.safetensors")
    return Trained(run=run, step=step, is_final=False, adapter=adapter, config=config, about=about)


def _kept(run: Path) -> str:
    return ", ".join(str(step) for step, _ in reversed(checkpoints(run)))


def chat_of(trained: Trained) -> Chat:
    """Template and parsers of the training. A run that has ended holds its template, whatever has become of a file of
    the user's, or of our fallback.

    Raises `UserError`, of one that has not ended also where the file that it names is not what it was.
    """
    from trainer.prepare import build_chat

    config, kept = trained.config, trained.run / "adapter" / "chat_template.jinja"
    if kept.is_file() and export_is_whole(trained.run, trained.about):
        config = config.model_copy(update={"model": config.model.model_copy(update={"chat_template": str(kept)})})
    elif config.model.chat_template in changed_files(trained.about, config):
        named = config.model.chat_template
        raise UserError(f"model.chat_template: {named} is not what it was when the run began; expected it restored")
    return build_chat(config, trained.model_path)
