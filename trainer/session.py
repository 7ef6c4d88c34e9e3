"""The loaded stack: the policy, warm-started or restored, the engine that samples it, and the way between them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.base import Sweeps
from envs.errors import found_late
from envs.limits.loops import Loop, LoopThread
from trainer import processes
from trainer.engines.canary import Canary, canary_rows
from trainer.engines.engine import Engine, EngineStart
from trainer.engines.publish import Publisher
from trainer.engines.watched import WatchedEngine
from trainer.learning.adapter import load_adapter, published_bytes
from trainer.learning.advantages import registry as advantages
from trainer.learning.checkpoint import keep_checkpoint, load_checkpoint, write_checkpoint
from trainer.learning.losses import registry as losses
from trainer.learning.policy import Policy, Update
from trainer.learning.samples import Sample
from trainer.learning.warmstart import expert_ledger, expert_ledgers, in_steps
from trainer.models.machines import hardware, loaded_set_aside, release_memory
from trainer.prepare import Prepared
from trainer.rollouts.collect import warn_of_mismatch, with_fresh_groups
from trainer.rollouts.stream import RolloutStream, release_left_open
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.canary_record import keep_none
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.runs.scratch import Scratch, sweep_default_roots
from trainer.seeds import derive_seed
from trainer.tasks.curriculum import Curriculum
from trainer.tasks.expert import expert_turns
from trainer.types import Kind, LiveRollouts, Metrics, Phase, Rollout, RolloutRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

StartEngine = Callable[[EngineStart], Awaitable[Engine]]
"""An engine that has been started, in the place of the one that the config names."""

_FILE_OVERHEAD_BYTES = 2**20
"""Headers and the adapter's config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is open together: the engine runs the policy, and that has been proved."""

    prepared: Prepared
    run: RunFolder
    accelerator: Accelerator
    progress: Progress
    loop: Loop
    first_step: int
    """The step after which it goes on; 0 in a new run."""
    policy: Policy
    engine: WatchedEngine
    publisher: Publisher
    worker: RolloutWorker
    stream: RolloutStream
    first_publish_s: float
    """Seconds that the publish took with which the session opened."""

    def collect(
        self, kind: Kind, step: int, requests: Sequence[RolloutRequest], *, temperature: float, phase: Phase
    ) -> list[Rollout]:
        """The rollouts of `requests`, in their order, on every process; what was asked for before goes on beside."""
        self.stream.submit(kind, step, requests, temperature=temperature)
        return self.stream.take(kind, step, phase)

    def roll_out(self, curriculum: Curriculum, *, step: int) -> list[Rollout]:
        """A training step's rollouts; those of `overlap.max_staleness` steps more are asked for by then.

        Without such steps the engine sleeps until `publish`, where it is to.
        """
        config = self.prepared.config
        ahead, temperature = config.overlap.max_staleness, config.rollout.temperature
        for asked in range(step, min(step + ahead, config.optim.num_steps) + 1):
            if not self.stream.is_asked(Kind.TRAIN, asked):
                self.stream.submit(Kind.TRAIN, asked, curriculum.requests(asked), temperature=temperature)

        def more(first: int, count: int) -> list[Rollout]:
            fresh = curriculum.fresh_requests(step, first=first, count=count)
            return self.collect(Kind.TRAIN, step, fresh, temperature=temperature, phase=Phase.ROLLOUTS)

        rollouts = with_fresh_groups(self.stream.take(Kind.TRAIN, step, Phase.ROLLOUTS), config, more)
        if not ahead:
            self.loop.run(self.engine.sleep())
        return rollouts

    def update(self, samples: Sequence[Sample]) -> Update:
        """One step of the optimizer, the same on every process."""
        self.progress.phase(Phase.TRAINING)
        config, rollout = self.prepared.config, self.prepared.config.rollout
        update = self.policy.update(
            samples, config.loss, temperature=rollout.temperature, constant_tokens=rollout.max_episode_tokens
        )
        warn_of_mismatch(update.metrics, config, self.progress)
        return update

    def publish(self) -> Metrics:
        """Hand the policy to the engine and prove that it runs it; the proof's figures. Raises `PublishError`."""
        self.progress.phase(Phase.PUBLISHING)
        if not self.prepared.config.overlap.max_staleness:
            self.loop.run(self.engine.wake_up())
        return self.loop.run(self.publisher.publish())

    def counted(self) -> Metrics:
        """What was counted since the last call: by world, graders, judge and engine, and who waited for whom."""

        async def taken() -> Metrics:
            ahead = self.prepared.config.overlap.max_staleness
            return self.prepared.metrics() | (self.stream.take_metrics() if ahead else {})

        # They count on the loop.
        return self.loop.run(taken())

    @contextlib.contextmanager
    def checkpoint_if_due(self, step: int) -> Iterator[None]:
        """Write the checkpoint of `step` on entering; it counts once what is written within is on the disk too."""
        config = self.prepared.config
        is_due = step % config.checkpoint.every_steps == 0 or step == config.optim.num_steps
        written = write_checkpoint(self.run, self.policy, step=step) if is_due and self.run.is_main else None
        yield
        if written is not None:
            keep_checkpoint(self.run, written, keep=config.checkpoint.keep)

    def show(self, step: int, metrics: Metrics) -> None:
        """Step `step` is done: for the trackers and the display."""
        self.accelerator.log(metrics, step=step)
        if odd := [key for key, value in metrics.items() if not math.isfinite(value)]:
            self.progress.warn(f"no finite numbers, null in metrics.jsonl: {', '.join(odd)}")
        self.progress.step_done(step, metrics)


@contextlib.contextmanager
def open_run(
    prepared: Prepared, start_engine: StartEngine | None, *, beside: Mapping[str, str] | None = None
) -> Iterator[Session]:
    """Join the run's other processes, take its folder up and open the session of its newest checkpoint.

    `beside` are texts to leave in the folder. Raises as `open_session`; a `UserError` within is `FoundLate`.
    """
    config = prepared.config
    accelerator = processes.start(log_with=list(config.trackers) or None, project_dir=str(config.output_dir))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        run = enter(RunFolder.held(config, rank=accelerator.process_index, beside=beside))
        accelerator.init_trackers("agent-rft")
        first_step = processes.from_main(lambda: run.resume_step)
        progress = enter(Progress(run.log_path, config.optim.num_steps, first_step=first_step, show=run.is_main))
        enter(run.exported(config, lambda: progress.current_phase))
        loop: Loop = enter(LoopThread()) if config.overlap.max_staleness > 0 else enter(asyncio.Runner())
        stack.callback(lambda: loop.run(prepared.aclose()))
        about = {"resolved": prepared.resolved(), "hardware": hardware(accelerator.num_processes)}
        processes.from_main(lambda: run.note(**about))
        release_left_open(prepared.world, run, progress, loop, timeout_s=config.rollout.settle_timeout_s)
        session = enter(open_session(prepared, run, accelerator, progress, loop, start_engine, first_step=first_step))
        if run.exporter is not None:
            run.exporter.watch(session.worker.gauges, session.engine.gauges, session.stream.gauges)
        with found_late(), loaded_set_aside():
            yield session
    accelerator.end_training()


@contextlib.contextmanager
def open_session(
    prepared: Prepared,
    run: RunFolder,
    accelerator: Accelerator,
    progress: Progress,
    loop: Loop,
    start_engine: StartEngine | None,
    *,
    first_step: int,
) -> Iterator[Session]:
    """Load all of it and publish the policy; what is open closes at the end.

    `start_engine` takes the place of the config's engine. Raises `UserError`, and `PublishError` when the engine does
    not run the policy.
    """
    sweep_default_roots()
    policy = load_policy(prepared, run, accelerator, progress, loop)
    progress.phase(Phase.STARTING)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(open_scratch(prepared, policy))
        engine = loop.run(open_engine(prepared, accelerator, start_engine, first_step=first_step))
        stack.callback(engine.shutdown)
        scratch.note_children()
        name = f"{run.run_id}-canary-{accelerator.process_index}"
        publisher = loop.run(open_publisher(prepared, policy, engine, scratch.path, name=name, run=run))
        progress.phase(Phase.PUBLISHING)
        loop.run(publisher.note_base())
        loop.run(publisher.probe())
        start = time.perf_counter()
        loop.run(publisher.publish())
        first_publish_s = time.perf_counter() - start
        worker = make_worker(prepared, engine, run)
        stream = RolloutStream(run, worker, accelerator, progress, loop, deadline_s=prepared.config.overlap.deadline_s)
        stack.callback(stream.close)
        yield Session(
            prepared=prepared,
            run=run,
            accelerator=accelerator,
            progress=progress,
            loop=loop,
            first_step=first_step,
            policy=policy,
            engine=engine,
            publisher=publisher,
            worker=worker,
            stream=stream,
            first_publish_s=first_publish_s,
        )


async def open_publisher(
    prepared: Prepared, policy: Policy, engine: WatchedEngine, scratch: Path, *, name: str, run: RunFolder | None = None
) -> Publisher:
    """`name` is that of the environments in which the canary's tasks are solved; no other process may have it then."""
    rows = await canary_ids(prepared, name=name, live=_live(prepared, run))
    tolerance = prepared.config.engine.canary_mean_tolerance
    canary, num_versions = Canary(rows, tolerance=tolerance), prepared.num_versions
    keep = keep_none if run is None else functools.partial(run.keep_canary, tolerance=tolerance)
    return Publisher(policy, engine, canary, scratch, hold=engine.held, num_versions=num_versions, keep=keep)


def new_policy(prepared: Prepared, accelerator: Accelerator) -> Policy:
    """The policy as it begins: the base model under an adapter that changes nothing."""
    config = prepared.config
    longest, critic = config.rollout.max_episode_tokens, None if config.loss.gae is None else config.loss.gae.critic
    begun = (prepared.model_path, config.model, config.optim, accelerator, config.seed)
    return Policy(*begun, max_length=longest, grammar=prepared.grammar, critic=critic)


def load_policy(prepared: Prepared, run: RunFolder, accelerator: Accelerator, progress: Progress, loop: Loop) -> Policy:
    """The policy as the newest checkpoint left it; in a new run after its warm start, if there is one."""
    config = prepared.config
    progress.phase(Phase.LOADING)
    advantages.forget()
    policy = new_policy(prepared, accelerator)
    if policy.layout != config.optim.layout:
        progress.say(f"rows share no prefixes in training: {policy.padded_because}")
    checkpoint = processes.from_main(run.last_checkpoint)
    if checkpoint is not None:
        step, folder = checkpoint
        load_checkpoint(policy, folder)
        ahead, num_rollouts = config.overlap.max_staleness, config.rollout.num_rollouts
        rewound = processes.from_main(lambda: run.rewind(step, ahead=ahead, num_rollouts=num_rollouts))
        forgotten = (*losses.forgotten(config.loss), *advantages.forgotten(config.loss.advantage)) if step else ()
        for told in (*run.remarks, *rewound, *forgotten):
            progress.warn(told)
        progress.say(f"resumed after step {step} from {folder}")
    else:
        if prepared.start_adapter is not None:
            load_adapter(policy.model, prepared.start_adapter, links=True)
        if config.warmstart is not None:
            _warm_start(prepared, run, policy, progress, loop)
        if config.loss.kl_coef > 0:
            policy.keep_as_reference()
        if run.is_main:
            keep_checkpoint(run, write_checkpoint(run, policy, step=0), keep=config.checkpoint.keep)
    processes.wait_for_all()
    return policy


def _warm_start(prepared: Prepared, run: RunFolder, policy: Policy, progress: Progress, loop: Loop) -> None:
    """Imitate the demonstrations. An interrupted warm start is done again from its beginning, to the same adapter."""
    config = prepared.config
    assert config.warmstart is not None
    progress.phase(Phase.EXPERT)
    ledgers = expert_ledgers(
        config,
        prepared.train_tasks,
        world=prepared.world,
        chat=prepared.chat,
        loop=loop,
        run_id=run.run_id,
        demonstrations=prepared.demonstrations,
        users=prepared.users,
        live=_live(prepared, run),
    )
    steps = in_steps(ledgers, config.warmstart)
    progress.phase(Phase.WARM_START, total=len(steps))
    losses: list[float] = []

    def on_step(loss: float) -> None:
        progress.advance(1, tokens=sum(len(sample.token_ids) for sample in steps[len(losses)]))
        losses.append(loss)

    policy.imitate(steps, learning_rate=config.warmstart.learning_rate, on_step=on_step)
    processes.from_main(lambda: run.note(warmstart_loss=losses))


def open_scratch(prepared: Prepared, policy: Policy) -> Scratch:
    """The folder by which weights reach the engine, with room for this and every other process of the machine."""
    of_version = published_bytes(policy.model, merged=prepared.engine.publishes_merged)
    # A former one is deleted when the new one has been proved.
    of_one_process = (prepared.num_versions + 1) * of_version + _FILE_OVERHEAD_BYTES
    return Scratch(need_bytes=of_one_process * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


async def open_engine(
    prepared: Prepared, accelerator: Any, start_engine: StartEngine | None, *, first_step: int
) -> WatchedEngine:
    """Start this process's engine on the base model."""
    given = EngineStart(
        model_path=prepared.model_path,
        model=prepared.config.model,
        max_model_len=prepared.config.rollout.max_episode_tokens,
        stop_token_ids=sorted(prepared.chat.stop_token_ids),
        device=accelerator.device.type,
        rank=accelerator.process_index,
        local_rank=accelerator.local_process_index,
        # Another on every process and after every resume, or they would draw the same noise.
        seed=derive_seed(prepared.config.seed, "engine", accelerator.process_index, first_step) % 2**31,
        num_versions=prepared.num_versions,
    )
    if prepared.engine.runs_here:
        # It refuses to start where less is free than its share, and a warm start leaves its peak reserved.
        release_memory()
    # The engines of a machine share a compile cache, whose index is not written at once: one fills it for all.
    takes_turns = prepared.engine.runs_here and accelerator.device.type != "cpu"
    is_first = accelerator.local_process_index == 0
    if takes_turns and not is_first:
        processes.wait_for_all()
    started = await (start_engine or functools.partial(_start, prepared.engine))(given)
    engine = WatchedEngine(started, limit_s=prepared.config.engine.hung_after_s)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.shutdown)
        if takes_turns and is_first:
            processes.wait_for_all()
        for asks in prepared.asks_engine:
            asks.bind(engine, prepared.chat)
        # It is the caller's.
        stack.pop_all()
    return engine


async def _start(engine: Engine, given: EngineStart) -> Engine:
    try:
        await engine.start(given)
    except BaseException:
        with contextlib.suppress(Exception):
            engine.shutdown()
        raise
    return engine


def make_worker(prepared: Prepared, engine: Engine, run: RunFolder) -> RolloutWorker:
    return RolloutWorker(
        world=prepared.world,
        grader=prepared.grader,
        watch_grader=prepared.watch_grader,
        chat=prepared.chat,
        engine=engine,
        config=prepared.config.rollout,
        users=prepared.users,
        live=_live(prepared, run),
        max_num_seqs=prepared.config.engine.max_num_seqs,
        pins_version=prepared.config.overlap.pin == "episode",
    )


def _live(prepared: Prepared, run: RunFolder | None) -> LiveRollouts | None:
    """Two lines an episode, of use only where something can be released."""
    return run if isinstance(prepared.world, Sweeps) else None


async def canary_ids(prepared: Prepared, *, name: str, live: LiveRollouts | None = None) -> list[list[int]]:
    """The token sequences that are scored after every publish: the first training tasks, solved where possible.

    The environments in which they are solved go by `name`, which no other process may have at the time.
    """

    async def solved(number: int) -> Sequence[int]:
        task = prepared.train_tasks[number]
        ledger = await expert_ledger(
            task,
            expert_turns(prepared.world, task, 0, limit_s=prepared.config.rollout.episode_timeout_s),
            world=prepared.world,
            chat=prepared.chat,
            users=prepared.users,
            rollout=prepared.config.rollout,
            rollout_id=f"{name}-{number}",
            live=live,
        )
        return ledger.prompt_ids

    return await canary_rows(len(prepared.train_tasks), solved, max_tokens=prepared.config.rollout.max_episode_tokens)
