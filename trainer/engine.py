"""The rollout engine: token ids in, token ids and log-probabilities out, new weights in between.

`VllmEngine` runs vLLM's AsyncLLM in process. The tests' scripted engine has the same interface and is exact.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from envs.errors import PublishError, UserError, WorldError
from trainer.config import EngineConfig, ModelConfig
from trainer.grammar import first_constrained

_VLLM_QUANTIZATION = {"fp8": "fp8_per_block"}
"""vLLM's names for quantising 16-bit weights while they are loaded, here with one scale for 128 × 128 of them. Its own
`fp8` means a checkpoint that holds fp8 weights; of others vLLM 0.31 refuses it."""


def publishes_merged(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """Whether new weights reach the engine merged into the base, not as an adapter beside it."""
    return engine.publish == "merged" or (engine.publish == "auto" and on_cpu)


PROBE_VERSION = -1
"""The version of the weights that prove, before the first policy is published, that the engine takes all of them."""


def version_name(version: int) -> str:
    """The name of a policy version, unique in a run: the key of vLLM's caches, and of folders of weights."""
    return "probe" if version == PROBE_VERSION else f"policy-v{version}"


def check_engine(engine: EngineConfig, *, on_cpu: bool) -> None:
    """What depends on the machine and not on the config alone. Raises `UserError`."""
    if engine.quantization and publishes_merged(engine, on_cpu=on_cpu):
        raise UserError(
            f"engine.quantization: {engine.quantization} can't take merged weights, and engine.publish: "
            f"{engine.publish} means those on this machine, which has no GPU; leave it out "
            "(engine.quantization=null), or set engine.publish to lora"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine sampled for one turn."""

    token_ids: list[int]
    """Exactly as sampled, the stop token included."""
    logprobs: list[float]
    """Of each sampled token under the sampling distribution (after temperature), nats."""
    finished: bool
    """False when the turn was cut off at `max_tokens`."""
    policy_version: int
    """Updates that the weights had seen."""
    constrained_from: int | None = None
    """The first token that was sampled under the grammar of `Sampling.schema`; None where there is no schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one turn is sampled."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    schema: str | None = None
    """A JSON schema that the text after the reasoning fits: all other tokens are masked before the softmax, in
    sampling and in the log-probabilities."""


class Engine(Protocol):
    """Serves one policy version at a time to any number of concurrent requests."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Sample one turn. Raises `WorldError` when the request fails but the engine lives."""
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first given those before it, at temperature 1; length T - 1."""
        ...

    async def publish(self, weights: Path, version: int) -> None:
        """Serve `weights` (an adapter or merged weights, as `publishes_merged` says) from now on."""
        ...

    @property
    def publishes_merged(self) -> bool: ...

    def shutdown(self) -> None: ...


class VllmEngine:
    """vLLM's continuous batching over all live episodes. Create it with `await VllmEngine.start(...)`.

    Every request carries the policy version as its cache salt, so that no prefix-cache entry of one version can
    serve another; in adapter mode the adapter's name (`policy-v{N}`) does the same once more.
    """

    def __init__(
        self, llm: Any, *, merged: bool, seeded: bool, stop_token_ids: Sequence[int], model: ModelConfig
    ) -> None:
        self._llm = llm
        self._model = model
        self._seeded = seeded
        self._merged = merged
        self._stop_token_ids = list(stop_token_ids)
        self._version = 0
        self._lora: Any = None
        self._request_ids = itertools.count()
        self._live_requests = 0

    @classmethod
    async def start(
        cls,
        model_path: Path,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        max_model_len: int,
        stop_token_ids: Sequence[int],
        device: str,
        local_rank: int = 0,
        seed: int = 0,
    ) -> VllmEngine:
        """Start the engine's processes and load the base model. `device` is cpu or cuda."""
        check_engine(engine, on_cpu=device == "cpu")
        with _engine_environment(engine, device=device, local_rank=local_rank):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = engine_arguments(
                model_path, model=model, engine=engine, max_model_len=max_model_len, device=device, seed=seed
            )
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        return cls(
            llm,
            merged=not arguments["enable_lora"],
            seeded=engine.seeded_requests,
            stop_token_ids=stop_token_ids,
            model=model,
        )

    @property
    def publishes_merged(self) -> bool:
        return self._merged

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if self._seeded else None,
            logprobs=0,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
            structured_outputs=StructuredOutputsParams(json=sampling.schema) if sampling.schema else None,
        )
        version = self._version
        output = (await self._request(prompt_ids, params)).outputs[0]
        token_ids = list(output.token_ids)
        return Completion(
            token_ids=token_ids,
            constrained_from=self._constrained_from(prompt_ids, token_ids) if sampling.schema else None,
            logprobs=[entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs, strict=True)],
            finished=output.finish_reason == "stop",
            policy_version=version,
        )

    def _reasoning(self, *, base: bool) -> dict[str, Any]:
        """What tells vLLM where the reasoning ends, before which no grammar holds. The base as a judge does none."""
        if not self._model.reasoning_parser:
            return {}
        if base:
            return {"reasoning_ended": True}
        return {"reasoning_parser_kwargs": {"chat_template_kwargs": self._model.chat_template_kwargs}}

    def _constrained_from(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        if not self._model.reasoning_parser:
            return 0
        from vllm.reasoning import ReasoningParserManager

        parser = ReasoningParserManager.get_reasoning_parser(self._model.reasoning_parser)
        reasoner = parser(self._llm.get_tokenizer(), chat_template_kwargs=self._model.chat_template_kwargs)
        return first_constrained(reasoner, prompt_ids, token_ids)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        output = await self._request(token_ids, params)
        return [entry[t].logprob for t, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]

    async def generate_base(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        schema: Mapping[str, Any] | None,
    ) -> list[int]:
        """Tokens of the base model, the adapter off, whose text fits the JSON schema; the stop token included.

        Raises `WorldError` as `generate`, and for a prompt that leaves no room. Only where weights are published as an
        adapter.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        assert not self._merged, "the base model has been merged with the adapter"
        room = self._llm.vllm_config.model_config.max_model_len - len(prompt_ids)
        if room < 1:
            raise WorldError(
                f"a prompt of {len(prompt_ids)} tokens for the base model does not fit the engine, which is as long as "
                "an episode (rollout.max_episode_tokens)"
            )
        params = SamplingParams(
            max_tokens=min(max_tokens, room),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=dict(schema)),
        )
        output = await self._request(prompt_ids, params, base=True)
        return list(output.outputs[0].token_ids)

    async def publish(self, weights: Path, version: int) -> None:
        if self._live_requests:
            raise PublishError(f"publish of {version_name(version)} while {self._live_requests} requests are running")
        if self._merged:
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        else:
            from vllm.lora.request import LoRARequest
            from vllm.v1.engine.exceptions import EngineDeadError

            former, self._lora = (
                self._lora,
                LoRARequest(version_name(version), version - PROBE_VERSION + 1, str(weights)),
            )
            if former is not None:
                await self._llm.remove_lora(former.lora_int_id)
            try:
                loaded = await self._llm.add_lora(self._lora)
            except EngineDeadError:
                raise
            except Exception as e:  # vLLM's process says in a plain one what it could not load
                raise PublishError(f"vLLM did not load the adapter {version_name(version)}: {e}") from e
            if not loaded:
                raise PublishError(f"vLLM did not load the adapter {version_name(version)} from {weights}")
        if not await self._llm.reset_prefix_cache():
            raise PublishError(f"vLLM kept its prefix cache when {version_name(version)} was published")
        self._version = version

    async def _request(self, prompt_ids: Sequence[int], params: Any, *, base: bool = False) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineGenerateError

        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = {"prompt_token_ids": list(prompt_ids), "cache_salt": "base" if base else version_name(self._version)}
        self._live_requests += 1
        try:
            adapter = None if base else self._lora
            number = str(next(self._request_ids))
            how = self._reasoning(base=base) if params.structured_outputs else {}
            stream = self._llm.generate(prompt, params, number, lora_request=adapter, **how)
            (output,) = [output async for output in stream]
            return output
        except EngineGenerateError as e:
            raise WorldError(f"vLLM failed a request: {e}") from e
        finally:
            self._live_requests -= 1

    def shutdown(self) -> None:
        """End the engine's processes. May be called twice."""
        if self._llm is not None:
            self._llm.shutdown()
            # vLLM keeps references until the interpreter ends, where AsyncLLM's finalizer finds its modules gone and
            # prints a traceback. It has nothing left to do.
            self._llm.__class__ = type("EndedLLM", (type(self._llm),), {"__del__": lambda ended: None})
            self._llm = None


def engine_arguments(
    model_path: Path, *, model: ModelConfig, engine: EngineConfig, max_model_len: int, device: str, seed: int = 0
) -> dict[str, Any]:
    """What vLLM's engine is started with, as its `AsyncEngineArgs` name it."""
    from vllm.config import StructuredOutputsConfig

    from trainer.family import read_family, weights_dtype

    merged = publishes_merged(engine, on_cpu=device == "cpu")
    family = read_family(model_path, model.lora)
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": weights_dtype(model, on_cpu=device == "cpu"),
        "quantization": _VLLM_QUANTIZATION[engine.quantization] if engine.quantization else None,
        "max_model_len": max_model_len,
        "seed": seed,
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": True,
        "enable_lora": not merged,
        "max_lora_rank": lora_rank_bucket(model.lora.r),
        "max_loras": 1,
        # Log-probabilities of the distribution that was sampled from: the trainer divides by the same temperature.
        "logprobs_mode": "processed_logprobs",
        # The model's own sampling defaults must not change the policy that is trained.
        "generation_config": "vllm",
        # The trainer masks by xgrammar, too. A grammar begins where the reasoning ends, as in `vllm serve`.
        "structured_outputs_config": StructuredOutputsConfig(
            backend="xgrammar", reasoning_parser=model.reasoning_parser or ""
        ),
        "disable_log_stats": True,
    }
    if family.is_wrapper:
        arguments["language_model_only"] = True
    if not merged and family.has_experts:
        # Or vLLM gives every expert buffers for an adapter, which leaves the experts alone.
        arguments["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in family.targets})
    if device != "cpu":
        # As a server has it: agents read more than they write. An AsyncLLM made in process would get 2,048.
        arguments["max_num_batched_tokens"] = max(8192, engine.max_num_seqs)
    else:
        arguments |= {
            # On the CPU a seeded request that is prefilled in chunks crashes vLLM 0.31 ("CPU Generator does not use
            # offset"), so every prompt is prefilled whole there.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, max_model_len),
            # The default there, 128, is longer than most turns: nothing of a conversation would be found in the cache.
            "block_size": 32,
            # The state of recurrent layers is cached at the ends of chunks.
            "enable_prefix_caching": not family.is_recurrent,
        }
        if family.is_latent:
            # vLLM 0.31's rotary kernel for a CPU takes every head of latent attention's queries for a token: it turns
            # it by another's position, and reads and writes past the ends. vLLM's own code in torch is right.
            arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def lora_rank_bucket(r: int) -> int:
    """vLLM takes certain maximal ranks only; the smallest that holds `r`."""
    return next(b for b in (1, 8, 16, 32, 64, 128, 256, 320, 512) if b >= r)


@contextlib.contextmanager
def _engine_environment(engine: EngineConfig, *, device: str, local_rank: int) -> Iterator[None]:
    """The environment that vLLM's processes inherit; put back afterwards.

    The launcher's variables (RANK, WORLD_SIZE, ...) would make vLLM join the trainer's process group, so they are
    hidden; each rank's engine sees its own GPU only, or its share of the cores.
    """
    changes: dict[str, str | None] = {
        name: None
        for name in os.environ
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    changes["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    changes["VLLM_NO_USAGE_STATS"] = "1"
    if device == "cpu":
        changes["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(engine.kv_cache_gib)))
        # All cores that this process may use: by default vLLM leaves one idle, half of a small machine. Processes that
        # a launcher started together share them out, or their engines would wait for each other's threads.
        cores = sorted(os.sched_getaffinity(0))
        together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if together <= len(cores):
            cores = cores[local_rank::together]
        changes["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        changes["CUDA_VISIBLE_DEVICES"] = visible[local_rank] if visible != [""] else str(local_rank)
    former = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(former)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
