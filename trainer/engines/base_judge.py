"""The run's own base model as the judge, or as the simulated user: no second GPU, no other server."""

from __future__ import annotations

import time

from envs.errors import UserError, WorldError
from envs.limits.clocks import stopped_clocks
from envs.messages import ROLES
from envs.types import Message
from graders.judges.base import JudgeMeter, JudgeReply, JudgeRequest, JudgeSampling
from trainer.engines.engine import KeepsBase
from trainer.templates.chat import Chat

DEFAULT_MAX_TOKENS = 1024
"""Of one judgement, where the grader's sampling_params name no limit."""


class EngineJudge:
    """Answers as `graders.judges.base.Judge`, from the moment it is bound to the engine.

    The grader's `model` is not looked at: there is one model. Temperature 0 where the grader names none, so that one
    question has one answer.

    Covered: the structure is enforced by vLLM, the adapter is off for these requests only. Not covered: a limit on
    requests in flight of its own, since the engine queues them behind the rollouts; reasoning before the answer, which
    the enforced structure leaves no room for.
    """

    def __init__(self) -> None:
        self._engine: KeepsBase | None = None
        self._chat: Chat | None = None
        self._meter = JudgeMeter()

    def bind(self, engine: KeepsBase, chat: Chat) -> None:
        self._engine, self._chat = engine, chat

    def check(self, sampling: JudgeSampling) -> None:
        if sampling.reasoning_effort is not None:
            raise UserError(
                "sampling_params.reasoning_effort: has no effect where judge.base_url is 'engine', which does not "
                "reason; leave it out"
            )

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        assert self._engine is not None and self._chat is not None, "the judge is bound when the engine has started"
        messages = [Message(role=ROLES[m["role"]], content=m["content"]) for m in request.messages]
        prompt_ids = self._chat.open(messages, ())
        sampling = request.sampling
        start = time.perf_counter()
        try:
            with stopped_clocks():
                token_ids = await self._engine.generate_base(
                    prompt_ids,
                    max_tokens=sampling.max_completions_tokens or DEFAULT_MAX_TOKENS,
                    temperature=0.0 if sampling.temperature is None else sampling.temperature,
                    top_p=1.0 if sampling.top_p is None else sampling.top_p,
                    seed=sampling.seed,
                    schema=request.schema,
                )
        except WorldError:
            self._meter.failed()
            raise
        num_tokens = len(prompt_ids) + len(token_ids)
        self._meter.answered(latency_s=time.perf_counter() - start, num_tokens=num_tokens)
        if request.schema is None:
            # What it reasons, where the parser tells it apart, is no part of what it says.
            return JudgeReply(text=self._chat.parse(token_ids).message.content, num_tokens=num_tokens)
        stopped = bool(token_ids) and token_ids[-1] in self._chat.stop_token_ids
        return JudgeReply(text=self._chat.decode(token_ids[:-1] if stopped else token_ids), num_tokens=num_tokens)

    def take_metrics(self) -> dict[str, float]:
        return self._meter.take()

    async def aclose(self) -> None:
        """Nothing to release: the engine belongs to the run."""
