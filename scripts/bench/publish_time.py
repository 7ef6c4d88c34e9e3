"""Publishing merged weights against publishing an adapter, on this machine: what `engine.publish: auto` goes by.

    python scripts/bench/publish_time.py [--config FILE] [KEY=VALUE ...] [--run RUN] [--repeats 3]

For each way in turn an engine is started, the adapter moved a little before every publish (as a step would), and
`Publisher.publish` timed as a whole and in its parts: saving the weights, loading them into the engine (prefix cache
reset included), and the canary's scores by the engine and by the trainer. The first publish is a warm-up.

A publish happens once a step and generation fills it, so the tokens/s under each way weigh more: the config's rollouts
of one step, all at once, each generating one turn of `rollout.max_turn_tokens` from its task's first prompt, under the
weights just published and from an empty prefix cache.

`--run` takes the adapter (and, without `--config`, the config) of a run; by default it starts at nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from common import Figure, adapted_policy, bench_config, parser, ratio, report, run_main
from rollout_throughput import Call, generate, requests_of

from trainer.config import RunConfig
from trainer.engines.local import VllmEngine
from trainer.prepare import Prepared, prepare
from trainer.runs.manifest import adapter_of

Way = Literal["merged", "lora"]
_WAYS: tuple[Way, ...] = ("merged", "lora")
_MOVE = 0.01
"""Standard deviation of what is added to lora_B before each publish: enough for the canary to see."""


class PartTimes:
    """Adds up the seconds of methods that are called inside of a publish."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, target: object, method: str, part: str) -> None:
        """Replace a method of one object by itself with a clock around it."""
        inner: Callable[..., Any] = getattr(target, method)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        async def clocked_async(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return await inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(target, method, clocked_async if asyncio.iscoroutinefunction(inner) else clocked)


def move_adapter(policy: Any, seed: int) -> None:
    """As a training step would: the adapter changes, the version counts on."""
    import torch

    state = policy.state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["adapter"] = {
        name: value + _MOVE * torch.randn(value.shape, generator=generator) if "lora_B" in name else value
        for name, value in state["adapter"].items()
    }
    policy.load_state_dict(state | {"num_updates": policy.num_updates + 1})


def first_turns(prepared: Prepared) -> list[list[Call]]:
    """One turn of full length for each rollout of a step."""

    def prompt_ids(request: Any) -> list[int]:
        tools = prepared.world.make_env().tools
        names = tools if request.task.tools is None else request.task.tools
        return list(prepared.chat.open(list(request.task.messages), [tools[name].schema() for name in names]))

    num_tokens = prepared.config.rollout.max_turn_tokens
    return [
        [Call(prompt_ids=prompt_ids(request), num_tokens=num_tokens, seed=request.seed)]
        for request in requests_of(prepared, 0)
    ]


def measure_way(prepared: Prepared, way: Way, adapter: Path | None, repeats: int) -> list[dict[str, float]]:
    """Seconds of each part and tokens/s, one record a publish; the warm-up is left out."""
    from accelerate import Accelerator

    from trainer.engines.canary import Canary
    from trainer.engines.publish import Publisher
    from trainer.runs.scratch import Scratch
    from trainer.session import canary_ids, open_engine

    accelerator = Accelerator()
    policy = adapted_policy(prepared, accelerator, adapter)
    records: list[dict[str, float]] = []
    with asyncio.Runner() as loop:
        canary_rows = loop.run(canary_ids(prepared, name="bench-canary"))
        canary = Canary(canary_rows, tolerance=prepared.config.engine.canary_mean_tolerance)
        print(f"{way}: starting the engine", flush=True)
        engine = loop.run(open_engine(prepared, accelerator, None, first_step=0)).engine
        assert isinstance(engine, VllmEngine) and engine.publishes_merged == (way == "merged")
        try:
            with Scratch() as scratch:
                publisher = Publisher(policy, engine, canary, scratch.path)
                loop.run(publisher.note_base())
                parts = PartTimes()
                parts.watch(policy, "save_merged" if way == "merged" else "save_adapter", "save")
                parts.watch(engine, "publish", "engine load")
                parts.watch(canary, "score", "engine's canary")
                parts.watch(policy, "score", "trainer's canary")
                for repeat in range(1 + repeats):
                    move_adapter(policy, repeat)
                    parts.seconds.clear()
                    start = time.perf_counter()
                    loop.run(publisher.publish())
                    record = {"publish": time.perf_counter() - start, **parts.seconds}
                    record["generation"] = loop.run(tokens_per_s(engine, first_turns(prepared), prepared.config))
                    print(f"{way}, {f'repeat {repeat}' if repeat else 'warm-up'}: {record}", flush=True)
                    records.append(record)
        finally:
            engine.shutdown()
    return records[1:]


async def tokens_per_s(engine: VllmEngine, turns: Sequence[Sequence[Call]], config: RunConfig) -> float:
    start = time.perf_counter()
    await generate(engine, config, turns)
    return sum(call.num_tokens for calls in turns for call in calls) / (time.perf_counter() - start)


def figures_of(way: Way, records: Sequence[dict[str, float]]) -> list[Figure]:
    return [
        Figure(
            name=f"{way}: {part}", unit="tokens/s" if part == "generation" else "s", values=[r[part] for r in records]
        )
        for part in records[0]
    ]


def main() -> None:
    given = parser(__doc__).parse_args()
    adapter = adapter_of(given.run) if given.run else None
    figures: dict[Way, list[Figure]] = {}
    with bench_config(given) as config:
        for way in _WAYS:
            prepared = prepare(config.model_copy(update={"engine": config.engine.model_copy(update={"publish": way})}))
            figures[way] = figures_of(way, measure_way(prepared, way, adapter, given.repeats))
    speeds = (figures[way][-1] for way in _WAYS)
    figures_all = [*figures["merged"], *figures["lora"], ratio("generation, merged / lora", *speeds)]
    about = {
        "adapter": str(adapter or "at its start"),
        "generation": f"{len(requests_of(prepared, 0))} sequences of {config.rollout.max_turn_tokens} tokens",
        "seed": config.seed,
    }
    report("Publish time", figures_all, about=about, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
