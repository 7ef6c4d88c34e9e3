"""Tiny random models of the families that both transformers and vLLM have, and their way through the real engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from trainer.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from trainer.engines.canary import Canary
from trainer.engines.engine import EngineStart
from trainer.engines.publish import Publisher
from trainer.learning import adapter as lora

VOCABULARY = 2048
"""As the fixture `tiny_model` cuts the default model's tokenizer."""


def _text(config_class: Any, **values: Any) -> Any:
    """A text decoder of two narrow layers whose log-probabilities vary."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return config_class(**common | values)


def _wrapped(config_class: Any, text: Any, **vision: Any) -> Any:
    small = {"hidden_size": 64, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    return config_class(text_config=text.to_dict(), vision_config=small | vision)


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    # vLLM's kernels for a CPU know this size alone.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_LATENT = {
    # vLLM's kernels know these two sizes alone.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    # transformers turns as many dimensions as this says, not as qk_rope_head_dim does.
    "head_dim": 64,
}
_T = transformers


def _qwen3_5(**text: Any) -> Any:
    return _wrapped(
        _T.Qwen3_5Config,
        _text(_T.Qwen3_5TextConfig, **_LINEAR_ATTENTION, **text),
        depth=1,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=16,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _text(_T.LlamaConfig),
    "qwen2": lambda: _text(_T.Qwen2Config),
    "qwen3": lambda: _text(_T.Qwen3Config, tie_word_embeddings=True),
    "qwen3-moe": lambda: _text(_T.Qwen3MoeConfig, num_experts=4, mlp_only_layers=[0], **_EXPERTS),
    "qwen2-moe": lambda: _text(_T.Qwen2MoeConfig, num_experts=4, shared_expert_intermediate_size=32, **_EXPERTS),
    "qwen3-next": lambda: _text(
        _T.Qwen3NextConfig, num_experts=4, shared_expert_intermediate_size=32, **_EXPERTS, **_LINEAR_ATTENTION
    ),
    "qwen3.5": _qwen3_5,
    "gemma2": lambda: _text(_T.Gemma2Config, tie_word_embeddings=True, final_logit_softcapping=3.0),
    "gemma3": lambda: _text(_T.Gemma3TextConfig, tie_word_embeddings=True),
    "gemma3-vision": lambda: _wrapped(
        _T.Gemma3Config, _text(_T.Gemma3TextConfig), num_hidden_layers=1, num_attention_heads=2
    ),
    "mistral": lambda: _text(_T.MistralConfig),
    "mistral3": lambda: _wrapped(
        _T.Mistral3Config,
        _text(_T.MistralConfig),
        model_type="pixtral",
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=32,
    ),
    "mixtral": lambda: _text(_T.MixtralConfig, num_local_experts=4),
    # vLLM takes the width of the feed-forward layers for four times the hidden size, as it is in Phi 1 to 2.
    "phi": lambda: _text(_T.PhiConfig, num_key_value_heads=2, intermediate_size=256),
    "phi3": lambda: _text(_T.Phi3Config),
    "glm4": lambda: _text(_T.Glm4Config),
    "glm4-moe": lambda: _text(
        _T.Glm4MoeConfig,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **_EXPERTS,
    ),
    "gpt-oss": lambda: _text(_T.GptOssConfig, num_local_experts=4, num_experts_per_tok=2),
    "granite": lambda: _text(
        _T.GraniteConfig,
        logits_scaling=2.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "cohere2": lambda: _text(_T.Cohere2Config, logit_scale=0.5, tie_word_embeddings=True),
    "olmo2": lambda: _text(_T.Olmo2Config),
    "smollm3": lambda: _text(_T.SmolLM3Config),
    "deepseek-v2": lambda: _text(
        _T.DeepseekV2Config,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        # As in DeepSeek V2 Lite; the other one's rotary embedding is the plain one, as in Moonlight.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        **_EXPERTS,
        **_LATENT,
    ),
    "deepseek-v3": lambda: _text(
        _T.DeepseekV3Config,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        # transformers has this way alone and reads neither; real checkpoints name it, and vLLM does otherwise without.
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **_EXPERTS,
        **_LATENT,
    ),
    "qwen2.5-vl": lambda: _wrapped(
        _T.Qwen2_5_VLConfig,
        _text(
            _T.Qwen2_5_VLTextConfig,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        ),
        depth=1,
        num_heads=2,
        out_hidden_size=64,
    ),
}


DTYPES = {"qwen3-next": "bfloat16", "qwen3.5": "bfloat16"}
"""float32 where nothing is said; vLLM's linear attention runs on a CPU in bfloat16 alone."""


PROCESSORS = {
    "qwen2.5-vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}
"""What vLLM reads of a wrapper's pictures, even where it is given none."""


def class_of(config: Any) -> Any:
    """transformers' class of a model that writes text."""
    auto = _T.AutoModelForImageTextToText if config is not config.get_text_config() else _T.AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def build(name: str, folder: Path, tokenizer: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of the family `name` with random weights, as `save_pretrained` writes it, and a tokenizer."""
    config = CONFIGS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = class_of(config)(config).to(dtype)
        # Biases and the parameters of recurrent layers start at constants that hide what reads them wrongly.
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if name in PROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "generation")):
            shutil.copy(file, folder)
    return folder


ADAPTED: dict[str, LoraConfig] = {
    "glm4": LoraConfig(r=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
}
"""Where vLLM does not take adapters on all linear layers; the merged weights are of all."""


def adapted(name: str, publish: str) -> LoraConfig:
    whole = LoraConfig(r=4, alpha=8)
    return ADAPTED.get(name, whole) if publish == "lora" else whole


CANARIES = [list(range(20 + 100 * i, 120 + 100 * i)) for i in range(4)]


def take_through_engine(
    model: Path, publish: Literal["lora", "merged"], *, lora: LoraConfig, dtype: str = "float32", scratch: Path
) -> dict[str, float]:
    """Start the engine on `model`, publish two updates and prove each; the figures of the last proof."""
    from accelerate import Accelerator

    from trainer.engines.local import VllmEngine
    from trainer.learning.policy import Policy

    config = ModelConfig(name=str(model), dtype=dtype, lora=lora)  # type: ignore[arg-type]
    engine_config = EngineConfig(publish=publish, enforce_eager=True, kv_cache_gib=1, max_num_seqs=4)
    given = EngineStart(model_path=model, model=config, max_model_len=256, stop_token_ids=[2], device="cpu")
    engine = VllmEngine(engine_config)
    with asyncio.Runner() as loop:
        loop.run(engine.start(given))
        try:
            policy = Policy(model, config, OptimConfig(), Accelerator(cpu=True), 0)
            publisher = Publisher(policy, engine, Canary(CANARIES, tolerance=0.15), scratch)
            figures = loop.run(publisher.note_base())
            figures |= {f"probe/{kind}": share for kind, share in loop.run(publisher.probe()).items()}
            figures |= loop.run(publisher.publish())
            for seed in range(2):
                move(policy, size=0.05, seed=seed)
                figures |= loop.run(publisher.publish())
        finally:
            engine.shutdown()
    return figures


def move(policy: Any, *, size: float, seed: int) -> None:
    """As a training step would: the adapter moves, the version counts on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy._parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    policy.num_updates += 1


EXPERTS = {"qwen3-moe", "qwen2-moe", "qwen3-next", "mixtral", "glm4-moe", "gpt-oss", "deepseek-v2", "deepseek-v3"}


def config_alone(folder: Path, name: str = "llama", **changes: object) -> Path:
    """A folder that holds a config.json and no weights; a change to None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]()
    config.architectures = [class_of(config).__name__]
    config.save_pretrained(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in changes or value is not None}))
    return folder


def random_adapter(name: str, folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """A model of the family and an adapter in which every layer changes something."""
    model_path = build(name, folder / name, tokenizer)
    fits = adapted(name, "lora").model_copy(update={"r": 12})
    config = ModelConfig(name=str(model_path), lora=fits)
    model = lora.load_model(model_path, config, device=torch.device("cpu"), seed=0)
    for changes in lora.random_changes(model, size=0.1).values():
        lora.load_weights(model, changes)
    lora.save_adapter(model, folder / f"{name}-adapter")
    return model_path, folder / f"{name}-adapter"


def load_into_vllm(names: list[str], folder: Path, tokenizer: Path) -> dict[str, dict[str, list[str]]]:
    """For each family what `vllm_adapters.py` says of a random adapter."""
    paths = [path for name in names for path in random_adapter(name, folder, tokenizer)]
    script = Path(__file__).with_name("vllm_adapters.py")
    done = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, timeout=500, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(names), done.stderr[-2000:]
    return dict(zip(names, lines, strict=True))
