"""Settings of the base model and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from envs.settings import JsonObject, Settings


class LoraConfig(Settings):
    """The trainable adapter (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=512, description="rank")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / r")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="module names to adapt, or all-linear"
    )
    start_from: Path | None = Field(
        None,
        description="what it begins as: the folder of a run (its last adapter), or of a PEFT adapter for the same base "
        "with the same rank and modules; null: no change of the base at all",
    )


Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


class ModelConfig(Settings):
    """The base model and how its text is rendered and parsed."""

    name: str = Field("smollm2-135m-instruct", description="embedded default, Hugging Face id or local folder")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="of the frozen base weights; auto: bfloat16, or float32 on a CPU that has no instructions for it, "
        "where bfloat16 took 25 times as long (measured on AVX2)",
    )
    lora: LoraConfig = Field(LoraConfig(), description="the trainable adapter")
    chat_template: str = Field(
        "auto",
        description="auto: the model's own, or a fallback in its turn markers where it knows no tools; training: the "
        "one that trl trains such models under, which keeps earlier turns as they were; or a Jinja file",
    )
    chat_template_kwargs: JsonObject = Field({}, description="passed to the template, e.g. enable_thinking")
    tool_parser: str = Field("hermes", description="as `vllm serve --tool-call-parser` names it")
    reasoning_parser: str | None = Field(None, description="as `vllm serve --reasoning-parser` names it")
    attn_implementation: Attention = Field(
        "auto",
        description="the trainer's attention; auto: what transformers takes for the model; flash_attention_2 or _3 "
        "where that is eager or needs a mask of all pairs (gpt-oss, sliding windows): a package of its own, 16 bits, "
        "a GPU",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
