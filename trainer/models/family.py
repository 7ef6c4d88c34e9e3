"""What a model's `config.json` says it is: the class that trains it, the layers that LoRA adapts, what is refused.

All of it before a weight is read: the model is built on torch's meta device, which allocates nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from envs.errors import UserError
from trainer.config import EngineConfig, LoraConfig, ModelConfig, publishes_merged

_ABSORBED = "kv_b_proj"
"""Latent attention multiplies this matrix into others when the engine loads it; an adapter on it would be ignored."""

_KINDS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end that generate text; a wrapper of vision or audio around a text decoder is of the last kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model that can be trained here."""

    architecture: str
    """As config.json, transformers and vLLM name it."""
    targets: tuple[str, ...]
    """The linear layers that LoRA adapts, by their full names in transformers."""
    has_experts: bool
    """Mixture of experts: a router chooses, for each token, among feed-forward layers that LoRA leaves alone."""
    is_wrapper: bool
    """A vision or audio model around a text decoder, of which only the decoder is used."""
    is_recurrent: bool
    """Some of its layers carry a state along instead of attending (linear attention, beside convolutions)."""
    is_latent: bool
    """Its attention keeps keys and values compressed to one vector a token (MLA)."""
    max_length: int | None
    """Tokens of the longest sequence that the model's positions allow; None: not limited."""


def read_family(folder: Path, lora: LoraConfig) -> Family:
    """The family of the model in `folder`. Raises `UserError` when it can't be trained here.

    *Covered:* everything that can be seen without weights: code of its own, encoder-decoders, classes that transformers
    does not know, `lora.target_modules`. *Not covered:* whether vLLM has it, see `check_served`.
    """
    model_class, config = model_class_of(folder)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as e:  # whatever a class trips over in a config that is not its own or is not whole
        raise _refusal(f"{model_class.__name__} can't be built of its config.json: {_in_one_line(e)}") from e
    decoder = model.get_decoder()
    return Family(
        architecture=model_class.__name__,
        targets=tuple(lora_targets(model, lora)),
        has_experts=any("experts" in name.split(".") for name, _ in decoder.named_modules()),
        is_wrapper=config.get_text_config() is not config,
        is_recurrent=any(isinstance(module, nn.Conv1d) for module in decoder.modules()),
        is_latent=any(name.rpartition(".")[2] == _ABSORBED for name, _ in decoder.named_modules()),
        max_length=_max_length(config.get_text_config()),
    )


def model_class_of(folder: Path) -> tuple[Any, Any]:
    """transformers' class of the model in `folder`, as its config.json names it, and the config itself."""
    raw = _raw_config(folder)
    named = raw.get("architectures") or []
    architecture = named[0] if named and isinstance(named, list) and isinstance(named[0], str) else ""
    model_class = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    is_known = raw.get("model_type") in transformers.CONFIG_MAPPING and model_class is not None
    if not is_known and "auto_map" in raw:
        raise _refusal(
            f"{architecture or raw.get('model_type')} is code that its repository brings along (auto_map in "
            "config.json, trust_remote_code elsewhere), which is not run here"
        )
    if not is_known:
        raise _refusal(
            f"transformers {transformers.__version__} does not know "
            + (f"the architecture {architecture!r}" if architecture else "it: config.json names no architectures")
            + f" (model_type {raw.get('model_type')!r})"
        )
    if raw.get("is_encoder_decoder") or not architecture.endswith(_KINDS):
        raise _refusal(f"{architecture} is not a decoder that writes text token by token")
    method = _quantised(raw)
    # transformers and vLLM both unpack gpt-oss's own format, and no other model's.
    if method and not (method == "mxfp4" and raw.get("model_type") == "gpt_oss"):
        raise _refusal(
            f"its weights are quantised ({method}); take the checkpoint with 16-bit weights (engine.quantization "
            "quantises the engine's copy alone)"
        )
    # vLLM's own config classes take the place of transformers' in AutoConfig as soon as it has read such a model.
    own = getattr(model_class, "config_class", None)
    reader: Any = own if getattr(own, "model_type", None) == raw.get("model_type") else AutoConfig
    try:
        config = reader.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # the config's own checks raise errors of several kinds
        raise UserError(f"model.name: {folder / 'config.json'}: transformers can't read it: {_in_one_line(e)}") from e
    if getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise _refusal(f"{architecture} is an encoder-decoder")
    return model_class, config


def lora_targets(model: Any, lora: LoraConfig) -> list[str]:
    """Full names of the linear layers of `model` that LoRA adapts, sorted.

    `all-linear` takes those of the text decoder but for routers and gates between experts, the experts themselves and
    `kv_b_proj`; a list takes those among them that it names. Raises `UserError` when a name of the list means none.
    """
    decoder = model.get_decoder()
    modules = dict(model.named_modules())
    inside = {id(module) for module in decoder.modules()}
    reasons = {name: _why_not(name, module, inside) for name, module in modules.items()}
    allowed = [name for name, reason in reasons.items() if not reason]
    if lora.target_modules == "all-linear":
        chosen = set(allowed)
    else:
        chosen = set()
        for target in lora.target_modules:
            meant = [name for name in modules if name == target or name.endswith(f".{target}")]
            fit = [name for name in meant if not reasons[name]]
            if not fit:
                why = f"{target!r} is {reasons[meant[0]]}" if meant else f"the model has no module {target!r}"
                raise UserError(
                    f"model.lora.target_modules: {why}; this {type(model).__name__} has "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in allowed}))}"
                )
            chosen |= set(fit)
    if not chosen:
        raise _refusal(f"{type(model).__name__} has no linear layers that LoRA could adapt")
    return sorted(chosen)


def _why_not(name: str, module: nn.Module, decoder: set[int]) -> str:
    """Why LoRA does not adapt this module; empty where it does."""
    *path, own = name.split(".")
    if "experts" in (*path, own):
        return "of the experts, which are one fused parameter each and stay as they are"
    if "router" in (*path, own) or own == "gate" or own.endswith("_gate"):
        return "a router: trainer and engine would choose other experts"
    # A subclass computes something else than W x, which an adapter beside it would not know.
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"no linear layer ({type(module).__name__})"
    if id(module) not in decoder:
        return "outside the text decoder (output head, vision or audio tower, projector)"
    if own == _ABSORBED:
        return "multiplied into other matrices by the engine, where an adapter would be ignored"
    return ""


def weights_dtype(model: ModelConfig, *, on_cpu: bool) -> str:
    """torch's name of the dtype that `model.dtype` means on this machine; trainer and engine hold the base in it."""
    if model.dtype != "auto":
        return model.dtype
    has_bfloat16 = not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""What transformers imports for each, and what it is installed as."""


def check_attention(folder: Path, model: ModelConfig, *, on_cpu: bool) -> None:
    """Raise `UserError` unless the trainer can compute attention as `model.attn_implementation` says."""
    how = model.attn_implementation
    if how in ("auto", "eager"):
        return
    model_class, _ = model_class_of(folder)
    asked = f"model.attn_implementation: {how}"
    if not (model_class._supports_sdpa if how == "sdpa" else model_class._supports_flash_attn):
        raise UserError(f"{asked}: transformers has none for {model_class.__name__}; set it to auto")
    if how == "sdpa":
        return
    module, package = _FLASH_PACKAGES[how]
    if on_cpu:
        raise UserError(f"{asked} needs a GPU, and this machine has none; set it to auto")
    if (dtype := weights_dtype(model, on_cpu=on_cpu)) == "float32":
        raise UserError(f"{asked} computes in 16 bits, but model.dtype is {dtype}; set one of the two to auto")
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{asked} needs the package {package}, which is not installed; install it, or set this to auto")


def check_served(family: Family, engine: EngineConfig, *, dtype: str = "bfloat16", on_cpu: bool) -> None:
    """Raise `UserError` unless the installed vLLM serves the family, with what the trainer will publish to it.

    vLLM inspects the model's class in a process of its own, the first time (some 20 s on two cores), and remembers it.
    *Not covered:* what only shows when it runs, which the probe finds (`Publisher.probe`).
    """
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models.get(family.architecture)
    if known is None:
        raise _refusal(f"vLLM {vllm.__version__} has no model {family.architecture}")
    if family.is_recurrent and on_cpu and dtype != "bfloat16":
        raise UserError(f"model.dtype: {dtype} can't be had for {family.architecture} on a CPU; set it to bfloat16")
    if not publishes_merged(engine, on_cpu=on_cpu):
        asked = f"engine.publish: {engine.publish} can't be had for {family.architecture}"
        if not takes_adapters(known.module_name, known.class_name):
            raise UserError(f"{asked}, to which vLLM {vllm.__version__} applies no adapters; set it to merged")
        split = split_in_vllm(known.module_name, known.class_name)
        for layer in sorted({name.rpartition(".")[2] for name in family.targets}):
            if layer not in split.get(layer, [layer]):
                raise UserError(
                    f"{asked}, of whose {layer} vLLM {vllm.__version__} takes adapters in parts alone "
                    f"({', '.join(split[layer])}); leave it out of model.lora.target_modules, or set this to merged"
                )
        if family.has_experts and on_cpu:
            raise UserError(
                f"{asked} on a CPU, where vLLM's experts run beside an adapter only with Triton; set it to merged"
            )
    try:
        found = known.inspect_model_cls()
    except Exception as e:  # whatever the import of a module raises, as text of the process that tried
        cause = str(e).strip().splitlines()[-1:] or [type(e).__name__]
        raise _refusal(f"vLLM {vllm.__version__} can't import its {family.architecture}: {cause[0]}") from e
    if found.is_attention_free:
        raise _refusal(f"{family.architecture} has no attention layers")


def takes_adapters(module: str, name: str) -> bool:
    """Whether vLLM's class `name` in `module` is one of those that it applies LoRA adapters to; see `_vllm_bases`."""
    return any(base == "SupportsLoRA" for base, _ in _vllm_bases(module, name))


def split_in_vllm(module: str, name: str) -> dict[str, list[str]]:
    """Layers that vLLM's class holds as one, and the names that an adapter must have for their parts."""
    for _, found in _vllm_bases(module, name):
        for statement in found.body if found else ():
            match statement:
                case ast.Assign(targets=[ast.Name(id="packed_modules_mapping")], value=ast.Dict() as value):
                    return dict(ast.literal_eval(value))
    return {}


@functools.cache
def _vllm_bases(module: str, name: str) -> tuple[tuple[str, ast.ClassDef | None], ...]:
    """A class of vLLM and its bases, depth first; outside vLLM their names alone. Each source is read once.

    Read from the sources: to import a model's module may take memory of the first GPU, and a process of its own takes
    as long as `inspect_model_cls`, which does not tell. *Not covered:* bases that are no plain names.
    """
    import vllm

    top, *path = module.split(".")
    folder = Path(vllm.__file__).parent.joinpath(*path)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if top != "vllm" or not file.is_file():
        return ((name, None),)
    package = module if folder.is_dir() else module.rpartition(".")[0]
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [_vllm_bases(module, base.id) for base in node.bases if isinstance(base, ast.Name)]
            return ((name, node), *itertools.chain.from_iterable(bases))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    return _vllm_bases(source, alias.name)
    return ((name, None),)


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def short_targets(model: Any, targets: list[str]) -> list[str]:
    """Last names, such as `q_proj`, that mean the same layers to PEFT where there are such; else the full names."""
    short = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(targets) else targets


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"model.name: {path}: {e.strerror or e}; expected a model's folder with its config.json") from e
    except ValueError as e:
        raise UserError(f"model.name: {path}: not JSON: {e}") from e
    if not isinstance(raw, dict):
        raise UserError(f"model.name: {path}: expected an object")
    return raw


def _quantised(raw: Mapping[str, Any]) -> str:
    """How the weights are quantised, in the words of config.json or of a part of it; empty where they are not."""
    for key in ("quantization_config", "compression_config"):
        if found := raw.get(key):
            return (
                str(found.get("quant_method") or "in a way it does not name") if isinstance(found, dict) else str(found)
            )
    return next((method for part in raw.values() if isinstance(part, dict) and (method := _quantised(part))), "")


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _max_length(config: Any) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # The others leave the scaled length in max_position_embeddings, or (dynamic) vLLM has no positions beyond it.
    if rope.get("rope_type") == "linear":
        return int(length * (rope.get("factor") or 1))
    return length


def _refusal(why: str) -> UserError:
    return UserError(f"model.name: this model can't be trained here: {why}")
