"""From the trained adapter to the engine that samples with it, with proof."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.canary import Canary
from trainer.engine import Engine
from trainer.policy import Policy


class Publisher:
    """Hands each policy version to one engine, by way of the folder `scratch`."""

    def __init__(self, policy: Policy, engine: Engine, canary: Canary, scratch: Path) -> None:
        self._policy = policy
        self._engine = engine
        self._canary = canary
        self._scratch = scratch

    async def note_base(self) -> dict[str, float]:
        """Compare engine and trainer on the base model; call once, before the first publish."""
        return await self._canary.note_base(self._engine, self._scores(adapter=False))

    async def publish(self) -> dict[str, float]:
        """Make the engine serve the policy as it is now, and prove it. Raises `PublishError`."""
        version = self._policy.num_updates
        folder = self._scratch / f"policy-v{version}"
        if self._engine.publishes_merged:
            self._policy.save_merged(folder)
        else:
            self._policy.save_adapter(folder)
        await self._engine.publish(folder, version)
        metrics = await self._canary.prove(self._engine, self._scores(adapter=True), version=version)
        for old in self._scratch.glob("policy-v*"):
            if old != folder:
                shutil.rmtree(old)
        return metrics

    def _scores(self, *, adapter: bool) -> list[float]:
        rows = self._policy.score(self._canary.token_ids, adapter=adapter)
        return [x for row in rows for x in row.tolist()]
