"""Answers of a judge, kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, replace

from graders.judges.base import Judge, JudgeReply, JudgeRequest, JudgeSampling, check_judge
from graders.types import taken_metrics


class CachedJudge:
    """Keeps the answers of another judge by content: model, messages, schema and sampling. `size` 0 keeps none.

    Covered: the least recently used go first; the same question asked again while the judge still works on it waits for
    that one answer, also when the one who asked first is cancelled; the judge's work is cancelled when nobody waits any
    more. Faults are not kept. Not covered: answers are kept in memory only, and by each process for itself.
    """

    def __init__(self, judge: Judge, size: int) -> None:
        self._judge = judge
        self._size = size
        self._replies: OrderedDict[bytes, JudgeReply] = OrderedDict()
        self._calls: dict[bytes, _Call] = {}
        self._num_hits = 0

    def check(self, sampling: JudgeSampling) -> None:
        check_judge(self._judge, sampling)

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        if not self._size:
            return await self._judge.ask(request)
        key = _content_key(request)
        if (known := self._replies.get(key)) is not None:
            self._replies.move_to_end(key)
            self._num_hits += 1
            return known
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = _Call(asyncio.create_task(self._fetch(key, request)))
        call.num_waiting += 1
        try:
            reply = await asyncio.shield(call.task)
        finally:
            call.num_waiting -= 1
            if not call.num_waiting:
                call.task.cancel()
                if self._calls.get(key) is call:
                    del self._calls[key]
        if not call.is_accounted:
            call.is_accounted = True
            return reply
        self._num_hits += 1
        return replace(reply, num_tokens=0)

    def take_metrics(self) -> dict[str, float]:
        """The judge's own figures, and how many questions it was spared."""
        taken = taken_metrics(self._judge)
        hits, self._num_hits = self._num_hits, 0
        return taken | {"judge/cache_hits": hits} if taken or hits else {}

    async def aclose(self) -> None:
        running = [call.task for call in self._calls.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._judge.aclose()

    async def _fetch(self, key: bytes, request: JudgeRequest) -> JudgeReply:
        reply = await self._judge.ask(request)
        self._replies[key] = replace(reply, num_tokens=0)
        if len(self._replies) > self._size:
            self._replies.popitem(last=False)
        return reply


@dataclass(slots=True)
class _Call:
    """A question that the judge works on."""

    task: asyncio.Task[JudgeReply]
    num_waiting: int = 0
    is_accounted: bool = False
    """The tokens were told to one who asked."""


def _content_key(request: JudgeRequest) -> bytes:
    content = [
        request.model,
        [dict(m) for m in request.messages],
        request.schema and dict(request.schema),
        request.sampling.model_dump(),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
