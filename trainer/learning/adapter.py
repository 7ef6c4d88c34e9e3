"""The model under training: a frozen base with LoRA weights in float32, and the files that an engine loads of it.

LoRA: Hu et al. 2021, arXiv:2106.09685. W' = W + (alpha / r) · B A, where only A and B are trained and B starts at 0.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from envs.errors import UserError
from trainer.config import LoraConfig, ModelConfig
from trainer.learning import head
from trainer.learning.base_model import load_base
from trainer.learning.head import Head
from trainer.learning.layers.gated import keep_less
from trainer.learning.layers.recomputed import keep_inputs
from trainer.learning.layers.rotations import hold_frequencies
from trainer.learning.packing.attention import reading_of
from trainer.learning.packing.rows import Microbatch
from trainer.models.family import lora_targets, model_class_of, short_targets
from trainer.runs.files import open_to_read

_ADAPTER = "default"
"""The policy's, under the name that PEFT gives to one alone."""
_PEFT_PREFIX = "base_model.model."


def load_model(
    model_path: str | Path, config: ModelConfig, *, device: torch.device, seed: int, max_length: int = 1
) -> Any:
    """The model at `model_path`, frozen, in the dtype of `weights_dtype`; its adapter changes nothing yet (B = 0).

    Its class is the one that its config.json names: a wrapper of vision around a text decoder is loaded whole, and its
    decoder adapted. It stays in evaluation mode, which draws no random numbers: the ratio between two passes over the
    same tokens must come from the weights alone. No row may have more than `max_length` tokens, see `layers.rotations`.
    Raises `UserError` for a model that can't be trained here, see `trainer.models.family`, and for weights that are
    damaged or not whole.
    """
    base = load_base(Path(model_path), config, device)
    model = _with_adapter(base, config.lora)
    _init_adapter(model, seed)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.forward = MethodType(_lora_forward, module)
    model.eval()
    hold_frequencies(base.get_decoder(), max_length)
    if config.gradient_checkpointing:
        keep_inputs(base.get_decoder())
    else:
        keep_less(base.get_decoder())
    return model


def _with_adapter(base: Any, lora: LoraConfig) -> Any:
    """The PEFT model; `base` is changed in place."""
    targets = lora_targets(base, lora)
    config = _peft_config(targets, r=lora.r, alpha=lora.alpha)
    with _no_fused_experts(base):
        model = get_peft_model(base, config)
    adapted = {name.removeprefix(_PEFT_PREFIX) for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert adapted == set(targets), f"PEFT adapted {sorted(adapted ^ set(targets))} otherwise than it was told"
    # PEFT keeps a set, whose order differs from process to process and would show in adapter_config.json.
    config.target_modules = short_targets(base, targets)
    return model


def _peft_config(targets: list[str], *, r: int, alpha: float) -> PeftLoraConfig:
    return PeftLoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets)


@contextlib.contextmanager
def _no_fused_experts(base: Any) -> Iterator[None]:
    """PEFT would take names that end as layers of experts once did (gate_proj) for the fused experts of today, and
    train those; it knows by the model's type where there are any.
    """
    model_type = base.config.model_type
    base.config.model_type = ""
    try:
        yield
    finally:
        base.config.model_type = model_type


def add_adapter(model: Any, name: str, lora: LoraConfig, *, seed: int) -> None:
    """Lay a second adapter, which changes nothing yet, over the same frozen layers. It works within `as_adapter`."""
    base = model.get_base_model()
    targets = [layer for layer, m in base.named_modules() if isinstance(m, LoraLinear)]
    with _no_fused_experts(base), torch.random.fork_rng():
        model.add_adapter(name, _peft_config(targets, r=lora.r, alpha=lora.alpha))
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(True)
    _init_adapter(model, seed, name)


@contextlib.contextmanager
def as_adapter(model: Any, name: str | None) -> Iterator[None]:
    """The adapter `name` in place of the policy's; None: the base alone. All learn still: after PEFT's own
    `disable_adapter` one alone does. A backward pass belongs inside, where activations are recomputed."""
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        layer._active_adapter = [] if name is None else [name]
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [_ADAPTER]


def _init_adapter(model: Any, seed: int, adapter: str = _ADAPTER) -> None:
    # Drawn on the CPU in the order of names, so that the start does not depend on the device or on the process.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapter_parameters(model, adapter).items()):
        initial = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        parameter.data = initial.to(parameter.device)


def trainable_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The policy's."""
    return {name: p for name, p in adapter_parameters(model, _ADAPTER).items() if p.requires_grad}


def adapter_parameters(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name and ".lora_" in name}


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + B A x with float32 A and B, computed in the base's dtype.

    PEFT's own forward casts x to float32 instead, for every adapted layer, and keeps that copy for the backward pass.
    """
    result: Tensor = self.base_layer(x, *args, **kwargs)
    if self.disable_adapters:
        return result
    for name in self.active_adapters:
        weight_a = self.lora_A[name].weight.to(x.dtype)
        weight_b = (self.lora_B[name].weight * self.scaling[name]).to(x.dtype)
        result = result + nn.functional.linear(nn.functional.linear(x, weight_a), weight_b)
    return result


def read_head(model: Any) -> Head:
    """How the model makes its logits, proved; see `head.read_head`. Raises `UserError` where it can't be supported."""
    base = model.get_base_model()
    module = base.get_output_embeddings()
    if isinstance(module, LoraLinear) or any(p.requires_grad for p in module.parameters()):
        raise UserError("model.lora.target_modules: the output head can't be adapted; leave `lm_head` out")
    token_ids_1T = torch.arange(1, 17, device=module.weight.device)[None] % module.weight.shape[0]
    with torch.no_grad():
        return head.read_head(base, _decoded(model, token_ids_1T), token_ids_1T)


def hidden_states(model: Any, microbatch: Microbatch) -> Tensor:
    """The decoder's last hidden states, (B, T, H), after the final norm."""
    if microbatch.tree is None:
        return _decoded(model, microbatch.token_ids_BT)
    return _decoded(
        model,
        microbatch.token_ids_BT,
        # One that is whole already, and that the tree's attention does not read: transformers makes no other then.
        attention_mask=torch.zeros(1, 1, 1, 1, device=microbatch.token_ids_BT.device),
        position_ids=microbatch.tree.depth_T[None],
        tree_reading=reading_of(microbatch.tree),
    )


def _decoded(model: Any, token_ids_BT: Tensor, **options: Any) -> Tensor:
    decoder = model.get_base_model().get_decoder()
    states: Tensor = decoder(input_ids=token_ids_BT, use_cache=False, **options).last_hidden_state
    return states


def adapter_state(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, under PEFT's names."""
    return {_in_file(name): p.detach().cpu().clone() for name, p in trainable_parameters(model).items()}


def load_adapter(model: Any, folder: Path, *, links: bool = False) -> None:
    """Load the adapter that `save_adapter` wrote. Raises `UserError` where it is damaged or does not fit.

    With `links` the file may be one, as in a hub's cache.
    """
    load_adapter_state(model, _own_names(model, _read_adapter(folder, links=links)))


def _read_adapter(folder: Path, *, links: bool) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    path = path.resolve() if links else path
    try:
        with open_to_read(path):
            state = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: is damaged: {e}") from e
    for name, tensor in state.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds what is no adapter's: whole numbers, NaN or infinite ones")
    return state


def check_adapter(folder: Path, model_path: Path, config: ModelConfig) -> None:
    """Raise `UserError` where `load_adapter` (with `links`) would, of the model at `model_path` without its weights."""
    model_class, model_config = model_class_of(model_path)
    with torch.device("meta"):
        model = _with_adapter(model_class(model_config), config.lora)
    _check_fits(model, _own_names(model, _read_adapter(folder, links=True)))


def _own_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = _names_in_file(model, _layers_in_checkpoint(model))
    own = {file: _in_file(name) for name, file in names.items()}
    return {own.get(file, file): tensor for file, tensor in state.items()}


def load_adapter_state(model: Any, state: dict[str, Tensor]) -> None:
    _check_fits(model, state)
    load_weights(model, state)


def _check_fits(model: Any, state: dict[str, Tensor]) -> None:
    expected = {_in_file(name): p.shape for name, p in trainable_parameters(model).items()}
    lacks, has_more = _layers(expected.keys() - state.keys()), _layers(state.keys() - expected.keys())
    where = "the adapter does not fit the model: other base, rank or target modules"
    if lacks or has_more:
        both = (("lacks", lacks), ("has besides", has_more))
        told = [f"it {what} {', '.join(names[:8])}" for what, names in both if names]
        raise UserError(f"{where} ({'; '.join(told)})")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(f"{where} ({name} is {tuple(state[name].shape)}, expected {tuple(shape)})")


def _layers(names: Iterable[str]) -> list[str]:
    """The last names of layers with these weights."""
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})


def load_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, under PEFT's names, into the adapter; what is not among them stays."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if (new := weights.get(_in_file(name))) is not None:
                parameter.copy_(new)


def random_changes(model: Any, *, size: float) -> dict[str, dict[str, Tensor]]:
    """For each kind of layer (`q_proj`, say) random B matrices under PEFT's names, the same in every process.

    They make the norm of each layer's (alpha / r) · B A about `size` times that of its base matrix.
    """
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, layer in sorted(model.named_modules()):
        if isinstance(layer, LoraLinear):
            matrix_a, matrix_b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            change = torch.randn(matrix_b.shape, generator=generator)
            norm = layer.scaling[_ADAPTER] * float(matrix_a.detach().norm()) * math.sqrt(len(change))
            change *= size * float(layer.base_layer.weight.detach().float().norm()) / max(norm, 1e-9)
            kinds.setdefault(name.rpartition(".")[2], {})[f"{name}.lora_B.weight"] = change
    return kinds


def _layers_in_checkpoint(model: Any) -> dict[str, str]:
    """What the base's layers are called in its checkpoint, by their names in transformers."""
    renamed = _checkpoint_names(model)
    return {name.removesuffix(".weight"): there.removesuffix(".weight") for name, there in renamed.items()}


def _names_in_file(model: Any, layers: dict[str, str]) -> dict[str, str]:
    """What the adapter's parameters are called in the file of `save_adapter`, by their own names."""
    names = {}
    for name in trainable_parameters(model):
        layer, _, rest = name.removeprefix(_PEFT_PREFIX).partition(".lora_")
        names[name] = _in_file(f"{_PEFT_PREFIX}{layers[layer]}.lora_{rest}")
    return names


def _in_file(name: str) -> str:
    return name.replace(f".{_ADAPTER}.", ".")


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT and vLLM's `LoRARequest` read it: adapter_model.safetensors, adapter_config.json.

    Layers go by the names of the base's checkpoint, which vLLM renames for the weights and the adapter alike. Where
    transformers holds the model under others (wrappers of vision), PEFT finds none of them.
    """
    layers, parameters = _layers_in_checkpoint(model), trainable_parameters(model)
    names = _names_in_file(model, layers).items()
    tensors = {file: parameters[name].detach().cpu().contiguous() for name, file in names}
    config = copy.copy(model.peft_config[_ADAPTER])
    config.target_modules = sorted({layers.get(name, name) for name in config.target_modules})
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def save_merged(model: Any, folder: Path, *, model_path: str | Path) -> None:
    """Write base + adapter as `model.safetensors`, under the names of the base's checkpoint, in the base's dtype.

    For vLLM's `reload_weights`, which leaves a layer alone that the file does not name: experts that transformers
    holds fused, and the checkpoint apart, are left out. Each adapted matrix is computed in float32 from the frozen base
    and the adapter and rounded once, into a copy: merging in place and taking it out again would round the base at
    every publish. No config and no tokenizer are written; the engine has them.
    """
    tensors: dict[str, Tensor] = {}
    renamed = _checkpoint_names(model)
    there = _names_in(Path(model_path)) or set(renamed.values())
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor, layer in _base_tensors(model):
            if renamed.get(name) not in there:
                if layer is not None:
                    raise UserError(
                        f"engine.publish: merged weights do not work for this model, whose checkpoint has no {name!r}; "
                        "set it to lora"
                    )
                continue
            if tensor.data_ptr() in seen:
                continue  # the second name of tied weights is not in the file
            seen.add(tensor.data_ptr())
            if layer is not None:
                tensor = (tensor.float() + layer.get_delta_weight(_ADAPTER)).to(tensor.dtype)
            # Off the GPU one by one: a copy of the whole base would not fit beside it.
            tensors[renamed[name]] = tensor.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def merged_model(model: Any, dtype: torch.dtype) -> Any:
    """transformers' own model in `dtype` with the adapter merged in; `model` is used up.

    Each adapted matrix is computed as in `save_merged`; whatever else the base holds is converted.
    """
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, LoraLinear)]:
            weight = layer.base_layer.weight
            weight.data = (weight.float() + layer.get_delta_weight(_ADAPTER)).to(dtype)
    return model.unload().to(dtype)


def published_bytes(model: Any, *, merged: bool) -> int:
    """Of the weights in the file that `save_merged` or `save_adapter` writes."""
    if merged:
        # The second name of tied weights is not in the file.
        return sum({t.data_ptr(): t.numel() * t.element_size() for _, t, _ in _base_tensors(model)}.values())
    return sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())


def _base_tensors(model: Any) -> Iterator[tuple[str, Tensor, LoraLinear | None]]:
    """Every tensor of the base model under its name in transformers, and the layer with the adapter on it, if any."""
    layers = {f"{name}.base_layer.weight": m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            yield name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."), tensor, layers.get(name)


def _checkpoint_names(model: Any) -> dict[str, str]:
    """What the base's tensors are called in its checkpoint, by their names in transformers.

    Without those that transformers puts together of several in the checkpoint, or takes apart.
    """
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor, _ in _base_tensors(model)}
    names = {id(tensor): name for name, tensor in empty.items()}
    reverted = revert_weight_conversion(model.get_base_model(), empty)
    return {names[id(tensor)]: there for there, tensor in reverted.items() if id(tensor) in names}


def _names_in(folder: Path) -> set[str]:
    """Of the tensors of a safetensors checkpoint; empty for one of another format."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return set()
