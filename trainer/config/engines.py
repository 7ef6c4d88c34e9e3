"""Settings of what samples the tokens, and the register of the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from envs.settings import Kwargs, Settings, by_type
from envs.user_code import TARGET_PATTERN

Sleep = Literal["none", "kv", "weights"]


class EngineSettings(Settings):
    """What every engine has: so much to do at once, an end to waiting, and the proof that it runs the policy."""

    type: str
    max_num_seqs: int = Field(64, ge=1, description="sequences decoded at once")
    hung_after_s: float = Field(
        3600,
        gt=0,
        description="the run stops when the engine, asked for something, has answered nothing for so long, seconds; "
        "more than its longest turn takes",
    )
    canary_mean_tolerance: float = Field(
        0.15, gt=0, description="largest mean |difference| in log-probability between engine and trainer, nats a token"
    )


class EngineConfig(EngineSettings):
    """The run's own vLLM, one engine for each of its processes."""

    type: Literal["local"] = "local"
    publish: Literal["auto", "lora", "merged"] = Field(
        "auto", description="how new weights reach the engine; auto: lora on a GPU, merged on a CPU (measured faster)"
    )
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="share of GPU memory for the engine")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="KV cache, GiB; null: 2 on a CPU, on a GPU what gpu_memory_utilization leaves beside the weights. "
        "Where it is given gpu_memory_utilization does not count: so several runs share a GPU, whose engines would "
        "else take each other's memory for their own when they measure it",
    )
    sleep: Sleep = Field(
        "none",
        description="what the engine leaves to the trainer of a GPU's memory while it trains; kv: the KV cache, "
        "weights: its weights, too, which wait in the machine's memory; gpu_memory_utilization may be larger then",
    )
    seeded_requests: bool | Literal["auto"] = Field(
        "auto",
        description="seed every request, so that a run samples the same tokens again; auto: on a GPU, where it costs "
        "nothing; on a CPU drawing them so took 60 % of the engine's time (measured)",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: the engine quantises the base's linear weights as it loads them, half their memory; the "
        "trainer and the adapter keep 16 bits, loss.tis_cap corrects for the difference, and canary_mean_tolerance "
        "may have to rise",
    )
    enforce_eager: bool = Field(False, description="no compilation or CUDA graphs")


class CustomEngineConfig(EngineSettings):
    """Your own engine, a client of a server of yours say: what `trainer.engines.engine.Engine` describes."""

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`")
    kwargs: Kwargs = Field({}, description="the class or factory is called with them, before the run")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a `type` stands for."""

    settings: type[EngineSettings]
    engine: str
    """Where it stands, as `module:name` below `trainer.engines`; called with the settings."""


ENGINES = {
    "local": Entry(EngineConfig, "local:VllmEngine"),
    "custom": Entry(CustomEngineConfig, "custom:CustomEngine"),
}
"""The engines, by the `type` that a config names: one line each."""

if TYPE_CHECKING:
    AnyEngineConfig = EngineSettings
else:
    AnyEngineConfig = by_type({name: entry.settings for name, entry in ENGINES.items()}, without_type="local")


def cpu_cache_gib(engine: EngineConfig) -> float:
    """The KV cache on a CPU."""
    return 2.0 if engine.kv_cache_gib is None else engine.kv_cache_gib


def publishes_merged(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """Whether new weights reach the engine merged into the base, not as an adapter beside it."""
    return engine.publish == "merged" or (engine.publish == "auto" and on_cpu)
