"""A trained policy as a folder that others load: the adapter, merged weights, or a GGUF file, with all they need.

Beside the weights lie the base's tokenizer, the chat template of the training, the sampling of the training as
generation_config.json, and a model card. The folder is there whole or not at all.

*Covered*: a full disk, an interrupt, a target that exists, two exports to one place at once. *Not covered*: a kill
leaves a folder whose name begins with `.unfinished-`, which the next export to the same place deletes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from envs.errors import UserError
from envs.reading.documents import check_writable
from trainer.exports.card import model_card
from trainer.exports.gguf import Converter
from trainer.exports.trained import Trained, chat_of
from trainer.runs.canary_record import check_trained_base, find_canary
from trainer.runs.files import UNFINISHED, clear, digest

if TYPE_CHECKING:
    from trainer.templates.chat import Chat

Form = Literal["adapter", "merged", "gguf"]
Dtype = Literal["bfloat16", "float16", "float32"]

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    # Of models that also see or hear, which vLLM loads with their processor or not at all.
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_OVERHEAD_BYTES = 64 * 2**20
"""Of an artefact over its weights: the tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What is to be made."""

    form: Form = "adapter"
    dtype: Dtype | None = None
    """Of merged weights, and of a GGUF file that is not quantised; None: the run's."""
    quantise: str | None = None
    """A GGUF file's quantisation by llama.cpp's name, `q8_0` or `q4_k_m` say; None: none."""
    to: Path | None = None
    """None: a folder beside the run's, named after it."""
    llama_cpp: Path | None = None
    """A folder with llama.cpp's source, for GGUF."""

    def folder(self, trained: Trained) -> Path:
        if self.to is not None:
            return self.to
        of = "" if self.form == "adapter" else self.quantise or self.dtype or trained.dtype
        return trained.run.resolve().parent / "-".join(filter(None, (trained.name, self.form, of)))


def export(trained: Trained, wanted: Artefact) -> Path:
    """Make the artefact; returns its folder. Raises `UserError` for all that is wrong or missing, and a full disk."""
    folder = wanted.folder(trained)
    converter = _checked(trained, wanted, folder)
    written = folder.with_name(f"{UNFINISHED}{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(written):
            _check_space(trained, wanted, folder)
            _fill(trained, wanted, written, converter)
            written.rename(folder)
    except BlockingIOError:
        raise UserError(f"{_where(wanted)}{folder}: another export is being written there; wait for it") from None
    except OSError as e:
        raise UserError(f"{_where(wanted)}{folder}: can't be written: {e.strerror or e}") from e
    return folder


@contextlib.contextmanager
def _held(written: Path) -> Iterator[None]:
    """The folder, empty and this export's alone; it is gone in the end. Raises `BlockingIOError` where another has it.

    The system lets go of it with a process that is killed.
    """
    if written.is_symlink() or not written.is_dir():
        clear(written)
    written.mkdir(exist_ok=True)
    held = os.open(written, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(held)
        if not written.is_dir() or os.fstat(held).st_ino != written.stat().st_ino:
            raise BlockingIOError
        try:
            for left in written.iterdir():
                clear(left)
            yield
        finally:
            shutil.rmtree(written, ignore_errors=True)
    finally:
        os.close(held)


def _lock(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # A file system without locks on folders.
        return


def servable(trained: Trained, to: Path | None = None) -> Path:
    """A folder with the adapter from which servers may read at any time: the run's own, or an export of it.

    A run deletes its checkpoints. An export that is there already serves again. Raises `UserError` as `export`.
    """
    if trained.is_final and to is None:
        return trained.adapter.resolve()
    wanted = Artefact(to=to)
    folder = wanted.folder(trained).resolve()
    weights = "adapter_model.safetensors"
    if (folder / weights).is_file() and digest(folder / weights) == digest(trained.adapter / weights):
        return folder
    return export(trained, wanted).resolve()


def _checked(trained: Trained, wanted: Artefact, folder: Path) -> Converter | None:
    """What turns it into GGUF, if that is wanted. Whatever is wrong is told before a model is loaded."""
    if wanted.form == "adapter" and wanted.dtype:
        raise UserError("--dtype: only with --form merged or gguf; an adapter is in float32, as it was trained")
    if wanted.form != "gguf":
        for name, value in (("--quantise", wanted.quantise), ("--llama-cpp", wanted.llama_cpp)):
            if value is not None:
                raise UserError(f"{name}: only with --form gguf")
    elif wanted.dtype and wanted.quantise:
        raise UserError("--dtype: what is quantised has no dtype; leave out --dtype or --quantise")
    if folder == Path():
        raise UserError("--to: names no folder; expected one that is not there yet")
    if folder.resolve().is_relative_to(trained.run.resolve()):
        raise UserError(f"--to {folder}: lies in the run folder, which is the run's own; expected another place")
    try:
        is_there = folder.exists() or folder.is_symlink()
    except OSError as e:
        raise UserError(f"{_where(wanted)}{folder}: {e.strerror or e}") from e
    if is_there:
        raise UserError(f"{_where(wanted)}{folder}: is there already; delete it, or choose another with --to")
    check_writable(folder, "--to", is_folder=True)
    return None if wanted.form != "gguf" else Converter.found(wanted.llama_cpp, wanted.quantise)


def _where(wanted: Artefact) -> str:
    return "--to " if wanted.to is not None else ""


def _check_space(trained: Trained, wanted: Artefact, folder: Path) -> None:
    """Raise `UserError` where the disk can't hold it: weights take minutes until they find out."""
    needed = _OVERHEAD_BYTES + sum(path.stat().st_size for path in trained.adapter.iterdir())
    if wanted.form != "adapter":
        base = sum(path.stat().st_size for path in trained.model_path.glob("*.safetensors"))
        # A GGUF file is made of merged weights, which lie beside it meanwhile.
        needed += base * (2 if wanted.dtype == "float32" else 1) * (2 if wanted.form == "gguf" else 1)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise UserError(
            f"{_where(wanted)}{folder}: {folder.parent} has {free >> 20:,} MiB free, and the export takes up to "
            f"{needed >> 20:,} MiB; choose a place with more room"
        )


def _fill(trained: Trained, wanted: Artefact, folder: Path, converter: Converter | None) -> None:
    chat = chat_of(trained)
    template = chat.save_template(folder)
    _write_tokenizer(trained.model_path, folder, template)
    _write_generation_config(trained, chat, folder)
    if wanted.form == "adapter":
        _write_adapter(trained, folder)
    elif converter is None:
        _write_merged(trained, folder, wanted.dtype or trained.dtype)
    else:
        merged = folder / f"{UNFINISHED}merged"
        shutil.copytree(folder, merged, ignore=shutil.ignore_patterns(merged.name))
        _write_merged(trained, merged, wanted.dtype or trained.dtype)
        converter.convert(merged, folder / "model.gguf", name=trained.name, dtype=wanted.dtype or trained.dtype)
        clear(merged)
    card = model_card(trained, form=wanted.form, weights=wanted.quantise or wanted.dtype, chat=chat, template=template)
    (folder / "README.md").write_text(card, encoding="utf-8")
    # safetensors writes files that only their owner reads, and a server may be another user's.
    mode = (folder / "README.md").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def _write_tokenizer(model_path: Path, folder: Path, template: Path | None) -> None:
    """The base's own files: written anew by transformers, others could not read all of them."""
    for name in _TOKENIZER:
        if (model_path / name).is_file() and not (folder / name).exists():
            shutil.copyfile(model_path / name, folder / name)
    if template is None:
        return
    # llama.cpp's converter takes the template that stands here before the one that lies beside.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "chat_template" in settings:
        settings["chat_template"] = template.read_text(encoding="utf-8")
        _write_json(path, settings)


def _write_generation_config(trained: Trained, chat: Chat, folder: Path) -> None:
    """The sampling of the training and the tokens that ended its turns: a base's own defaults are others."""
    from trainer.templates.special_tokens import generation_config

    rollout, own = trained.config.rollout, generation_config(trained.model_path)
    kept = {key: own[key] for key in ("bos_token_id", "pad_token_id") if own.get(key) is not None}
    sampled = {"do_sample": True, "temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": 0}
    _write_json(folder / "generation_config.json", {**kept, "eos_token_id": sorted(chat.stop_token_ids), **sampled})


def _write_adapter(trained: Trained, folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(trained.adapter / name, folder / name)
    path = folder / "adapter_config.json"
    # By which PEFT finds the base.
    base = {"base_model_name_or_path": trained.hub_id or str(trained.model_path)}
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | base)


def _write_merged(trained: Trained, folder: Path, dtype: str) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from trainer.learning.adapter import load_adapter, merged_model

    disable_progress_bar()
    model = _loaded(trained)
    _check_base(trained, model)
    load_adapter(model, trained.adapter)
    sampling = (folder / "generation_config.json").read_bytes()
    try:
        merged_model(model, getattr(torch, dtype)).save_pretrained(folder)
    except SafetensorError as e:
        raise OSError(str(e)) from e
    # transformers writes the base's.
    (folder / "generation_config.json").write_bytes(sampling)


def _loaded(trained: Trained) -> Any:
    """The base under an adapter that changes nothing yet, as the run read it; a CPU has no flash attention."""
    import torch

    from trainer.learning.adapter import load_model

    here = {"dtype": trained.dtype, "gradient_checkpointing": False, "attn_implementation": "auto"}
    config, longest = trained.config.model.model_copy(update=here), trained.config.rollout.max_episode_tokens
    device = torch.device("cpu")
    return load_model(trained.model_path, config, device=device, seed=trained.config.seed, max_length=longest)


def _check_base(trained: Trained, model: Any) -> None:
    """Raise `UserError` where the base under `model`, whose adapter changes nothing yet, is not the one of the run.

    *Not covered*: runs of older versions, which kept no canary.
    """
    from trainer.learning.reader import scores_of

    if (record := find_canary(trained.run, trained.step)) is not None:
        scores = scores_of(model, record.token_ids)
        check_trained_base(trained.run, record, scores, trained.config.engine.canary_mean_tolerance)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
