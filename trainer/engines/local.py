"""vLLM's AsyncLLM in the run's own process: `engine: {type: local}`."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.errors import PublishError, WorldError
from envs.limits.threads import THREADS
from trainer.config import EngineConfig, ModelConfig, RunConfig, check_publish, depends_on_the_machine, publishes_merged
from trainer.engines.arguments import (
    check_cache,
    check_engine,
    check_vllm,
    engine_arguments,
    engine_environment,
    seeds_requests,
    shared_memory_is_short,
)
from trainer.engines.engine import PROBE_VERSION, Completion, EngineStart, Sampling, version_name
from trainer.models.machines import has_gpu, release_memory
from trainer.templates.grammar import first_constrained

_LATEST_CHILD_S = 30.0
"""How long vLLM may take to have its processes."""
_FAILS_WITHIN_S = 3.0


class VllmEngine:
    """vLLM's continuous batching over all live episodes.

    Every request carries the policy version as its cache salt, so that no prefix-cache entry of one version can
    serve another; in adapter mode the adapter's name (`policy-v{N}`) does the same once more.
    """

    runs_here = True

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._merged: bool | None = None
        self._version = 0
        self._lora: Any = None
        self._loras: dict[int, Any] = {}
        """By version, the newest last."""
        self._num_versions = 1
        self._request_ids = itertools.count()
        self._live_requests = Counter[str]()
        """By what they are sampled with."""
        # Of the start.
        self._llm: Any = None
        self._model = ModelConfig()
        self._seeded = False
        self._stop_token_ids: list[int] = []

    def check_run(self, config: RunConfig) -> None:
        # Loading torch, to know of the machine, takes seconds: most mistakes are told without.
        if not depends_on_the_machine(config) and self._config.sleep == "none" and not shared_memory_is_short():
            return
        on_cpu = not has_gpu()
        check_engine(self._config, on_cpu=on_cpu)
        check_vllm(self._config)
        check_publish(config, on_cpu=on_cpu)

    def check_model(self, config: RunConfig, folder: Path, *, trains: bool) -> None:
        from trainer.models.family import check_served, read_family, weights_dtype

        on_cpu = not has_gpu()
        family = read_family(folder, config.model.lora)
        check_served(family, self._config, dtype=weights_dtype(config.model, on_cpu=on_cpu), on_cpu=on_cpu)
        if on_cpu and trains:
            check_cache(config, self._config, folder)

    @property
    def publishes_merged(self) -> bool:
        return publishes_merged(self._config, on_cpu=not has_gpu()) if self._merged is None else self._merged

    @property
    def keeps_versions(self) -> bool:
        return not self.publishes_merged

    async def start(self, given: EngineStart) -> None:
        """Start the engine's processes and load the base model."""
        on_cpu = given.device == "cpu"
        check_engine(self._config, on_cpu=on_cpu)
        check_vllm(self._config)
        with engine_environment(self._config, device=given.device, local_rank=given.local_rank):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = engine_arguments(
                given.model_path,
                model=given.model,
                engine=self._config,
                max_model_len=given.max_model_len,
                device=given.device,
                seed=given.seed,
                num_versions=given.num_versions,
            )
            self._llm = await _started(AsyncLLM.from_engine_args, AsyncEngineArgs(**arguments))
        self._merged = not arguments["enable_lora"]
        self._num_versions = given.num_versions
        self._model = given.model
        self._seeded = seeds_requests(self._config, on_cpu=on_cpu)
        self._stop_token_ids = list(given.stop_token_ids)

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
        version = self._version if sampling.version is None else sampling.version
        output = (await self._request(prompt_ids, params, version=version)).outputs[0]
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
        output = await self._request(token_ids, params, version=self._version)
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
        output = await self._request(prompt_ids, params, version=None)
        return list(output.outputs[0].token_ids)

    async def publish(self, weights: Path, version: int) -> None:
        keeps = not self._merged and self._num_versions > 1
        # The oldest makes room, and nobody may need it any more; where one is served alone that is whatever runs.
        oldest = [version_name(v) for v in list(self._loras)[: max(0, len(self._loras) + 1 - self._num_versions)]]
        live = sum(self._live_requests[name] for name in oldest) if keeps else self._live_requests.total()
        if live:
            raise PublishError(f"publish of {version_name(version)} while {live} requests are running")
        if self._merged:
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        else:
            await self._load_adapter(weights, version)
        # Names and salts keep versions apart already; the cache of one that is still served is of use.
        if not keeps and not await self._llm.reset_prefix_cache():
            raise PublishError(f"vLLM kept its prefix cache when {version_name(version)} was published")
        self._version = version

    async def _load_adapter(self, weights: Path, version: int) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        while len(self._loras) >= self._num_versions:
            oldest = next(iter(self._loras))
            await self._llm.remove_lora(self._loras.pop(oldest).lora_int_id)
        self._lora = LoRARequest(version_name(version), version - PROBE_VERSION + 1, str(weights))
        self._loras[version] = self._lora
        try:
            loaded = await self._llm.add_lora(self._lora)
        except EngineDeadError:
            raise
        except Exception as e:  # vLLM's process says in a plain one what it could not load
            raise PublishError(f"vLLM did not load the adapter {version_name(version)}: {e}") from e
        if not loaded:
            raise PublishError(f"vLLM did not load the adapter {version_name(version)} from {weights}")

    async def sleep(self) -> None:
        if self._config.sleep == "none":
            return
        assert not self._live_requests.total(), f"asleep while {self._live_requests.total()} requests are running"
        if self._config.sleep == "weights":
            # Weights and the adapter's buffers go to the machine's memory, the cache is dropped.
            await self._llm.sleep(level=1)
        else:
            # Level 0 stops the scheduler, without which vLLM keeps the cache.
            await self._llm.sleep(level=0)
            await self._llm.release_kv_cache_memory()

    async def wake_up(self) -> None:
        if self._config.sleep != "none":
            release_memory()
            # By name: vLLM would map anew what never went to sleep.
            await self._llm.wake_up(["kv_cache"] if self._config.sleep == "kv" else ["weights", "kv_cache"])

    async def _request(self, prompt_ids: Sequence[int], params: Any, *, version: int | None) -> Any:
        """Under a policy version that is served; None: the base model."""
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineGenerateError

        params.output_kind = RequestOutputKind.FINAL_ONLY
        name = "base" if version is None else version_name(version)
        prompt = {"prompt_token_ids": list(prompt_ids), "cache_salt": name}
        self._live_requests[name] += 1
        try:
            adapter = None if version is None else self._lora if version == self._version else self._loras[version]
            number = str(next(self._request_ids))
            how = self._reasoning(base=version is None) if params.structured_outputs else {}
            stream = self._llm.generate(prompt, params, number, lora_request=adapter, **how)
            (output,) = [output async for output in stream]
            return output
        except EngineGenerateError as e:
            raise WorldError(f"vLLM failed a request: {e}") from e
        finally:
            self._live_requests[name] -= 1

    def shutdown(self) -> None:
        """End the engine's processes. May be called twice."""
        if self._llm is not None:
            self._llm.shutdown()
            # vLLM keeps references until the interpreter ends, where AsyncLLM's finalizer finds its modules gone and
            # prints a traceback. It has nothing left to do.
            self._llm.__class__ = type("EndedLLM", (type(self._llm),), {"__del__": lambda ended: None})
            self._llm = None


async def _started(start: Callable[[Any], Any], arguments: Any) -> Any:
    """The `AsyncLLM` that `start` gives, off the loop's thread, where vLLM would swallow an interrupt
    (`zmq_socket_ctx`) and wait on. Whoever is cancelled, and be it by the loop's end, leaves no process of vLLM behind.
    """
    before = set(multiprocessing.active_children())
    started: list[Any] = []
    has_ended = threading.Event()

    def begin() -> Any:
        try:
            started.append(start(arguments))
            return started[0]
        finally:
            has_ended.set()

    try:
        return await THREADS.run("vLLM's start", begin)
    except asyncio.CancelledError:
        # Without its process it fails, or, a step further, waits for ever in its thread, which ends with ours.
        until = time.monotonic() + _LATEST_CHILD_S
        while not has_ended.is_set() and time.monotonic() < until:
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
                until = min(until, time.monotonic() + _FAILS_WITHIN_S)
            await asyncio.sleep(0.1)
        for llm in started:
            llm.shutdown()
        raise
