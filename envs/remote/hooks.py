"""The hook pair: the user's server is told when a rollout opens and when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from envs.clients.http import HttpCaller, RequestTooLarge
from envs.errors import WorldError
from envs.types import Episode


class Hooks:
    """Posts `rollout.open` and `rollout.close`, each where it is set.

    *Covered*: the close is sent for every rollout whose open was tried, cancelled ones included, and retried. *Not
    covered*: a server that is gone at the close keeps that rollout's state; such closes are counted.
    """

    def __init__(self, *, on_open: HttpCaller | None, on_close: HttpCaller | None) -> None:
        self._on_open = on_open
        self._on_close = on_close
        self._num_close_failures = 0

    async def opened(self, trace_id: str, item: Mapping[str, Any]) -> None:
        """Raises `WorldError` where the server does not take the rollout."""
        if self._on_open is None:
            return
        try:
            reply = await self._on_open.post({"type": "rollout.open", "trace_id": trace_id, "item": item})
        except RequestTooLarge as e:
            raise WorldError(f"rollout.open: {e}") from None
        if reply.status >= 400:
            raise WorldError(f"rollout.open: HTTP {reply.status}: {reply.text[:200].strip()}".rstrip(": "))

    async def closed(self, trace_id: str, item: Mapping[str, Any] | None, episode: Episode | None) -> None:
        """Never raises over the rollout's result: what fails is counted."""
        if self._on_close is None:
            return
        event = {"type": "rollout.close", "trace_id": trace_id, "item": item}
        sample = None if episode is None else _sample(episode)
        try:
            try:
                reply = await self._on_close.post({**event, "sample": sample})
            except RequestTooLarge:
                reply = await self._on_close.post({**event, "sample": sample and {**sample, "messages": None}})
            self._num_close_failures += reply.status >= 400
        except (WorldError, RequestTooLarge):
            self._num_close_failures += 1

    async def sweep(self, trace_ids: Sequence[str]) -> None:
        """Close rollouts of which only the ids are known."""
        await asyncio.gather(*(self.closed(trace_id, None, None) for trace_id in trace_ids))

    def take_metrics(self) -> dict[str, float]:
        taken, self._num_close_failures = self._num_close_failures, 0
        return {"close_failures": float(taken)}


def _sample(episode: Episode) -> dict[str, Any]:
    return {
        "stop_reason": episode.stop_reason.value,
        "output_text": episode.answer or "",
        "messages": [message.to_openai() for message in episode.messages],
    }
