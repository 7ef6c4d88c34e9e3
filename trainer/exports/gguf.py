"""GGUF files, made by llama.cpp's own converter and quantised by its own library.

The converter is a program of llama.cpp's source, which no wheel holds; the source lies in the sdist of
llama-cpp-python. The wheel that is built of the same sdist quantises.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from envs.errors import UserError, nearest

_SCRIPT = "convert_hf_to_gguf.py"
_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_FTYPE = "LLAMA_FTYPE_MOSTLY_"
_VARIABLE = "LLAMA_CPP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converter:
    """What makes a GGUF file on this machine."""

    script: Path
    quantise: str | None
    """llama.cpp's name, in lower case."""

    @classmethod
    def found(cls, folder: Path | None, quantise: str | None) -> Converter:
        """`folder` holds llama.cpp's source; else the variable LLAMA_CPP names it. Raises `UserError`."""
        where = "--llama-cpp" if folder is not None else _VARIABLE
        named = folder or (Path(found) if (found := os.environ.get(_VARIABLE)) else None)
        if named is None:
            raise UserError(
                f"--form gguf: needs llama.cpp's source, for its {_SCRIPT}: --llama-cpp FOLDER or the variable "
                f"{_VARIABLE} names it; docs/exports.md says where it comes from"
            )
        script = named / _SCRIPT
        if not script.is_file():
            raise UserError(f"{where} {named}: holds no {_SCRIPT}; expected the folder of llama.cpp's source")
        quantise = quantise.lower() if quantise else None
        # The converter knows this one itself.
        if quantise not in (None, "q8_0"):
            _ftype(quantise)
        return cls(script=script, quantise=quantise)

    def convert(self, model: Path, file: Path, *, name: str, dtype: str) -> None:
        """Of the merged checkpoint in the folder `model`; in the file it is called `name`.

        Raises `UserError` with what the converter says.
        """
        kind = self.quantise if self.quantise == "q8_0" else _TYPES[dtype]
        needs_more = self.quantise not in (None, "q8_0")
        made = file.with_name(f"unquantised-{file.name}") if needs_more else file
        command = [sys.executable, str(self.script), str(model), "--outfile", str(made), "--outtype", str(kind)]
        command += ["--model-name", name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not made.is_file():
            why = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it wrote no file"]
            raise UserError(f"--form gguf: {self.script} failed: {why[0][:500]}")
        if needs_more:
            assert self.quantise is not None
            _quantise(made, file, self.quantise)
            made.unlink()


def _ftype(quantise: str) -> int:
    """llama.cpp's number of a quantisation. Raises `UserError` where it has none of this name, or can't quantise."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"--quantise {quantise}: needs llama-cpp-python, which is not installed: pip install 'agent-rft[export]'; "
            "without it there is q8_0"
        )
    import llama_cpp

    known = {name.removeprefix(_FTYPE).lower() for name in dir(llama_cpp) if name.startswith(_FTYPE)}
    if quantise not in known:
        raise UserError(f"--quantise {quantise}: llama.cpp knows {', '.join(sorted(known))}{nearest(quantise, known)}")
    number: int = getattr(llama_cpp, f"{_FTYPE}{quantise.upper()}")
    return number


def _quantise(file: Path, to: Path, quantise: str) -> None:
    import llama_cpp

    said: list[str] = []

    # It would tell every tensor to the terminal.
    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, data: object) -> None:
        said.append(text.decode("utf-8", "replace"))

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = _ftype(quantise)
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    if llama_cpp.llama_model_quantize(str(file).encode(), str(to).encode(), ctypes.byref(how)) or not to.is_file():
        why = [line for line in "".join(said).splitlines() if line.strip()][-1:] or ["it wrote no file"]
        raise UserError(f"--quantise {quantise}: llama.cpp failed: {why[0][:500]}; q8_0 takes every model")
