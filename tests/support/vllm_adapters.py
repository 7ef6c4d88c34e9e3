"""Loads adapters into vLLM's own models, in this process and without an engine: nothing is computed.

`python vllm_adapters.py MODEL ADAPTER [MODEL ADAPTER ...]` prints one line of JSON a pair: the layers of vLLM's model
that took weights of the adapter, those of the text decoder that took none, or why it failed.
A model whose layers vLLM can't run here (experts beside an adapter, on a CPU) can be loaded all the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def load(model: Path, adapter: Path) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    from trainer.config import EngineConfig, LoraConfig, ModelConfig
    from trainer.engines.arguments import engine_arguments

    written = json.loads((adapter / "adapter_config.json").read_text())
    config = ModelConfig(
        name=str(model), dtype="bfloat16", lora=LoraConfig(r=written["r"], alpha=written["lora_alpha"])
    )
    arguments = engine_arguments(
        model, model=config, engine=EngineConfig(publish="lora", max_num_seqs=4), max_model_len=256, device="cpu"
    )
    vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    with set_current_vllm_config(vllm_config):
        _join_alone()
        torch.set_default_dtype(torch.bfloat16)
        own = initialize_model(vllm_config)
        torch.set_default_dtype(torch.float32)
        manager = WorkerLoRAManager(vllm_config, torch.device("cpu"), own.embedding_modules)
        manager.create_lora_manager(own, vllm_config)
        assert manager.add_adapter(LoRARequest("probe", 1, str(adapter)))
        inner = manager._adapter_manager
        inner.activate_adapter(1)
    took, left = [], []
    for name, module in inner.modules.items():
        if name.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            continue
        stacked = module.lora_b_stacked if hasattr(module, "lora_b_stacked") else module.w13_lora_b_stacked
        (took if all(bool(part.any()) for part in stacked) else left).append(name)
    return {"took": sorted(took), "left": sorted(left)}


def _join_alone() -> None:
    import torch
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, "file:///tmp/" + os.urandom(8).hex(), 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)


if __name__ == "__main__":
    import traceback

    for model, adapter in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            print(json.dumps(load(Path(model), Path(adapter))), flush=True)
        except Exception as e:
            traceback.print_exc()
            print(json.dumps({"error": f"{type(e).__name__}: {e}"}), flush=True)
