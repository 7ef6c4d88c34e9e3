"""Trained tokens/s of `Policy.update` with shared prefixes, without, beside trl, and beside bare passes.

    python scripts/bench/training_throughput.py [--config FILE] [KEY=VALUE ...]
        [--rows 16 | --rollouts FILE | --groups 1 [--group-size 8]] [--arms ours,padded,bare,core,trl,trl-1]

Ways through the same rows, one after the other in every repeat, each from the same random adapter:

ours    `Policy.update` with the config's `optim.layout`: packing, log-probabilities, the loss with its corrections,
        checks, metrics, optimizer.
padded  the same with `optim.layout: padded`.
bare    PEFT's LoRA model as PEFT makes it, transformers' forward over padded rows, log-softmax at the trainable
        positions, backward.
core    our own model and head (`trainer.learning.adapter`, `trainer.learning.head`) over padded rows with nothing
        around them. padded / core is what `update` adds; core / bare is what the faster LoRA forward and head give.
trl     trl's GRPOTrainer with the same rank and dtype, all rows as one batch, without gradient checkpointing; its
        loss, backward, clip and AdamW are timed (see `trl_update.py`). trl-1: a row a batch. The gradient's norm is
        printed for each: the same work.

Rows are expert episodes of the config's world (real lengths), or with `--rollouts` those of a run
(`RUN/rollouts/step-000001.jsonl`), or with `--groups` rows of random tokens: each group a prompt of 384 tokens and
completions of 128, of which 32 in the middle are a tool's; `--groups N --group-size 1` shares nothing. A token is one
of a row, as in the run's `throughput/trained_tokens_per_s`; every row has an advantage, so that none is skipped. The
first pass of each is a warm-up and not counted.

Beside the speed stand what memory rose to over what lay there before (process or GPU), and the share of the matrix
products that this machine reaches on its own: the products that the rows need when each distinct token is computed
once (base forward and backward, adapter, causal attention, head), by the time.

*Not covered:* configs whose update makes more passes than one forward and backward (kl_coef above 0, several epochs or
minibatches) are refused; more than one process.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Figure, PeakMemory, adapted_policy, bench_config, parser, ratio, report, run_main

from envs.errors import UserError
from trainer.config import LossConfig, RunConfig
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


def group_samples(num_groups: int, group_size: int, *, seed: int) -> list[Sample]:
    """Groups of random tokens: a prompt of 384, completions of 128 of which 96 are trainable."""
    from trainer.types import Ledger

    draws = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return draws.choices(range(100, 20_000), k=n)

    samples = []
    for group in range(num_groups):
        prompt = tokens(384)
        for i in range(group_size):
            ledger = Ledger()
            ledger.append_context(prompt)
            ledger.append_sampled(tokens(48), [-10.0] * 48, 0)
            ledger.append_context(tokens(32))
            ledger.append_sampled(tokens(48), [-10.0] * 48, 0)
            samples.append(
                sample_of(ledger, advantage=_advantage(i), rollout_id=f"{group}-{i}", task_id=f"group-{group}")
            )
    return samples


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


def needed_operations(policy: Any, samples: Sequence[Sample]) -> float:
    """Floating-point operations of the matrix products that one update needs, each distinct token computed once.

    A frozen matrix takes two products a token (outputs, gradient of the inputs), an adapter's three, attention's two
    kinds of scores and values three each over what a token reads.
    """
    from trainer.learning.packing.layouts import pack

    [whole] = pack(samples, sum(len(s.token_ids) for s in samples), "tree")
    assert whole.tree is not None
    num_tokens, reads = whole.token_ids_BT.numel(), float((whole.tree.depth_T + 1).sum())
    base = policy.model.get_base_model()
    text = base.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = {name: p.numel() for name, p in base.get_decoder().named_parameters() if p.ndim == 2}
    frozen = sum(n for name, n in layers.items() if ".lora_" not in name and "embed" not in name)
    adapter = sum(n for name, n in layers.items() if ".lora_" in name)
    attention = 6 * text.num_hidden_layers * text.num_attention_heads * head_dim * reads
    head = 2 * base.get_output_embeddings().weight.numel() * len(whole.targets_N)
    return 2.0 * float(num_tokens * (2 * frozen + 3 * adapter) + attention + head)


def products_per_s(weight: Any) -> float:
    """Floating-point operations a second that this machine reaches in products with one of the model's matrices."""
    import torch

    inputs = torch.randn(2048, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seconds = min(timed(lambda: torch.nn.functional.linear(inputs, weight)) for _ in range(10))
    return 2.0 * 2048 * float(weight.numel()) / seconds


ARMS = ("ours", "padded", "bare", "core", "trl", "trl-1")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=16, help="expert episodes in the batch (default 16)")
    arguments.add_argument("--rollouts", type=Path, help="take the rows of this rollouts file instead")
    arguments.add_argument("--groups", type=int, help="take so many groups of random tokens instead")
    arguments.add_argument("--group-size", type=int, default=8, help="rows of each of those groups (default 8)")
    arguments.add_argument("--arms", default="ours,padded,bare", help=f"{', '.join(ARMS)} (default ours,padded,bare)")
    given = arguments.parse_args()
    arms = given.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"--arms: no {unknown[0]!r}; expected some of {', '.join(ARMS)}")
    with bench_config(given) as config:
        refuse_further_passes(config)
        figures, about = measure(config, given, arms)
    report("Training throughput", figures, about=about, json_path=given.json)


def measure(config: RunConfig, given: Any, arms: Sequence[str]) -> tuple[list[Figure], dict[str, Any]]:
    from trainer.prepare import prepare

    prepared = prepare(config)
    from accelerate import Accelerator

    from trainer.learning.adapter import load_weights, random_changes

    if given.groups:
        samples, source = group_samples(given.groups, given.group_size, seed=config.seed), "random groups"
    elif given.rollouts:
        samples, source = rollout_file_samples(given.rollouts), str(given.rollouts)
    else:
        samples, source = expert_samples(prepared, given.rows), "expert episodes"
    policy = adapted_policy(prepared, Accelerator(), None)
    for weights in random_changes(policy.model, size=0.05).values():
        load_weights(policy.model, weights)
    start = policy.state_dict()
    passes = passes_of(arms, policy, prepared, samples)
    num_tokens = sum(len(s.token_ids) for s in samples)
    needed = needed_operations(policy, samples)
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    peaks: dict[str, list[float]] = {name: [] for name in passes}
    shares: dict[str, list[float]] = {name: [] for name in passes}
    matrix = next(p for name, p in policy.model.named_parameters() if name.endswith("base_layer.weight"))
    for repeat in range(1 + given.repeats):
        for name, run in passes.items():
            policy.load_state_dict(start)
            peak = products_per_s(matrix)
            with PeakMemory() as memory:
                seconds = timed(run)
            print(f"{'warm-up' if repeat == 0 else f'repeat {repeat}'}: {name} {seconds:.1f} s", flush=True)
            if repeat:
                speeds[name].append(num_tokens / seconds)
                peaks[name].append(memory.risen_mib)
                shares[name].append(needed / seconds / peak)
    speed = {name: Figure(name=name, unit="tokens/s", values=values) for name, values in speeds.items()}
    figures = list(speed.values())
    figures += [ratio(f"{a} / {b}", speed[a], speed[b]) for a, b in _PAIRS if a in speed and b in speed]
    figures += [Figure(name=f"{name}: memory over rest", unit="MiB", values=values) for name, values in peaks.items()]
    figures += [
        Figure(name=f"{name}: of the matrix peak", unit="share", values=values) for name, values in shares.items()
    ]
    return figures, about_of(config, policy, samples, source)


_PAIRS = (
    *(("ours", other) for other in ARMS[1:]),
    ("padded", "trl"),
    ("padded", "trl-1"),
    ("padded", "bare"),
    ("padded", "core"),
    ("core", "bare"),
)
"""Of which ratios are given, where both ran."""


def passes_of(
    arms: Sequence[str], policy: Any, prepared: Prepared, samples: Sequence[Sample]
) -> dict[str, Callable[[], object]]:
    from trainer.learning.packing.layouts import pack

    config = prepared.config
    temperature, max_tokens = config.rollout.temperature, config.optim.max_microbatch_tokens
    # trl's rows have no sampler's log-probabilities, so that nothing is corrected by them.
    loss = LossConfig(tis_cap=None) if {"trl", "trl-1"} & {*arms} else config.loss

    def update(layout: str) -> Callable[[], object]:
        def run() -> None:
            policy.layout = layout
            updated = policy.update(
                samples, loss, temperature=temperature, constant_tokens=config.rollout.max_episode_tokens
            )
            print(f"{layout}: gradient norm {updated.metrics['grad_norm']:.5f}", flush=True)

        return run

    def trl(rows_a_batch: int) -> Callable[[], object]:
        from trl_update import trl_pass

        return trl_pass(prepared, policy, samples, rows_a_batch=rows_a_batch)

    made: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: update(policy.layout),
        "padded": lambda: update("padded"),
        "bare": lambda: bare_pass(
            config, prepared.model_path, policy.accelerator.device, pack(samples, max_tokens, "padded")
        ),
        "core": lambda: core_pass(policy, temperature, pack(samples, max_tokens, "padded")),
        "trl": lambda: trl(len(samples)),
        "trl-1": lambda: trl(1),
    }
    return {arm: made[arm]() for arm in arms}


def about_of(config: RunConfig, policy: Any, samples: Sequence[Sample], source: str) -> dict[str, Any]:
    from trainer.learning.packing.layouts import Layout, pack
    from trainer.learning.packing.tree import num_unique_tokens

    def positions(layout: Layout) -> str:
        batches = pack(samples, config.optim.max_microbatch_tokens, layout)
        return f"{sum(b.token_ids_BT.numel() for b in batches)} in {len(batches)} microbatches"

    return {
        "batch": f"{len(samples)} rows, {sum(len(s.token_ids) for s in samples)} tokens, "
        f"{num_unique_tokens(samples)} of them distinct, {sum(s.num_trainable for s in samples)} trainable",
        "positions": f"tree {positions('tree')}, padded {positions('padded')}",
        "rows from": source,
        "weights": str(next(policy.model.get_base_model().get_decoder().parameters()).dtype),
        "seed": config.seed,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
