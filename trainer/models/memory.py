"""The memory that the run of a config will need, by formula.

Legend of the formulas: P weights, L layers, H hidden size, I size of the MLP, Q and K widths of all query and all key
heads, A query heads, r rank, b bytes of a base weight, T tokens of a microbatch (`optim.max_microbatch_tokens`,
or `rollout.max_episode_tokens` where a single row may be longer).

Covered: dense decoders of the Llama, Qwen and Mistral kind, one copy of the base for each process, SDPA attention. The
activations' formula counts what autograd keeps for each token; adding up the saved tensors of small Llama and Qwen2
models (transformers 5.17, on a CPU) gave the same bytes. Peak memory on a GPU was not measured. *Not covered:* mixtures
of experts; layers that carry a state along instead of attending; the CUDA context (0.5 to 1 GiB a process),
fragmentation and vLLM's own workspace; rollouts getting shorter or longer during training.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import EngineConfig, ModelConfig, RunConfig, cpu_cache_gib
from trainer.models.machines import GIB

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_CHUNK_BYTES = 64 * 2**20
_GPU_CHUNK_ROWS = 1024
"""As `trainer.learning.head.chunk_rows` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers of `config.json` that memory depends on."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules, under the names that Llama and Qwen give them."""
        h, i, q, k = self.hidden, self.intermediate, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h),
            "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h),
        }  # fmt: skip

    @property
    def num_linear_weights(self) -> int:
        """Of the linear modules of all layers: without embeddings and output head."""
        return self.num_layers * sum(a * b for a, b in self.linears.values())

    @property
    def num_weights(self) -> int:
        """Without biases, which are few."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.num_linear_weights + (2 * self.num_layers + 1) * self.hidden + embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One thing that lies in memory."""

    where: str
    """trainer or engine."""
    name: str
    num_bytes: float
    formula: str


_NUMBERS = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")


def read_shape(model_path: Path) -> ModelShape | None:
    """Of the model's config.json; None for a model that the formulas do not cover."""
    whole: dict[str, Any] = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    raw = whole.get("text_config", whole)
    if {*_NUMBERS, "head_dim"} - raw.keys() or "tie_word_embeddings" not in whole:
        raw, whole = _with_defaults(model_path, whole)
    if any("expert" in key and value for key, value in raw.items()):
        return None
    if any(kind == "linear_attention" or not kind.endswith("attention") for kind in raw.get("layer_types") or ()):
        return None
    try:
        heads = int(raw["num_attention_heads"])
        return ModelShape(
            num_layers=int(raw["num_hidden_layers"]),
            hidden=int(raw["hidden_size"]),
            intermediate=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            vocabulary=int(raw["vocab_size"]),
            # Of a wrapper around a text decoder it is the wrapper that ties.
            tied=bool(whole.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        )
    except (KeyError, TypeError):
        return None


def _with_defaults(model_path: Path, whole: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the text decoder, and of all of the model: what config.json leaves out is as transformers' class has it.

    Gemma's leave out most. Loads transformers, which takes seconds. What the class does not take stays as it is.
    """
    from transformers import CONFIG_MAPPING

    if whole.get("model_type") not in CONFIG_MAPPING:
        return whole.get("text_config", whole), whole
    try:
        config = CONFIG_MAPPING[whole["model_type"]].from_pretrained(model_path)
    except Exception:  # the config's own checks raise errors of several kinds; `family.model_class_of` tells of them
        return whole.get("text_config", whole), whole
    return config.get_text_config().to_dict(), config.to_dict()


def stored_weights(model_path: Path) -> int | None:
    """How many weights the model's safetensors files hold; None where there are none. Reads their headers only."""
    total = 0
    for path in model_path.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total or None


def num_weights_of(model_path: Path, shape: ModelShape) -> int:
    """As the files hold them; by the shape where there are none yet, or not all of them."""
    return max(stored_weights(model_path) or 0, shape.num_weights)


def num_lora_weights(config: RunConfig, shape: ModelShape) -> int:
    """r · (inputs + outputs) of each adapted module; modules that `ModelShape.linears` does not know count 0."""
    wanted = config.model.lora.target_modules
    adapted = [size for name, size in shape.linears.items() if isinstance(wanted, str) or name in wanted]
    return shape.num_layers * config.model.lora.r * sum(a + b for a, b in adapted)


def weight_bytes(model: ModelConfig, *, on_cpu: bool) -> int:
    """Of one weight of the base; on a CPU it depends on what this one can (`weights_dtype`)."""
    if not on_cpu:
        return _DTYPE_BYTES["bfloat16" if model.dtype == "auto" else model.dtype]
    from trainer.models.family import weights_dtype

    return _DTYPE_BYTES[weights_dtype(model, on_cpu=True)]


def head_bytes(shape: ModelShape, *, on_cpu: bool) -> int:
    """Of one chunk: float32 logits and their exponentials; on a CPU a copy more, which is little there."""
    return 3 * _CHUNK_BYTES if on_cpu else 2 * max(_CHUNK_BYTES, 4 * shape.vocabulary * _GPU_CHUNK_ROWS)


def activation_bytes(config: RunConfig, shape: ModelShape, *, on_cpu: bool) -> float:
    """What the backward pass of one microbatch needs of the forward pass, and the gradients in flight."""
    b, r = weight_bytes(config.model, on_cpu=on_cpu), config.model.lora.r
    tokens = max(config.optim.max_microbatch_tokens, config.rollout.max_episode_tokens)
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = (
        2 * (4 + b) * shape.hidden  # both norms: the float32 copy, and the output
        + 2 * b * (q + k)  # queries, keys, values and attention's output
        + 4 * b * shape.intermediate  # gate, its activation, up, their product
        + 4 * shape.num_heads + 8 + 7 * b * r
    )  # fmt: skip
    # Of the four the last two are made again; see `trainer.learning.layers.gated`.
    kept = b * shape.hidden if config.model.gradient_checkpointing else layer - 2 * b * shape.intermediate
    head = (4 + 2 * b) * shape.hidden
    return tokens * (shape.num_layers * kept + 2 * layer + head) + head_bytes(shape, on_cpu=on_cpu)


def engine_weight_bytes(
    config: RunConfig, engine: EngineConfig, shape: ModelShape, num_weights: int, *, on_cpu: bool
) -> float:
    """P·b; quantised to fp8, one byte a weight of the linear layers, and b of embeddings, norms and output head."""
    b = weight_bytes(config.model, on_cpu=on_cpu)
    quantised = shape.num_linear_weights if engine.quantization else 0
    return quantised + (num_weights - quantised) * b


def gpu_bytes(engine: EngineConfig, weights: float, total_bytes: float) -> float:
    """What the engine takes of a GPU of `total_bytes`: its share, or the cache that it is given beside its weights."""
    if engine.kv_cache_gib is None:
        return total_bytes * engine.gpu_memory_utilization
    return weights + engine.kv_cache_gib * GIB


def kv_token_bytes(config: RunConfig, shape: ModelShape, *, on_cpu: bool) -> int:
    """2·L·K·b: keys and values of one token."""
    b = weight_bytes(config.model, on_cpu=on_cpu)
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * b


def memory_rows(config: RunConfig, shape: ModelShape, num_weights: int, *, on_cpu: bool) -> list[MemoryRow]:
    """By process: what the trainer holds, and what its engine holds; nothing of an engine of the user's own."""
    b = weight_bytes(config.model, on_cpu=on_cpu)
    lora = num_lora_weights(config, shape)
    checkpointed = config.model.gradient_checkpointing
    kept = "b·H" if checkpointed else "2(4+b)H + 2b(Q+K) + 2bI + 4A + 8 + 7br"
    rows = [
        ("trainer", "base weights", num_weights * b, "P·b"),
        ("trainer", "adapter and its optimizer", 24 * lora,
         "24 bytes · r·Σ(inputs + outputs): weight 4, gradient 4, Adam 8, flattened gradients 8"),
        ("trainer", "activations of a microbatch", activation_bytes(config, shape, on_cpu=on_cpu),
         f"T · (L·[{kept}] + two whole layers + head), and {head_bytes(shape, on_cpu=on_cpu) // 2**20} MiB of logits"),
    ]  # fmt: skip
    if isinstance(config.engine, EngineConfig):
        rows += _engine_rows(config, config.engine, shape, num_weights, on_cpu=on_cpu)
    return [MemoryRow(where=w, name=n, num_bytes=float(size), formula=f) for w, n, size, f in rows]


def _engine_rows(
    config: RunConfig, engine: EngineConfig, shape: ModelShape, num_weights: int, *, on_cpu: bool
) -> Iterator[tuple[str, str, float, str]]:
    b = weight_bytes(config.model, on_cpu=on_cpu)
    weights = "1 · linear weights + b · others" if engine.quantization else "P·b"
    yield "engine", "base weights", engine_weight_bytes(config, engine, shape, num_weights, on_cpu=on_cpu), weights
    yield "engine", "adapter", num_lora_weights(config, shape) * b, "b·r·Σ(inputs + outputs)"
    if on_cpu:
        yield "engine", "KV cache", cpu_cache_gib(engine) * GIB, "engine.kv_cache_gib"
        yield "engine", "merged weights on their way", num_weights * b, "P·b, in /dev/shm while publishing"
        return
    kv_token = kv_token_bytes(config, shape, on_cpu=False)
    together = min(engine.max_num_seqs, config.rollout.num_rollouts)
    longest = config.rollout.max_episode_tokens
    formula = f"2·L·K·b = {kv_token:,} bytes a token · {together} sequences · {longest:,} tokens, at most"
    yield "engine", "KV cache", kv_token * together * longest, formula


def memory_bytes(rows: Sequence[MemoryRow], where: str | None = None) -> float:
    return math.fsum(row.num_bytes for row in rows if where in (None, row.where))
