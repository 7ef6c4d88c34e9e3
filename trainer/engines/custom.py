"""The user's own engine: `engine: {type: custom, target: my_engine.py:MyEngine}`."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from envs.errors import FoundLate, PublishError, UserError, WorldError
from envs.limits.threads import THREADS
from envs.user_code import call_as, check_order, load_target, looked_at, make, raised_by
from trainer.config import CustomEngineConfig, RunConfig
from trainer.engines.engine import Completion, EngineStart, Sampling, version_name

_FACTS = ("runs_here", "publishes_merged")
_MEMBERS: dict[str, tuple[str, ...]] = {
    "start": ("given",),
    "generate": ("prompt_ids", "sampling"),
    "score": ("token_ids",),
    "publish": ("weights", "version"),
    "shutdown": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "sleep": (),
    "wake_up": (),
    "generate_base": ("prompt_ids",),
    "check_run": ("config",),
    "check_model": ("config", "folder"),
    "take_metrics": (),
    "aclose": (),
}
_BY_NAME = {
    "generate_base": ("max_tokens", "temperature", "top_p", "seed", "schema"),
    "check_model": ("trains",),
}
"""What is given by name besides."""
_REQUESTS = ("generate", "generate_base")
"""What may be given up half done."""
_MOST_LOGPROB = 1e-3
"""Rounding gives no more, and whoever gives probabilities gives more."""

_MOST_TOKENS = 2**31
"""No vocabulary is as large."""


class CustomEngine:
    """What the target gives, its answers checked. Raises `UserError` where that is no engine, `FoundLate` in the run.

    *Covered:* members that are missing or take something else, async or not (what is not runs in threads); answers of
    another form than `Engine` describes, an engine that does not stop where a turn ends, or that samples with another
    version than the one published. *Not covered:* which weights it runs, which the canary finds.
    """

    sleep: Callable[[], Any]
    """Absent where the target has none, as the other members are that an engine may have."""

    def __init__(self, config: CustomEngineConfig) -> None:
        self._where = f"engine.target {config.target!r}"
        self._version = 0
        self._stop_token_ids: frozenset[int] = frozenset()
        self._engine = self._made(config)
        with looked_at(self._where):
            self._check_members()
            self.runs_here, self.publishes_merged = (self._fact(name) for name in _FACTS)
            self.keeps_versions = hasattr(self._engine, "keeps_versions") and self._fact("keeps_versions")
            has = {name for name in _OPTIONAL if getattr(self._engine, name, None) is not None}
        if "sleep" in has:
            self.sleep, self.wake_up = self._sleep, self._wake_up
        if "generate_base" in has:
            self.generate_base = self._generate_base
        if "check_run" in has:
            self.check_run = self._check_run
        if "check_model" in has:
            self.check_model = self._check_model
        if "take_metrics" in has:
            self.take_metrics = self._engine.take_metrics
        if "aclose" in has:
            self.aclose = self._aclose

    # ---- before the run

    def _made(self, config: CustomEngineConfig) -> Any:
        target = load_target(config.target, key="engine.target")
        with looked_at(self._where):
            if not isinstance(target, type) and hasattr(target, "generate"):
                if config.kwargs:
                    raise UserError(f"{self._where}: kwargs: have no effect: it is an engine, and no class or factory")
                return target
            if not callable(target):
                raise UserError(f"{self._where}: expected a class or a factory, got {type(target).__name__}")
            made = make(target, copy.deepcopy(config.kwargs), where=self._where)
        if inspect.iscoroutine(made):
            made.close()
            raise UserError(f"{self._where}: expected an engine, not a coroutine: what takes time belongs in start()")
        return made

    def _check_members(self) -> None:
        kind = type(self._engine).__name__
        if lacks := [name for name in (*_FACTS, *_MEMBERS) if not hasattr(self._engine, name)]:
            raise UserError(
                f"{self._where}: {kind} has no {', '.join(lacks)}; see trainer/engines/engine.py: Engine, and "
                "docs/adding.md"
            )
        for one, other in (("sleep", "wake_up"), ("wake_up", "sleep")):
            if hasattr(self._engine, one) and not hasattr(self._engine, other):
                raise UserError(f"{self._where}: {kind} has {one}, and no {other}; expected both or neither")
        for name, parameters in (_MEMBERS | _OPTIONAL).items():
            member = getattr(self._engine, name, None)
            if member is None and name in _OPTIONAL:
                continue
            if not callable(member):
                raise UserError(f"{self._where}: {kind}.{name}: expected a method, got {type(member).__name__}")
            if name in _BY_NAME:
                self._check_by_name(name, member)
            else:
                check_order(member, parameters, f"{self._where}: {name}")

    def _check_by_name(self, name: str, member: Callable[..., Any]) -> None:
        by_place, by_name = _OPTIONAL[name], _BY_NAME[name]
        try:
            inspect.signature(member).bind(*by_place, **dict.fromkeys(by_name))
        except TypeError as e:
            called = f"{name}({', '.join((*by_place, *(f'{other}=' for other in by_name)))})"
            raise UserError(f"{self._where}: {name} is called as {called}, but: {e}") from None

    def _fact(self, name: str) -> bool:
        fact = getattr(self._engine, name)
        if not isinstance(fact, bool):
            raise UserError(f"{self._where}: {name}: expected true or false, got {fact!r:.80}")
        return fact

    def _check_run(self, config: RunConfig) -> None:
        with looked_at(f"{self._where}: check_run()"):
            self._engine.check_run(config)

    def _check_model(self, config: RunConfig, folder: Path, *, trains: bool) -> None:
        with looked_at(f"{self._where}: check_model()"):
            self._engine.check_model(config, folder, trains=trains)

    # ---- in the run

    async def start(self, given: EngineStart) -> None:
        self._stop_token_ids = frozenset(given.stop_token_ids)
        await self._asked("start", given)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        since = self._version
        return self._checked(await self._asked("generate", list(prompt_ids), sampling), sampling, since)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return self._logprobs(await self._asked("score", list(token_ids)), len(token_ids) - 1, "score")

    async def publish(self, weights: Path, version: int) -> None:
        if not self.keeps_versions:
            await self._at_rest()
        await self._asked("publish", weights, version)
        self._version = version

    def shutdown(self) -> None:
        with self._told("shutdown"):
            left = self._engine.shutdown()
            if inspect.iscoroutine(left):
                left.close()
                raise UserError(f"{self._where}: shutdown: expected a plain method; nothing waits for it at the end")

    async def _aclose(self) -> None:
        await self._asked("aclose")

    async def _at_rest(self) -> None:
        """Return when turns that nobody waits for any more have ended too: what is not async can't be cancelled."""
        for member in _REQUESTS:
            await THREADS.wait_for_hung(self._called(member))

    async def _sleep(self) -> None:
        await self._at_rest()
        await self._asked("sleep")

    async def _wake_up(self) -> None:
        await self._asked("wake_up")

    async def _generate_base(self, prompt_ids: Sequence[int], **how: Any) -> list[int]:
        """As `KeepsBase` has it."""
        return self._token_ids(await self._asked("generate_base", list(prompt_ids), **how), how["max_tokens"])

    async def _asked(self, member: str, *args: Any, **kwargs: Any) -> Any:
        with self._told(member):
            return await call_as(self._called(member), getattr(self._engine, member), *args, **kwargs)

    def _called(self, member: str) -> str:
        """What its calls are known by."""
        return f"{self._where}: {member}"

    @contextlib.contextmanager
    def _told(self, member: str) -> Iterator[None]:
        """What a connection raises is the world's fault, all else the engine's own: it passes, with its place."""
        where = f"{self._where}: {member}()"
        with raised_by(where):
            try:
                yield
            except OSError as e:
                raise WorldError(f"{where}: {type(e).__name__}: {e}") from e

    # ---- its answers

    def _checked(self, answer: Any, sampling: Sampling, since: int) -> Completion:
        """The answer to a request that was made under the version `since`."""
        if not isinstance(answer, Completion):
            raise self._wrong("generate", "a trainer.engines.engine.Completion", type(answer).__name__)
        token_ids = self._token_ids(answer.token_ids, sampling.max_tokens, "generate")
        if bool(answer.finished) is not (token_ids[-1] in self._stop_token_ids):
            ended = f"finished={answer.finished} and {token_ids[-1]} for the last token"
            raise self._wrong("generate", f"finished with a stop token ({self._stops()}) last, and only then", ended)
        if self._stop_token_ids.intersection(token_ids[:-1]):
            raise self._wrong("generate", f"a turn that ends at a stop token ({self._stops()})", "more tokens after it")
        if (answer.constrained_from is not None) != (sampling.schema is not None):
            expected = "constrained_from where the request has a schema, and only there"
            raise self._wrong("generate", expected, f"{answer.constrained_from}")
        begin = answer.constrained_from
        if begin is not None and not (isinstance(begin, int) and 0 <= begin <= len(token_ids)):
            raise self._wrong("generate", f"constrained_from from 0 to {len(token_ids)}", f"{begin!r}")
        if not isinstance(answer.policy_version, int) or isinstance(answer.policy_version, bool):
            raise self._wrong("generate", "policy_version as a whole number", f"{answer.policy_version!r}")
        first, last = (since, self._version) if sampling.version is None else (sampling.version, sampling.version)
        if not first <= answer.policy_version <= last:
            raise PublishError(
                f"{self._where}: generate() gives tokens of {version_name(answer.policy_version)} after "
                f"{version_name(last)} was published"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=self._logprobs(answer.logprobs, len(token_ids), "generate"),
            finished=bool(answer.finished),
            policy_version=answer.policy_version,
            constrained_from=answer.constrained_from,
        )

    def _token_ids(self, answer: Any, max_tokens: int, member: str = "generate_base") -> list[int]:
        try:
            token_ids = [operator.index(token_id) for token_id in answer]
        except TypeError:
            raise self._wrong(member, "a list of token ids", f"{answer!r:.80}") from None
        if not all(0 <= token_id < _MOST_TOKENS for token_id in token_ids):
            raise self._wrong(member, "ids of the model's tokens", f"{token_ids!r:.80}")
        if not 1 <= len(token_ids) <= max_tokens:
            raise self._wrong(member, f"1 to {max_tokens} tokens (max_tokens)", f"{len(token_ids)}")
        return token_ids

    def _logprobs(self, answer: Any, length: int, member: str) -> list[float]:
        try:
            logprobs = [float(x) for x in answer]
        except (TypeError, ValueError):
            raise self._wrong(member, "a list of log-probabilities", f"{answer!r:.80}") from None
        if len(logprobs) != length:
            raise self._wrong(member, f"{length} log-probabilities, one a token", f"{len(logprobs)}")
        for x in logprobs:
            if not math.isfinite(x) or x > _MOST_LOGPROB:
                raise self._wrong(member, "log-probabilities, none above 0", f"{x}")
        return logprobs

    def _stops(self) -> str:
        return ", ".join(map(str, sorted(self._stop_token_ids)))

    def _wrong(self, member: str, expected: str, got: str) -> FoundLate:
        return FoundLate(f"{self._where}: {member}(): expected {expected}; got {got}")
