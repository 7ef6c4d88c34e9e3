"""Trained tokens/s of `Policy.update` against a bare forward and backward of the same batch.

    python scripts/bench/training_throughput.py [--config FILE] [KEY=VALUE ...] [--rows 16 | --rollouts FILE]

Three ways through the same microbatches (`trainer.learning.packing`), one after the other in every repeat:

ours   `Policy.update`: packing, log-probabilities, the loss with its corrections, checks, metrics, optimizer.
bare   PEFT's LoRA model as PEFT makes it, transformers' forward, log-softmax at the trainable positions, backward.
core   our own model and head (`trainer.learning.adapter`, `trainer.learning.head`) with nothing around them. ours /
       core is what `update` adds; core / bare is what the faster LoRA forward and head give back.

Rows are expert episodes of the config's world (real lengths and microbatches), or with `--rollouts` those of a run:
`RUN/rollouts/step-000001.jsonl`. A token is one of a row, as in the run's `throughput/trained_tokens_per_s`; every row
has an advantage, so that none is skipped. The first pass of each is a warm-up and not counted.

*Not covered:* configs whose update makes more passes than one forward and backward (kl_coef above 0, several epochs or
minibatches) are refused; more than one process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Figure, adapted_policy, bench_config, parser, ratio, report, run_main

from envs.errors import UserError
from trainer.config import RunConfig
from trainer.learning.samples import sample_of

if TYPE_CHECKING:
    from trainer.learning.packing.rows import Microbatch
    from trainer.learning.samples import Sample
    from trainer.prepare import Prepared
    from trainer.types import Ledger


def expert_samples(prepared: Prepared, num_rows: int) -> list[Sample]:
    """The first tasks' expert episodes that fit into an episode's length, cycled where tasks are fewer than rows."""
    from trainer.learning.warmstart import expert_ledger
    from trainer.seeds import derive_seed

    async def play() -> list[Ledger]:
        ledgers: list[Ledger] = []
        for attempt in range(4 * num_rows):
            task = prepared.train_tasks[attempt % len(prepared.train_tasks)]
            if turns := prepared.world.expert_episode(task, derive_seed(prepared.config.seed, "bench", attempt)):
                ledger = await expert_ledger(task, turns, world=prepared.world, chat=prepared.chat)
                if len(ledger) <= prepared.config.rollout.max_episode_tokens:
                    ledgers.append(ledger)
            if len(ledgers) == num_rows:
                return ledgers
        raise UserError("the world has too few expert episodes within rollout.max_episode_tokens; give --rollouts FILE")

    ledgers = asyncio.run(play())
    return [
        sample_of(ledger, advantage=_advantage(i), rollout_id=f"expert-{i}", task_id="")
        for i, ledger in enumerate(ledgers)
    ]


def rollout_file_samples(path: Path) -> list[Sample]:
    """The rows of a run's rollouts file, all with an advantage."""
    from trainer.learning.samples import rollout_samples
    from trainer.runs.files import read_lines
    from trainer.runs.records import rollout_from_json

    rollouts = [rollout_from_json(record) for record in read_lines(path)]
    if not rollouts:
        raise UserError(f"--rollouts {path}: no rollouts; expected RUN/rollouts/step-NNNNNN.jsonl")
    return [
        sample
        for i, r in enumerate(rollouts)
        for sample in rollout_samples(
            r.ledgers, advantage=_advantage(i), rollout_id=r.episode.rollout_id, task_id=r.task.task_id
        )
    ]


def _advantage(index: int) -> float:
    return -1.0 if index % 2 else 1.0


def refuse_further_passes(config: RunConfig) -> None:
    if config.loss.kl_coef > 0 or config.optim.num_epochs * config.optim.minibatches > 1:
        raise UserError(
            "loss.kl_coef, optim.num_epochs and optim.minibatches: with a KL term, several epochs or minibatches an "
            "update makes more passes than the bare one; set them to 0, 1 and 1 to compare"
        )


def bare_pass(config: RunConfig, model_path: Path, device: Any, batches: Sequence[Microbatch]) -> Callable[[], None]:
    """PEFT's model, transformers' forward, plain log-softmax at the trainable positions."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.models.family import weights_dtype

    dtype = getattr(torch, weights_dtype(config.model, on_cpu=device.type == "cpu"))
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device)
    lora = config.model.lora
    peft = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    model = get_peft_model(base, peft)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parts = [batch.to(device) for batch in batches]

    def run() -> None:
        for batch in parts:
            hidden_BTH = base.get_decoder()(input_ids=batch.token_ids_BT, use_cache=False).last_hidden_state
            logits_NV = base.get_output_embeddings()(hidden_BTH.flatten(0, 1)[batch.positions_N]).float()
            loss = torch.nn.functional.cross_entropy(logits_NV, batch.targets_N)
            loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return run


def core_pass(policy: Any, temperature: float, batches: Sequence[Microbatch]) -> Callable[[], None]:
    """Our model and head, and a plain mean as the loss."""
    from trainer.learning.adapter import hidden_states, read_head
    from trainer.learning.head import token_logprobs

    model = policy.model
    head = read_head(model)
    parts = [batch.to(head.weight_VH.device) for batch in batches]

    def run() -> None:
        for batch in parts:
            hidden_NH = hidden_states(model, batch).flatten(0, 1)[batch.positions_N]
            loss = -token_logprobs(hidden_NH, head, batch.targets_N, temperature).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return run


def timed(run: Callable[[], object]) -> float:
    """Seconds, the work that a GPU has been given included."""
    import torch

    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=16, help="expert episodes in the batch (default 16)")
    arguments.add_argument("--rollouts", type=Path, help="take the rows of this rollouts file instead")
    given = arguments.parse_args()
    with bench_config(given) as config:
        refuse_further_passes(config)
        figures, about = measure(config, given.rows, given.rollouts, given.repeats)
    report("Training throughput", figures, about=about, json_path=given.json)


def measure(
    config: RunConfig, num_rows: int, rollouts: Path | None, repeats: int
) -> tuple[list[Figure], dict[str, Any]]:
    from trainer.prepare import prepare

    prepared = prepare(config)
    from accelerate import Accelerator

    from trainer.learning.packing.layouts import pack

    samples = rollout_file_samples(rollouts) if rollouts else expert_samples(prepared, num_rows)
    policy = adapted_policy(prepared, Accelerator(), None)
    batches = pack(samples, config.optim.max_microbatch_tokens, "padded")
    constants = {"temperature": config.rollout.temperature, "constant_tokens": config.rollout.max_episode_tokens}
    passes: dict[str, Callable[[], object]] = {
        "ours": lambda: policy.update(samples, config.loss, **constants),
        "bare": bare_pass(config, prepared.model_path, policy.accelerator.device, batches),
        "core": core_pass(policy, config.rollout.temperature, batches),
    }
    num_tokens = sum(len(s.token_ids) for s in samples)
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(1 + repeats):
        for name, run in passes.items():
            seconds = timed(run)
            print(f"{'warm-up' if repeat == 0 else f'repeat {repeat}'}: {name} {seconds:.1f} s", flush=True)
            if repeat:
                speeds[name].append(num_tokens / seconds)
    ours, bare, core = (Figure(name=name, unit="tokens/s", values=values) for name, values in speeds.items())
    figures = [ours, bare, core, ratio("ours / bare", ours, bare, target=0.95)]
    figures += [ratio("ours / core", ours, core), ratio("core / bare", core, bare)]
    about = {
        "batch": f"{len(samples)} rows, {num_tokens} tokens, {sum(s.num_trainable for s in samples)} of them "
        f"trainable, {len(batches)} microbatches, {sum(b.token_ids_BT.numel() for b in batches)} padded positions",
        "rows from": str(rollouts or "expert episodes"),
        "seed": config.seed,
    }
    return figures, about


if __name__ == "__main__":
    sys.exit(run_main(main))
