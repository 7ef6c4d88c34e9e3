"""Engines that write what a script says: all that no real engine can be made to do.

`ScriptedEngine` is exact: a real model says what the log-probabilities are. `Writer` has no model, as
rollouts ask of none.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from envs.errors import WorldError
from envs.finance.world import FinanceWorld
from envs.types import Task
from trainer.engines.engine import Completion, EngineStart, Sampling
from trainer.session import StartEngine
from trainer.templates.chat import Chat

Script = Callable[[str, int], str]
"""(text of the prompt, seed) → what the model writes. Always the same for the same arguments."""

_HEAD_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What the engine does wrong, for tests that must notice it."""

    stale_from: int | None = None
    """Publishes of this version and later ones are accepted and ignored."""
    always_base: bool = False
    """Every publish is accepted and ignored."""
    failing_requests: frozenset[int] = frozenset()
    """Requests (counted from 1) that end in a `WorldError`."""
    failing_seeds: Callable[[int], bool] = lambda seed: False
    """Requests that end in a `WorldError` on every try of the same seed."""
    score_noise: float = 0.0
    """Standard deviation of a constant error of each scored token, as another kernel makes it; nats."""
    delay_s: float = 0.0


class ScriptedEngine:
    """Implements `trainer.engines.engine.Engine`. One request at a time on one thread, so that it is deterministic."""

    runs_here = True
    publishes_merged = False

    def __init__(self, script: Script, faults: Faults | None = None) -> None:
        self.prompts: list[list[int]] = []
        """What each request was given."""
        self.completions: list[Completion] = []
        self.published: list[tuple[int, dict[str, torch.Tensor]]] = []
        """Version and adapter weights of each publish, ignored ones included."""
        self.version = 0
        self.is_shut_down = False
        self.is_asleep = False
        self._script = script
        self._faults = faults or Faults()
        self._adapted: Any = None

    async def start(self, given: EngineStart) -> None:
        assert given.device == "cpu"
        self.load(given.model_path, given.stop_token_ids)

    def load(self, model_path: Path, stop_token_ids: Sequence[int]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._stop_id = min(stop_token_ids)
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        assert not self.is_asleep
        self.prompts.append(list(prompt_ids))
        number = len(self.prompts)
        await asyncio.sleep(self._faults.delay_s)
        if number in self._faults.failing_requests or self._faults.failing_seeds(sampling.seed):
            raise WorldError(f"request {number} failed")
        text = self._script(self._tokenizer.decode(list(prompt_ids)), sampling.seed)
        token_ids = [*self._tokenizer.encode(text, add_special_tokens=False), self._stop_id][: sampling.max_tokens]
        completion = Completion(
            token_ids=token_ids,
            logprobs=self._logprobs([*prompt_ids, *token_ids], len(prompt_ids), sampling.temperature, sampling.schema),
            constrained_from=0 if sampling.schema else None,
            finished=token_ids[-1] == self._stop_id,
            policy_version=self.version,
        )
        self.completions.append(completion)
        return completion

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        assert not self.is_asleep
        noise = random.Random(str(list(token_ids)))
        return [x + noise.gauss(0, self._faults.score_noise) for x in self._logprobs(token_ids, 1, 1.0)]

    async def publish(self, weights: Path, version: int) -> None:
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        adapter = load_file(weights / "adapter_model.safetensors")
        assert not self.is_asleep
        self.published.append((version, adapter))
        self.version = version
        stale_from = self._faults.stale_from
        if self._faults.always_base or (stale_from is not None and version >= stale_from):
            return
        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(self._base, weights)
        else:
            set_peft_model_state_dict(self._adapted, adapter)

    async def sleep(self) -> None:
        assert not self.is_asleep
        self.is_asleep = True

    async def wake_up(self) -> None:
        assert self.is_asleep
        self.is_asleep = False

    def shutdown(self) -> None:
        self.is_shut_down = True

    @torch.no_grad()
    def _logprobs(
        self, token_ids: Sequence[int], start: int, temperature: float, schema: str | None = None
    ) -> list[float]:
        """Of the tokens from position `start` on. The head is applied in pieces: the vocabulary is large."""
        ids = torch.tensor([list(token_ids)])
        hidden_TH = self._base.model(input_ids=ids).last_hidden_state[0, start - 1 : -1]
        targets_T = ids[0, start:]
        forbidden_TV = self._forbidden(targets_T.tolist(), schema) if schema else None
        out: list[float] = []
        for i in range(0, len(targets_T), _HEAD_ROWS):
            logits = self._base.lm_head(hidden_TH[i : i + _HEAD_ROWS]) / (temperature or 1.0)
            if forbidden_TV is not None:
                logits = logits.masked_fill(forbidden_TV[i : i + _HEAD_ROWS], -torch.inf)
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            out += logprobs.gather(1, targets_T[i : i + _HEAD_ROWS, None])[:, 0].tolist()
        return out

    def _forbidden(self, answer: list[int], schema: str) -> torch.Tensor:
        """xgrammar applied to logits of zero, as vLLM applies it."""
        import xgrammar

        vocab_size = self._base.config.vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=vocab_size)
        matcher = xgrammar.GrammarMatcher(
            xgrammar.GrammarCompiler(info).compile_json_schema(schema), override_stop_tokens=[self._stop_id]
        )
        logits_TV, bitmask = torch.zeros(len(answer), vocab_size), xgrammar.allocate_token_bitmask(1, vocab_size)
        for i, token_id in enumerate(answer):
            matcher.fill_next_token_bitmask(bitmask)
            xgrammar.apply_token_bitmask_inplace(logits_TV[i : i + 1], bitmask)
            matcher.accept_token(token_id)
        return logits_TV.isinf()


class Writer:
    """A `Sampler` that writes what it is told, turn after turn; its log-probabilities tell token and request apart."""

    def __init__(self, chat: Chat, turns: Script | Sequence[str]) -> None:
        """A turn that ends in a stop token's text stops there; to others the end of an answer is added."""
        self._chat = chat
        self._turns = turns
        self.requests: list[tuple[list[int], Sampling]] = []
        self.completions: list[Completion] = []
        self.before_turn: Callable[[int], Any] = lambda number: None

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        number = len(self.requests)
        self.requests.append((list(prompt_ids), sampling))
        waiting = self.before_turn(number)
        if waiting is not None:
            await waiting
        prompt = self._chat.decode(prompt_ids)
        ids = self._chat._encode(self._turns(prompt, sampling.seed) if callable(self._turns) else self._turns[number])
        if not ids or ids[-1] not in self._chat.stop_token_ids:
            ids = [*ids, self._chat._answer_end.token_id]
        ids = ids[: sampling.max_tokens]
        completion = Completion(
            token_ids=ids,
            logprobs=[-0.001 * (i + 1) - number for i in range(len(ids))],
            finished=ids[-1] in self._chat.stop_token_ids,
            policy_version=7,
        )
        self.completions.append(completion)
        return completion


def engine_starter(
    script: Script, faults: Faults | None = None, started: list[ScriptedEngine] | None = None
) -> StartEngine:
    """What `train` takes as `start_engine`; each engine that it starts is appended to `started`."""

    async def start(given: EngineStart) -> ScriptedEngine:
        scripted = ScriptedEngine(script, faults)
        await scripted.start(given)
        if started is not None:
            started.append(scripted)
        return scripted

    return start


def call(name: str, /, **arguments: object) -> str:
    """A tool call as the fallback template writes it."""
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


BROKEN_CALL = '<tool_call>{"name": "search", "arguments": </tool_call>'


def finance_script(world: FinanceWorld) -> Script:
    """Plays finance tasks, with the outcome left to the seed: right answers, wrong ones, needless and broken calls."""
    by_question: dict[str, Task] = {t.messages[-1].content: t for s in ("train", "eval") for t in world.tasks(s)}

    def script(prompt: str, seed: int) -> str:
        task = next(task for question, task in by_question.items() if f"{question}<|im_end|>" in prompt)
        company, path = task.item["companies"][0], task.item["paths"][0]
        chance = random.Random(seed).random()
        if chance < 0.1:
            return BROKEN_CALL
        if chance < 0.2:
            return "about 12.5 million"
        if chance < 0.3:
            return call("list", path=path.partition("/")[0])
        if path not in prompt:
            return call("search", query=f"{company} {task.item['year']}")
        if call("cat", path=path) not in prompt:
            return call("cat", path=path)
        return str(task.item["answer"])

    return script
