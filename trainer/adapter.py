"""The model under training: a frozen base with LoRA weights in float32, and the files that an engine loads of it.

LoRA: Hu et al. 2021, arXiv:2106.09685. W' = W + (alpha / r) · B A, where only A and B are trained and B starts at 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from envs.errors import UserError
from trainer import head
from trainer.config import ModelConfig
from trainer.head import Head

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."


def load_model(model_path: str | Path, config: ModelConfig, *, device: torch.device, seed: int) -> Any:
    """The causal LM at `model_path` in `config.dtype`, frozen, with an adapter that changes nothing yet (B = 0).

    Dropout is off: the ratio between two passes over the same tokens must come from the weights alone.
    """
    base = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=getattr(torch, config.dtype), device_map={"": device} if device.type != "cpu" else None
    )
    lora = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        target_modules=config.lora.target_modules,
        base_model_name_or_path=str(model_path),
    )
    model = get_peft_model(base, lora)
    resolved = model.peft_config[_ADAPTER]
    if not isinstance(resolved.target_modules, str):
        # PEFT keeps a set, whose order differs from process to process and would show in adapter_config.json.
        resolved.target_modules = sorted(resolved.target_modules)
    _init_adapter(model, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if isinstance(module, LoraLinear):
            module.forward = MethodType(_lora_forward, module)
    model.eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def _init_adapter(model: Any, seed: int) -> None:
    # Drawn on the CPU in the order of names, so that the start does not depend on the device or on the process.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(trainable_parameters(model).items()):
        initial = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        parameter.data = initial.to(parameter.device)


def trainable_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
        return head.read_head(base, hidden_states(model, token_ids_1T), token_ids_1T)


def hidden_states(model: Any, token_ids_BT: Tensor) -> Tensor:
    """The decoder's last hidden states, (B, T, H), after the final norm."""
    decoder = model.get_base_model().get_decoder()
    states: Tensor = decoder(input_ids=token_ids_BT, use_cache=False).last_hidden_state
    return states


def adapter_state(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, under PEFT's names."""
    return {name: t.detach().cpu().clone() for name, t in get_peft_model_state_dict(model).items()}


def load_adapter_state(model: Any, state: dict[str, Tensor]) -> None:
    expected = {name: t.shape for name, t in get_peft_model_state_dict(model).items()}
    if expected != {name: t.shape for name, t in state.items()}:
        raise UserError("the checkpoint's adapter does not fit the model: other base, rank or target modules")
    set_peft_model_state_dict(model, state)


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT and vLLM's `LoRARequest` read it: adapter_model.safetensors, adapter_config.json."""
    model.save_pretrained(folder, save_embedding_layers=False)


def save_merged(model: Any, folder: Path, *, model_path: str | Path) -> None:
    """Write base + adapter as `model.safetensors`, under the names of the base's checkpoint, in the base's dtype.

    For vLLM's `reload_weights`. Each adapted matrix is computed in float32 from the frozen base and the adapter and
    rounded once, into a copy: merging in place and taking it out again would round the base at every publish.
    No config and no tokenizer are written; the engine has them.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    deltas = {f"{name}.base_layer.weight": m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".lora_" in name or tensor.data_ptr() in seen:
                continue  # the second name of tied weights is not in the file
            seen.add(tensor.data_ptr())
            layer = deltas.get(name)
            if layer is not None:
                tensor = (tensor.float() + layer.get_delta_weight(_ADAPTER)).to(tensor.dtype)
            tensors[name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")] = tensor.contiguous()
    unknown = tensors.keys() - (_checkpoint_names(Path(model_path)) or tensors.keys())
    if unknown:
        raise UserError(
            f"engine.publish: merged weights do not work for this model, whose checkpoint has no {min(unknown)!r}; "
            "set it to lora"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _checkpoint_names(folder: Path) -> set[str]:
    # transformers may hold a model under other names than its checkpoint does (fused experts, for one).
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return set()
