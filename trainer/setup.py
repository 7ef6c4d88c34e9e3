"""What stands before the first step: the policy, warm-started or restored, and the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from envs.base import Sweeps
from envs.limits.clocks import time_limit
from trainer import processes
from trainer.config import publishes_merged
from trainer.engines.engine import Engine, VllmEngine, release_memory
from trainer.engines.watched import WatchedEngine
from trainer.job import Job
from trainer.learning.adapter import published_bytes
from trainer.learning.checkpoint import keep_checkpoint, load_checkpoint, write_checkpoint
from trainer.learning.policy import Policy
from trainer.learning.warmstart import expert_ledger, expert_ledgers, in_steps
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.runs.scratch import Scratch
from trainer.seeds import derive_seed
from trainer.types import Phase

if TYPE_CHECKING:
    from accelerate import Accelerator

StartEngine = Callable[..., Awaitable[Engine]]

_CANARY_TOKENS = 448
_MOST_CANARIES = 8
_MOST_VERSIONS = 2
"""Versions that lie on their way to the engine at once: the former is deleted when the new one has been proved."""
_FILE_OVERHEAD_BYTES = 2**20
"""Headers and the adapter's config."""


def load_policy(job: Job, run: RunFolder, accelerator: Accelerator, progress: Progress, loop: asyncio.Runner) -> Policy:
    """The policy as the newest checkpoint left it; in a new run after its warm start, if there is one."""
    config = job.config
    progress.phase(Phase.LOADING)
    policy = Policy(job.model_path, config.model, config.optim, accelerator, config.seed, grammar=job.grammar)
    checkpoint = run.last_checkpoint()
    processes.wait_for_all()
    if checkpoint is not None:
        step, folder = checkpoint
        load_checkpoint(policy, folder)
        for told in (*run.remarks, *run.rewind(step)):
            progress.warn(told)
        progress.say(f"resumed after step {step} from {folder}")
    else:
        if config.warmstart is not None:
            _warm_start(job, run, policy, progress, loop)
        if run.is_main:
            keep_checkpoint(run, write_checkpoint(run, policy, step=0), keep=config.checkpoint.keep)
    processes.wait_for_all()
    return policy


def _warm_start(job: Job, run: RunFolder, policy: Policy, progress: Progress, loop: asyncio.Runner) -> None:
    """Imitate the demonstrations. An interrupted warm start is done again from its beginning, to the same adapter."""
    config = job.config
    assert config.warmstart is not None
    progress.phase(Phase.EXPERT)
    ledgers = expert_ledgers(
        config,
        job.train_tasks,
        world=job.world,
        chat=job.chat,
        loop=loop,
        run_id=run.run_id,
        demonstrations=job.demonstrations,
        users=job.users,
    )
    steps = in_steps(ledgers, config.warmstart)
    progress.phase(Phase.WARM_START, total=len(steps))
    losses: list[float] = []

    def on_step(loss: float) -> None:
        progress.advance(1, tokens=sum(len(sample.token_ids) for sample in steps[len(losses)]))
        losses.append(loss)

    policy.imitate(steps, learning_rate=config.warmstart.learning_rate, on_step=on_step)
    run.note(warmstart_loss=losses)
    if config.loss.kl_coef > 0:
        policy.keep_as_reference()


async def release_left_open(job: Job, run: RunFolder, progress: Progress) -> None:
    """Let the world release what rollouts of this run hold that a kill left open."""
    left_open = run.left_open() if run.is_main else []
    if left_open and isinstance(job.world, Sweeps):
        progress.say(f"releasing {len(left_open)} rollouts that an earlier process left open")
        try:
            async with time_limit(job.config.rollout.settle_timeout_s):
                await job.world.sweep(left_open)
        except TimeoutError:
            progress.warn(f"{len(left_open)} rollouts that an earlier process left open could not be released in time")
    if run.is_main:
        run.forget_left_open()


def open_scratch(job: Job, policy: Policy) -> Scratch:
    """The folder by which weights reach the engine, with room for this and every other process of the machine."""
    merged = publishes_merged(job.config.engine, on_cpu=policy.accelerator.device.type == "cpu")
    of_one_process = _MOST_VERSIONS * published_bytes(policy.model, merged=merged) + _FILE_OVERHEAD_BYTES
    return Scratch(need_bytes=of_one_process * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


async def open_engine(
    job: Job, accelerator: Any, start_engine: StartEngine | None, *, first_step: int
) -> WatchedEngine:
    """Start this process's engine on the base model."""
    # The engine refuses to start where less is free than its share, and a warm start leaves its peak reserved.
    release_memory()
    start = start_engine or VllmEngine.start
    # The engines of a machine share vLLM's compile cache, whose index is not written at once: one fills it for all.
    takes_turns, is_first = accelerator.device.type != "cpu", accelerator.local_process_index == 0
    if takes_turns and not is_first:
        processes.wait_for_all()
    started = await start(
        job.model_path,
        model=job.config.model,
        engine=job.config.engine,
        max_model_len=job.config.rollout.max_episode_tokens,
        stop_token_ids=sorted(job.chat.stop_token_ids),
        device=accelerator.device.type,
        local_rank=accelerator.local_process_index,
        # Another on every process and after every resume, or they would draw the same noise.
        seed=derive_seed(job.config.seed, "engine", accelerator.process_index, first_step) % 2**31,
    )
    engine = WatchedEngine(started, limit_s=job.config.engine.hung_after_s)
    if takes_turns and is_first:
        processes.wait_for_all()
    for asks in job.asks_engine:
        asks.bind(engine, job.chat)
    return engine


def make_worker(job: Job, engine: Engine, run: RunFolder) -> RolloutWorker:
    return RolloutWorker(
        world=job.world,
        grader=job.grader,
        watch_grader=job.watch_grader,
        chat=job.chat,
        engine=engine,
        config=job.config.rollout,
        users=job.users,
        # Two lines a rollout, of use only where something can be released.
        live=run if isinstance(job.world, Sweeps) else None,
        max_num_seqs=job.config.engine.max_num_seqs,
    )


async def canary_ids(job: Job, *, name: str) -> list[list[int]]:
    """The token sequences that are scored after every publish: the first training tasks, solved where possible.

    The environments in which they are solved go by `name`, which no other process may have at the time.
    As many as it takes to have enough tokens: scoring them is most of what a publish costs on a CPU. Of a long episode
    it is the end, where the model's own turns are; a row that began with every agent's long system prompt would hold
    nothing else.
    """
    # Scoring generates a token, for which there must be room.
    longest = min(_CANARY_TOKENS // 2, job.config.rollout.max_episode_tokens - 1)

    rows: list[list[int]] = []
    for number, task in enumerate(job.train_tasks[:_MOST_CANARIES]):
        left = _CANARY_TOKENS - sum(map(len, rows))
        if left <= 1:
            break
        ledger = await expert_ledger(
            task,
            job.world.expert_episode(task, 0),
            world=job.world,
            chat=job.chat,
            users=job.users,
            rollout=job.config.rollout,
            rollout_id=f"{name}-{number}",
        )
        rows.append(ledger.prompt_ids[-min(left, longest) :])
    return rows
