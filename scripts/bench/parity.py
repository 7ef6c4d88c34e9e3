"""Does what was exported answer as the trainer's engine did?

    python scripts/bench/parity.py --run RUN --adapter-url URL --merged-url URL --merged FOLDER --gguf FILE ...

The run's own greedy evaluation (`eval.temperature: 0`) at its last step, or at `--step`, is what the trainer's engine
wrote. Each artefact is asked twice, on the same held-out tasks:

same tokens     it scores the trainer's episodes: how far the log-probabilities of the sampled tokens lie apart, and for
                which share of them the token is the artefact's first choice, too (the trainer's was greedy).
own episodes    it plays the tasks greedily, through the run's tools and grader: how many episodes are the trainer's,
                token for token, and the mean reward.

Where two tokens are nearly as likely, rounding decides between them, and the rest of an episode follows: single
precision agrees where half precision parts. `--adapter-url` and `--merged-url` are vLLM servers (`scripts/serve.py`,
and the command of the merged export's card), `--merged` is loaded by transformers, `--gguf` by llama-cpp-python.
`--same-tokens` leaves the own episodes out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import httpx
import numpy as np
from common import environment, run_main

from envs.errors import UserError, WorldError
from trainer.engines.engine import Completion, Sampling
from trainer.evaluate import eval_requests
from trainer.exports.commands import SERVED_NAME
from trainer.exports.trained import find_trained
from trainer.prepare import Prepared, prepare
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.files import step_files, whole_lines
from trainer.runs.records import rollout_in
from trainer.types import Rollout

Judged = tuple[list[float], list[bool]]
"""Of every token but the first its log-probability, and whether it is the first choice."""


class Artefact(Protocol):
    """A sampler that also scores."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion: ...

    async def judge(self, token_ids: Sequence[int]) -> Judged: ...


class Served:
    """vLLM over HTTP."""

    def __init__(self, url: str, stop_token_ids: list[int]) -> None:
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), timeout=900)
        self._stops = stop_token_ids

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        choice = await self._complete(
            prompt_ids,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            stop_token_ids=self._stops,
            return_token_ids=True,
        )
        logprobs = choice["logprobs"]["token_logprobs"]
        return _completion(choice["token_ids"], logprobs, finished=choice["finish_reason"] == "stop")

    async def judge(self, token_ids: Sequence[int]) -> Judged:
        choice = await self._complete(token_ids, max_tokens=1, prompt_logprobs=1)
        told = [entry[str(i)] for i, entry in zip(token_ids[1:], choice["prompt_logprobs"][1:], strict=True)]
        return [entry["logprob"] for entry in told], [entry["rank"] == 1 for entry in told]

    async def _complete(self, prompt_ids: Sequence[int], **how: Any) -> dict[str, Any]:
        asked = {"model": SERVED_NAME, "prompt": list(prompt_ids), "temperature": 0, "top_p": 1, "top_k": 0, **how}
        try:
            answer = await self._http.post("/v1/completions", json=asked)
        except httpx.HTTPError as e:
            raise UserError(f"{self._http.base_url}: no answer ({e or type(e).__name__})") from e
        if answer.is_error:
            raise WorldError(f"{self._http.base_url}: {answer.text}")
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice


class Local:
    """A model in this process: `logits_TV` of a token sequence, `stops` end a turn."""

    def __init__(self, logits: Callable[[Sequence[int]], Any], stop_token_ids: list[int]) -> None:
        self._logits = logits
        self._stops = {*stop_token_ids}
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    def of(cls, load: Callable[[Path], Callable[[Sequence[int]], Any]], path: Path, stop_token_ids: list[int]) -> Local:
        return cls(load(path), stop_token_ids)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._generated, list(prompt_ids), sampling.max_tokens)

    def _generated(self, token_ids: list[int], max_tokens: int) -> Completion:
        own: list[int] = []
        logprobs: list[float] = []
        while len(own) < max_tokens and not (own and own[-1] in self._stops):
            scores_V = _log_softmax(self._logits([*token_ids, *own])[-1:])[0]
            own.append(int(scores_V.argmax()))
            logprobs.append(float(scores_V.max()))
        return _completion(own, logprobs, finished=own[-1] in self._stops)

    async def judge(self, token_ids: Sequence[int]) -> Judged:
        scores_TV = _log_softmax(self._logits(list(token_ids))[:-1])
        taken = np.array(token_ids[1:])
        return scores_TV[np.arange(len(taken)), taken].tolist(), (scores_TV.argmax(-1) == taken).tolist()


def _completion(token_ids: list[int], logprobs: list[float], *, finished: bool) -> Completion:
    return Completion(token_ids=token_ids, logprobs=logprobs, finished=finished, policy_version=0)


def _log_softmax(logits_TV: Any) -> Any:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def in_transformers(folder: Path) -> Callable[[Sequence[int]], Any]:
    """Logits in float64 of all tokens, what two sequences begin alike computed once."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    kept: dict[str, Any] = {"ids": [], "cache": DynamicCache(), "logits": None}

    def logits(token_ids: Sequence[int]) -> Any:
        goes_on = bool(kept["ids"]) and list(token_ids[: len(kept["ids"])]) == kept["ids"] != list(token_ids)
        if not goes_on:
            kept.update(ids=[], cache=DynamicCache(), logits=None)
        new = torch.tensor([list(token_ids[len(kept["ids"]) :])])
        with torch.no_grad():
            made = model(new, past_key_values=kept["cache"], use_cache=True).logits[0].double().numpy()
        kept.update(ids=list(token_ids), logits=made if not goes_on else np.concatenate([kept["logits"], made]))
        return kept["logits"]

    return logits


def in_llama_cpp(file: Path, *, length: int) -> Callable[[Sequence[int]], Any]:
    """Likewise; llama-cpp-python keeps what the last sequence began with."""
    import llama_cpp

    if not file.is_file():
        raise UserError(f"--gguf {file}: no such file")
    model = llama_cpp.Llama(str(file), n_ctx=length, logits_all=True, verbose=False)

    def logits(token_ids: Sequence[int]) -> Any:
        kept = list(model.input_ids[: model.n_tokens])
        goes_on = kept == list(token_ids[: len(kept)]) and len(kept) < len(token_ids)
        if not goes_on:
            model.reset()
        model.eval(list(token_ids[model.n_tokens :]))
        return np.array(model.scores[: len(token_ids)], dtype=np.float64)

    return logits


# ---- figures


def reference(run: Path, step: int) -> list[Rollout]:
    """The run's evaluation, by task."""
    files = step_files(run / "evals", step)
    found = [r for file in files for line in whole_lines(file) if (r := rollout_in(line)) is not None]
    if not found:
        raise UserError(f"{run / 'evals'}: holds no evaluation at step {step}")
    return found


async def same_tokens(artefact: Artefact, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    differences: list[float] = []
    first: list[bool] = []
    for ledger in (ledger for rollout in rollouts for ledger in rollout.ledgers):
        logprobs, choices = await artefact.judge(ledger.prompt_ids)
        sampled = [i for i, is_sampled in enumerate(ledger.trainable) if is_sampled]
        differences += [abs(logprobs[i - 1] - ledger.logprobs[i]) for i in sampled]
        first += [choices[i - 1] for i in sampled]
    return {
        "tokens": len(first),
        "mean |Δ logprob|, nats": fmean(differences),
        "99th percentile": float(np.quantile(differences, 0.99)),
        "first choice": fmean(first),
    }


async def own_episodes(artefact: Artefact, prepared: Prepared, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    config = prepared.config
    of_task = {rollout.task.task_id: rollout for rollout in rollouts}
    tasks = [task for task in prepared.eval_tasks if task.task_id in of_task]
    worker = RolloutWorker(
        world=prepared.world,
        grader=prepared.grader,
        chat=prepared.chat,
        engine=artefact,
        config=config.rollout,
        users=prepared.users,
        max_num_seqs=config.engine.max_num_seqs,
    )
    one_each = config.model_copy(update={"eval": config.eval.model_copy(update={"samples_per_task": 1})})
    played = await worker.run(eval_requests(one_each, tasks, run_id="parity", step=0), temperature=0.0)
    same = [_tokens(rollout) == _tokens(of_task[rollout.task.task_id]) for rollout in played]
    return {
        "episodes": len(played),
        "equal episodes": sum(same),
        "mean reward": fmean(r.grade.reward for r in played if r.grade is not None),
        "the trainer's": fmean(r.grade.reward for r in of_task.values() if r.grade is not None),
    }


def _tokens(rollout: Rollout) -> list[list[int]]:
    return [ledger.prompt_ids for ledger in rollout.ledgers]


def main() -> None:
    arguments = _parser().parse_args()
    trained = find_trained(arguments.run, arguments.step)
    if trained.config.eval.temperature != 0:
        raise UserError(f"--run {trained.run}: was not evaluated greedily; train with eval.temperature: 0")
    rollouts = reference(trained.run, trained.step)[: arguments.tasks]
    with tempfile.TemporaryDirectory(prefix="agent-rft-parity-") as folder:
        # The run's own folder stays untouched.
        prepared = prepare(trained.config.model_copy(update={"output_dir": Path(folder) / "run"}))
    stops = sorted(prepared.chat.stop_token_ids)
    # A tool's last result may go beyond what an episode's turns are held to.
    longest = max(len(ledger) for rollout in rollouts for ledger in rollout.ledgers)
    length = 1 + max(longest, 2 * trained.config.rollout.max_episode_tokens)
    arms: dict[str, Callable[[], Artefact]] = {}
    for name, url in (("adapter, vLLM", arguments.adapter_url), ("merged, vLLM", arguments.merged_url)):
        if url is not None:
            arms[name] = partial(Served, url, stops)
    if arguments.merged is not None:
        arms["merged, transformers"] = partial(Local.of, in_transformers, arguments.merged, stops)
    for file in arguments.gguf:
        arms[f"{file.parent.name}, llama.cpp"] = partial(Local.of, partial(in_llama_cpp, length=length), file, stops)
    for key, value in environment().items():
        print(f"{key}: {value}")
    for name, make in arms.items():
        found = asyncio.run(_measured(make(), prepared, rollouts, own=not arguments.same_tokens))
        print(f"{name}: {json.dumps(found)}", flush=True)


async def _measured(artefact: Artefact, prepared: Prepared, rollouts: list[Rollout], *, own: bool) -> dict[str, Any]:
    found = await same_tokens(artefact, rollouts)
    return found | (await own_episodes(artefact, prepared, rollouts) if own else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's policy of this step")
    parser.add_argument("--tasks", type=int, default=20, help="held-out tasks (default 20)")
    parser.add_argument("--adapter-url", metavar="URL", help="a vLLM server with the adapter")
    parser.add_argument("--merged-url", metavar="URL", help="a vLLM server with the merged weights")
    parser.add_argument("--merged", type=Path, metavar="FOLDER", help="merged weights, for transformers")
    parser.add_argument("--gguf", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument("--same-tokens", action="store_true", help="score the trainer's episodes only")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
