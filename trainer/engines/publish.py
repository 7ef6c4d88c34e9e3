"""From the trained adapter to the engine that samples with it, with proof."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from envs.errors import PublishError
from trainer.engines.canary import Canary, Scores
from trainer.engines.engine import PROBE_VERSION, Engine, version_name
from trainer.learning import adapter as lora
from trainer.learning.policy import Policy
from trainer.runs.canary_record import KeepRecord, keep_none, of_base, of_policy

_PROBE_MOVE = 3.0
"""By how much each kind of layer moves the canary's log-probabilities under the probe (root mean square), in units of
the base model's mismatch, which hides less. More would make the kinds' shares hard to tell apart."""

_LEAST_PROBE_MOVE = 0.05
"""No less than that, nats."""

_PROBE_SIZE = 0.05
"""Of the first try: the adapter's part of a matrix, relative to the matrix (Frobenius norms)."""


class Publisher:
    """Hands each policy version to one engine, by way of the folder `scratch`."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        canary: Canary,
        scratch: Path,
        *,
        hold: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        num_versions: int = 1,
        keep: KeepRecord = keep_none,
    ) -> None:
        """`hold`: in it no turn begins, so that none is sampled with what has not been proved yet. `num_versions`: so
        many of the newest lie in `scratch` after a publish. `keep` is given what the trainer says of the canary, under
        the base model and under each version that was proved (`trainer.runs.canary_record`).
        """
        self._hold = hold
        self._keep = keep
        self._num_versions = num_versions
        self._policy = policy
        self._engine = engine
        self._canary = canary
        self._scratch = scratch

    async def note_base(self) -> dict[str, float]:
        """Compare engine and trainer on the base model; call once, before the first publish."""
        base = self._scores(adapter=False)
        metrics = await self._canary.note_base(self._engine, base)
        self._keep(of_base(self._canary.token_ids, base))
        return metrics

    async def probe(self) -> dict[str, float]:
        """Prove, before the first rollout, that the engine runs every kind of adapted layer; call after `note_base`.

        A new adapter changes nothing: an engine that ignores it looks right until training has moved it. So an adapter
        that changes something in every layer is published once. The policy keeps its own, which has to be published
        next. Returns the share of each kind's change that the engine shows. Raises `PublishError` that names the kinds
        which it does not run as the trainer does.
        """
        model = self._policy.model
        own = lora.adapter_state(model)
        try:
            moves = self._load_probe()
            await self._engine.publish(await self._saved(PROBE_VERSION), PROBE_VERSION)
            return await self._canary.prove_parts(self._engine, self._scores(adapter=True), moves)
        except PublishError as e:
            raise PublishError(f"{type(model.get_base_model()).__name__}: {e}") from e
        finally:
            lora.load_adapter_state(model, own)
            shutil.rmtree(self._scratch / version_name(PROBE_VERSION), ignore_errors=True)

    def _load_probe(self) -> dict[str, Scores]:
        """Load an adapter in which each kind of layer has its say; how much each alone moves the trainer's scores."""
        model = self._policy.model
        base = self._scores(adapter=False)
        kinds = lora.random_changes(model, size=_PROBE_SIZE)
        nothing = {name: change * 0 for changes in kinds.values() for name, change in changes.items()}
        everything, moves = dict(nothing), {}
        wanted = max(_LEAST_PROBE_MOVE, _PROBE_MOVE * self._canary.rounding)
        for kind, changes in kinds.items():
            for tries_left in (2, 1, 0):
                lora.load_weights(model, nothing | changes)
                moves[kind] = [n - b for n, b in zip(self._scores(adapter=True), base, strict=True)]
                size = math.sqrt(sum(x * x for x in moves[kind]) / len(base))
                # What is published is what has been measured last.
                if wanted / 2 < size < wanted * 2 or not tries_left:
                    break
                changes = {name: change * min(50.0, wanted / max(size, 1e-9)) for name, change in changes.items()}
            everything |= changes
        lora.load_weights(model, everything)
        return moves

    async def publish(self) -> dict[str, float]:
        """Make the engine serve the policy as it is now, and prove it. Raises `PublishError`."""
        version = self._policy.num_updates
        folder = await self._saved(version)
        # Beside the engine, which loads and scores in processes of its own.
        trainers = asyncio.ensure_future(asyncio.to_thread(self._scores, adapter=True))
        try:
            async with self._hold():
                await self._engine.publish(folder, version)
                metrics = await self._canary.prove(self._engine, trainers, version=version)
        finally:
            # Whatever ends it first is told; what else went wrong meanwhile is not.
            await asyncio.gather(trainers, return_exceptions=True)
        self._keep(of_policy(self._policy.num_steps, trainers.result()))
        by_version = {int(old.name.removeprefix("policy-v")): old for old in self._scratch.glob("policy-v*")}
        for old in sorted(by_version)[: -self._num_versions]:
            shutil.rmtree(by_version[old])
        return metrics

    async def _saved(self, version: int) -> Path:
        """The weights as they are now, for the engine to load."""
        folder = self._scratch / version_name(version)
        save = self._policy.save_merged if self._engine.publishes_merged else self._policy.save_adapter
        if threading.current_thread() is threading.main_thread():
            save(folder)
        else:
            # The loop has a thread of its own: rollouts go on in it meanwhile.
            await asyncio.to_thread(save, folder)
        return folder

    def _scores(self, *, adapter: bool) -> Scores:
        rows = self._policy.score(self._canary.token_ids, adapter=adapter)
        return [x for row in rows for x in row.tolist()]
