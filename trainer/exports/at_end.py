"""What a run that has ended gives: the adapter as an inference server takes it, and the pages."""

from __future__ import annotations

import shlex
from pathlib import Path

from trainer.exports.commands import adapter_command, chat_arguments
from trainer.learning.policy import Policy
from trainer.models.family import weights_dtype
from trainer.prepare import Prepared
from trainer.reports.run_report import write_report
from trainer.reports.transcripts.write import write_transcripts
from trainer.runs.files import UNFINISHED, clear
from trainer.runs.folder import RunFolder
from trainer.runs.resuming import export_digests
from trainer.session import Session
from trainer.types import Phase


def export_run(s: Session) -> None:
    """Adapter, transcripts and report; from then on the run is finished. Every process calls it, one writes."""
    s.progress.phase(Phase.EXPORTING)
    if not s.run.is_main:
        return
    export_adapter(s.prepared, s.run, s.policy)
    write_transcripts(s.run.path, lambda token_id: s.prepared.chat.decode([token_id]))
    write_report(s.run.path, is_over=True)
    s.run.note(finished_steps=s.prepared.config.optim.num_steps)


def export_adapter(prepared: Prepared, run: RunFolder, policy: Policy) -> Path:
    """Write `adapter/` with the chat template that the policy was trained under, and note the command that serves it.

    Call it on one process. Serving with that command renders and parses as training did. The folder is there whole or
    not at all.
    """
    folder = run.path / "adapter"
    written = folder.with_name(f"{UNFINISHED}{folder.name}")
    for old in (written, folder):
        clear(old)
    policy.save_adapter(written)
    template = prepared.chat.save_template(written)
    written.replace(folder)
    template = (folder / template.name).resolve() if template else None
    on_cpu = policy.accelerator.device.type == "cpu"
    command = adapter_command(
        prepared.model_path,
        folder.resolve(),
        dtype=weights_dtype(prepared.config.model, on_cpu=on_cpu),
        rank=prepared.config.model.lora.r,
        chat=chat_arguments(prepared.chat, template, prepared.model_path, prepared.config),
    )
    run.note(adapter=str(folder), serve_command=shlex.join(command), adapter_files=export_digests(folder))
    return folder
