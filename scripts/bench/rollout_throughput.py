"""Generated tokens/s of the multi-turn loop as a share of what vLLM generates when nothing stands between the tokens.

    python scripts/bench/rollout_throughput.py --run runs/quickstart [KEY=VALUE ...] [--repeats 3]

One engine, one set of weights, the config's groups of a step as live sequences. Every repeat takes another step's tasks
and runs four arms over them, one after the other, each from an empty prefix cache (as after a publish):

loop     `RolloutWorker`: generation, parsing, tools, ledger, grading, rollouts written to disk.
raw      vLLM alone: each sequence starts from its episode's first prompt and generates as many tokens as its episode
         generated in all, in one request (`ignore_eos`), sampled as in the loop (log-probabilities, seeds).
replay   vLLM alone, the recorded turns: the same prompts and numbers of tokens, turn after turn, nothing between.
plain    raw without log-probabilities and seeds: what those two cost.

loop / raw is the headline. It is replay / raw (what turns themselves cost: the prefill of tool results, batches that
thin out) times loop / replay (what is ours). Without `engine.seeded_requests=true` the replay samples other tokens than
those recorded, which its next prompts hold, so it prefills them once more and loop / replay errs to our advantage.

The weights have to call tools, which the untrained default model does not. `--run` takes the adapter (and, without
`--config`, the config) of a run that has at least been warm-started; `--adapter` takes any adapter folder. It is
published as in training, canary included. Without either a stand-in plays the expert episodes of the config's world:
the engine generates as many tokens as each expert turn has, and the loop goes on with the expert's own, so that tools
run and graders grade. Those tokens are not in the engine's prefix cache and are prefilled once more: the stand-in errs
to the loop's disadvantage.

*Not covered:* more than one process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Figure, adapted_policy, bench_config, parser, ratio, report, run_main

from envs.errors import UserError
from trainer.config import EngineConfig, RunConfig
from trainer.engines.arguments import seeds_requests
from trainer.engines.engine import Completion, Sampler, Sampling
from trainer.engines.local import VllmEngine
from trainer.engines.watched import WatchedEngine
from trainer.learning.warmstart import expert_ledger
from trainer.prepare import Prepared, prepare
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.files import append_line
from trainer.runs.manifest import adapter_of
from trainer.runs.records import rollout_to_json
from trainer.seeds import derive_seed
from trainer.session import open_publisher
from trainer.tasks.load import tasks_of_step, train_requests
from trainer.types import Rollout, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One generation: its prompt, how many tokens, and the loop's seed."""

    prompt_ids: list[int]
    num_tokens: int
    seed: int


def calls_of(rollout: Rollout, seed: int) -> list[Call]:
    """The generations that made a rollout: the sampled runs of its ledgers, a turn each. `seed` is its request's."""
    rows = [ledger.to_json() for ledger in rollout.ledgers]
    runs = [(row["token_ids"], start, end) for row in rows for start, end, _ in row["sampled"]]
    return [
        Call(prompt_ids=token_ids[:start], num_tokens=end - start, seed=derive_seed(seed, turn))
        for turn, (token_ids, start, end) in enumerate(runs)
    ]


def in_one(calls: Sequence[Call]) -> Call:
    """The same number of tokens from the first prompt, without a break."""
    return replace(calls[0], num_tokens=sum(call.num_tokens for call in calls))


class StandInEngine:
    """A `Sampler` whose turns are the expert's: the real one generates as many tokens, which are thrown away."""

    def __init__(self, engine: VllmEngine, config: RunConfig, token_ids_by_seed: dict[int, list[int]]) -> None:
        self._engine = engine
        self._config = config
        self._token_ids_by_seed = token_ids_by_seed

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        turn = self._token_ids_by_seed[sampling.seed]
        token_ids = turn[: sampling.max_tokens]
        params = sampling_params(self._config, len(token_ids), seed=sampling.seed)
        output = (await self._engine._request(prompt_ids, params, version=self._engine._version)).outputs[0]
        # The real engine's work on its output, so that it is part of the time.
        logprobs = [entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs, strict=True)]
        return Completion(
            token_ids=token_ids, logprobs=logprobs, finished=len(token_ids) == len(turn), policy_version=0
        )


def sampling_params(config: RunConfig, num_tokens: int, *, seed: int, plain: bool = False) -> Any:
    """For exactly `num_tokens`, as the loop samples them; `plain` leaves out log-probabilities and seed."""
    import torch
    from vllm import SamplingParams

    assert isinstance(config.engine, EngineConfig), "only vLLM in process is measured"
    return SamplingParams(
        max_tokens=num_tokens,
        ignore_eos=True,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=seed if seeds_requests(config.engine, on_cpu=not torch.cuda.is_available()) and not plain else None,
        logprobs=None if plain else 0,
        detokenize=False,
    )


async def generate(
    engine: VllmEngine, config: RunConfig, episodes: Sequence[Sequence[Call]], *, plain: bool = False
) -> None:
    """All episodes at once, the calls of each one after the other, with nothing between."""

    # The engine's own interface ends a turn at the stop token; what vLLM alone can do is measured past it.
    async def one(calls: Sequence[Call]) -> None:
        for call in calls:
            params = sampling_params(config, call.num_tokens, seed=call.seed, plain=plain)
            output = await engine._request(call.prompt_ids, params, version=engine._version)
            assert len(output.outputs[0].token_ids) == call.num_tokens, "vLLM ended a sequence early"

    await asyncio.gather(*(one(calls) for calls in episodes))


async def measure_arms(
    engine: VllmEngine, worker: RolloutWorker, requests: Sequence[RolloutRequest], config: RunConfig
) -> tuple[dict[str, float], list[Rollout]]:
    """Seconds of each arm, and the loop's rollouts."""
    written = config.output_dir / "rollouts.jsonl"
    rollouts: list[Rollout] = []

    async def loop() -> None:
        def keep(rollout: Rollout) -> None:
            append_line(written, rollout_to_json(rollout))

        rollouts.extend(await worker.run(requests, temperature=config.rollout.temperature, on_rollout=keep))

    async def timed(arm: Coroutine[Any, Any, None]) -> float:
        assert await engine._llm.reset_prefix_cache(), "vLLM kept its prefix cache"
        start = time.perf_counter()
        await arm
        return time.perf_counter() - start

    seconds = {"loop": await timed(loop())}
    if lost := [r for r in rollouts if r.grade is None or r.num_attempts > 1]:
        raise UserError(
            f"{len(lost)} rollouts were lost or repeated, which no other arm can match: {lost[0].episode.error}"
        )
    turns = [calls_of(rollout, request.seed) for rollout, request in zip(rollouts, requests, strict=True)]
    whole = [[in_one(calls)] for calls in turns]
    seconds["raw"] = await timed(generate(engine, config, whole))
    seconds["replay"] = await timed(generate(engine, config, turns))
    seconds["plain"] = await timed(generate(engine, config, whole, plain=True))
    return seconds, rollouts


def requests_of(prepared: Prepared, step: int) -> list[RolloutRequest]:
    config = prepared.config
    rollout = config.rollout
    tasks = tasks_of_step(
        prepared.train_tasks,
        seed=config.seed,
        step=step,
        num_tasks=rollout.tasks_per_step,
        stratify_by=rollout.stratify_by,
    )
    return train_requests(config, tasks, run_id="bench", step=step)


async def expert_turns(prepared: Prepared, requests: Sequence[RolloutRequest]) -> dict[int, list[int]]:
    """The token ids of every turn that the stand-in plays, by the seed that the loop derives for it."""
    turns: dict[int, list[int]] = {}
    for request in requests:
        script = prepared.world.expert_episode(request.task, request.seed)
        if not script:
            raise UserError(f"the world has no expert episode for task {request.task.task_id}; give --run or --adapter")
        row = (await expert_ledger(request.task, script, world=prepared.world, chat=prepared.chat)).to_json()
        for turn, (start, end, _) in enumerate(row["sampled"]):
            turns[derive_seed(request.seed, turn)] = row["token_ids"][start:end]
    return turns


def publish_adapter(
    prepared: Prepared, engine: WatchedEngine, loop: asyncio.Runner, accelerator: Any, adapter: Path
) -> None:
    """The weights reach the engine as in training, with proof."""
    from trainer.runs.scratch import Scratch

    policy = adapted_policy(prepared, accelerator, adapter)
    with Scratch() as scratch:
        publisher = loop.run(open_publisher(prepared, policy, engine, scratch.path, name="bench-canary"))
        loop.run(publisher.note_base())
        loop.run(publisher.publish())


def measure(
    prepared: Prepared, adapter: Path | None, repeats: int
) -> tuple[dict[str, list[float]], list[list[Rollout]]]:
    """Seconds of each arm and the rollouts, a list entry per repeat; the warm-up is left out."""
    from accelerate import Accelerator

    from trainer.session import open_engine

    accelerator = Accelerator()
    steps = [requests_of(prepared, step) for step in range(1 + repeats)]
    arms: list[dict[str, float]] = []
    rollouts: list[list[Rollout]] = []
    with asyncio.Runner() as loop:
        print("starting the engine", flush=True)
        watched = loop.run(open_engine(prepared, accelerator, None, first_step=0))
        engine = watched.engine
        assert isinstance(engine, VllmEngine)
        try:
            sampler: Sampler = engine
            if adapter is None:
                requests_all = [request for requests in steps for request in requests]
                sampler = StandInEngine(engine, prepared.config, loop.run(expert_turns(prepared, requests_all)))
            else:
                publish_adapter(prepared, watched, loop, accelerator, adapter)
            worker = RolloutWorker(
                world=prepared.world,
                grader=prepared.grader,
                chat=prepared.chat,
                engine=sampler,
                config=prepared.config.rollout,
            )
            for step, requests in enumerate(steps):
                seconds, done = loop.run(measure_arms(engine, worker, requests, prepared.config))
                arms.append(seconds)
                rollouts.append(done)
                times = ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
                print(f"{f'repeat {step}' if step else 'warm-up'}: {times}", flush=True)
        finally:
            engine.shutdown()
    return {name: [arm[name] for arm in arms[1:]] for name in arms[0]}, rollouts[1:]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--adapter", type=Path, help="adapter folder; see above")
    given = arguments.parse_args()
    adapter = given.adapter or (adapter_of(given.run) if given.run else None)
    with bench_config(given) as config:
        seconds, rollouts = measure(prepare(config), adapter, given.repeats)
    num_tokens = [sum(r.episode.num_tokens for r in repeat) for repeat in rollouts]
    speeds = {
        name: Figure(name=name, unit="tokens/s", values=[n / s for n, s in zip(num_tokens, values, strict=True)])
        for name, values in seconds.items()
    }
    loop, raw, replay, plain = (speeds[name] for name in ("loop", "raw", "replay", "plain"))
    figures = [*speeds.values(), ratio("loop / raw", loop, raw, target=0.9)]
    figures += [
        ratio("loop / replay", loop, replay),
        ratio("replay / raw", replay, raw),
        ratio("raw / plain", raw, plain),
    ]
    episodes = [r.episode for repeat in rollouts for r in repeat]
    num_turns = sum(len(e.turns) for e in episodes)
    about = {
        "weights": str(adapter or "untrained; the stand-in plays expert episodes"),
        "concurrency": f"{len(rollouts[0])} episodes at once, engine.max_num_seqs {config.engine.max_num_seqs}",
        "episodes": f"{num_turns / len(episodes):.2f} turns, {sum(num_tokens) / len(episodes):.0f} generated tokens, "
        f"{sum(e.num_tool_calls for e in episodes) / len(episodes):.2f} tool calls each",
        "seed": config.seed,
    }
    report("Rollout throughput", figures, about=about, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
