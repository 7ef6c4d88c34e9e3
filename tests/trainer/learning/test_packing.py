"""Rows as a prefix tree against rows by themselves."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import families
from tests.support.policy_worker import VOCABULARY, random_samples, save_tiny_llama, tiny_policy
from trainer.config import LossConfig
from trainer.learning import adapter as lora
from trainer.learning.packing.attention import attention_of_tree, calls_by_level, nodes_of, reading_of
from trainer.learning.packing.choice import why_unproved
from trainer.learning.packing.layouts import pack
from trainer.learning.packing.rows import FixedRow, PrefixTree, used_length
from trainer.learning.packing.shares import share_out
from trainer.learning.packing.tree import num_unique_tokens
from trainer.learning.policy import Policy
from trainer.learning.samples import Sample, sample_of
from trainer.types import Ledger

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def moved(model: Path, layout: str, **optim: object) -> Policy:
    """A policy whose adapter changes something."""
    policy = tiny_policy(model, layout=layout, **optim)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy._parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert policy.layout == layout
    return policy


@pytest.fixture(scope="module")
def both(model) -> tuple[Policy, Policy]:
    return moved(model, "tree"), moved(model, "padded")


def branching_samples(seed: int, num_groups: int = 3, *, alphabet: int = VOCABULARY - 3) -> list[Sample]:
    """Rows that begin as their group does, or fork from an earlier row of it; a small alphabet makes more alike."""
    rng = random.Random(seed)
    system = rng.choices(range(3, 3 + alphabet), k=rng.randint(0, 6))
    samples: list[Sample] = []
    for group in range(num_groups):
        prompt = [*system, *rng.choices(range(3, 3 + alphabet), k=rng.randint(1, 9))]
        for i in range(rng.randint(1, 5)):
            ledger = Ledger()
            former = [s for s in samples if s.task_id == f"t{group}"]
            if former and rng.random() < 0.4:
                tokens = rng.choice(former).token_ids
                ledger.append_context(list(tokens[: rng.randint(1, len(tokens))]))
            else:
                ledger.append_context(prompt)
            for _turn in range(rng.randint(1, 3)):
                n = rng.randint(1, 6)
                ledger.append_sampled(rng.choices(range(3, 3 + alphabet), k=n), [-rng.uniform(1, 8)] * n, 0)
                ledger.append_context(rng.choices(range(3, 3 + alphabet), k=rng.randint(0, 3)))
            samples.append(
                sample_of(ledger, advantage=rng.choice([-1.0, 0.5]), rollout_id=f"{group}-{i}", task_id=f"t{group}")
            )
    return samples


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), alphabet=st.sampled_from([2, 20]), max_tokens=st.sampled_from([64, 10_000]))
def test_log_probabilities_and_gradients_over_a_tree_are_those_of_rows_by_themselves(both, seed, alphabet, max_tokens):
    samples = branching_samples(seed, alphabet=alphabet)
    results = []
    for policy in both:
        logprobs: dict[int, torch.Tensor] = {}
        for microbatch in pack(samples, max_tokens, policy.layout):
            parts = torch.split(policy.reader.logprobs(microbatch, 0.8, adapter=True), microbatch.num_trainable_B)
            logprobs |= dict(zip(microbatch.row_indices, parts, strict=True))
        in_order = torch.cat([logprobs[i] for i in range(len(samples))])
        weights = torch.linspace(-1, 1, len(in_order)) / len(in_order)
        gradients = torch.autograd.grad((in_order * weights).sum(), policy._parameters)
        results.append((in_order.detach(), torch.cat([g.flatten() for g in gradients])))
    (tree, tree_gradient), (padded, padded_gradient) = results
    torch.testing.assert_close(tree, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tree_gradient, padded_gradient, atol=1e-5, rtol=1e-5)


def read_by_level(tree: PrefixTree) -> torch.Tensor:
    """Whether a position reads another, as a GPU's kernel takes the calls; each pair is read by one call at most."""
    num_positions = len(tree.end_T)
    read_TT = torch.zeros(num_positions, num_positions, dtype=torch.int)
    for call in calls_by_level(nodes_of(tree), torch.device("cpu")):
        queries, keys = call.queries, call.keys
        of_queries = torch.arange(num_positions) if queries.positions is None else queries.positions
        of_keys = torch.arange(num_positions) if keys.positions is None else keys.positions
        assert len(queries.starts) == len(keys.starts) and queries.starts[-1] == len(of_queries)
        assert len(set(of_queries.tolist())) == len(of_queries) and len(set(of_keys.tolist())) == len(of_keys)
        for (a, b), (c, d) in zip(pairwise(queries.starts.tolist()), pairwise(keys.starts.tolist()), strict=True):
            assert 0 < b - a <= queries.longest and 0 < d - c <= keys.longest
            pairs = torch.ones(b - a, d - c, dtype=torch.int)
            read_TT[of_queries[a:b, None], of_keys[None, c:d]] += pairs.tril() if call.is_own else pairs
    assert read_TT.max() <= 1
    return read_TT.bool()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), alphabet=st.sampled_from([2, 20]), max_tokens=st.sampled_from([16, 40, 10_000]))
def test_a_tree_holds_each_token_once_and_reads_what_its_rows_read(seed, alphabet, max_tokens):
    samples = branching_samples(seed, alphabet=alphabet)
    microbatches = pack(samples, max_tokens, "tree")
    assert sorted(i for m in microbatches for i in m.row_indices) == list(range(len(samples)))
    for m in microbatches:
        ids_T, depth_T, num_positions = m.token_ids_BT[0], m.tree.depth_T, m.token_ids_BT.shape[1]
        assert num_positions <= max_tokens or len(m.row_indices) == 1
        used = [samples[i].token_ids[: used_length(samples[i])] for i in m.row_indices]
        prefixes = {row[: t + 1] for row in used for t in range(len(row))}
        assert num_positions == len(prefixes)
        q_T = torch.arange(num_positions)
        mask_TT = (q_T[None] <= q_T[:, None]) & (q_T[:, None] < m.tree.end_T[None])
        # What a position reads, in order, is one row's beginning; all together are all beginnings.
        seen = [tuple(ids_T[read].tolist()) for read in mask_TT]
        assert set(seen) == prefixes
        assert [len(row) - 1 for row in seen] == depth_T.tolist()
        # The stretches are the same mask, called node by node and level by level.
        by_nodes_TT = torch.zeros_like(mask_TT)
        for start, end, last in nodes_of(m.tree):
            by_nodes_TT[start:end, start:end] = torch.ones(end - start, end - start).tril()
            by_nodes_TT[end:last, start:end] = True
        assert torch.equal(by_nodes_TT, mask_TT)
        assert torch.equal(read_by_level(m.tree), mask_TT)
        targets = [t for i in m.row_indices for t in samples[i].trained(samples[i].token_ids)]
        assert m.targets_N.tolist() == targets
        before = [samples[i].token_ids[:t] for i in m.row_indices for t, on in enumerate(samples[i].trainable) if on]
        assert [seen[p] for p in m.positions_N.tolist()] == before


DEVICES = [
    ("cpu", torch.float32),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("sizes", [(16, 16), (24, 12), (20, 20), (64, 64)])
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_attention_over_a_tree_is_attention_under_its_mask(device, dtype, sizes):
    """Against a product of all pairs in float64; grouped heads, and values of another size than keys."""
    torch.manual_seed(0)
    for seed in range(6):
        [microbatch] = pack(branching_samples(seed), 10_000, "tree")
        tree = microbatch.tree.to(torch.device(device))
        end_T = tree.end_T
        q_T = torch.arange(len(end_T), device=device)
        mask_TT = (q_T[None] <= q_T[:, None]) & (q_T[:, None] < end_T[None])
        given = [
            torch.randn(1, heads, len(end_T), size, dtype=dtype, device=device, requires_grad=True)
            for heads, size in ((6, sizes[0]), (2, sizes[0]), (2, sizes[1]))
        ]
        out_BTHD, _ = attention_of_tree(None, *given, None, tree_reading=reading_of(tree))
        exact = [x.detach().double().requires_grad_() for x in given]
        query, key, value = exact[0], *(x.repeat_interleave(3, dim=1) for x in exact[1:])
        scores = (query @ key.transpose(2, 3)) * sizes[0] ** -0.5
        expected_BTHD = (scores.masked_fill(~mask_TT, -torch.inf).softmax(-1) @ value).transpose(1, 2)
        weights = torch.randn_like(expected_BTHD)
        gradients = torch.autograd.grad((out_BTHD.double() * weights).sum(), given)
        gradients_expected = torch.autograd.grad((expected_BTHD * weights).sum(), exact)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for got, wanted in zip((out_BTHD, *gradients), (expected_BTHD, *gradients_expected), strict=True):
            assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(kl_coef=0.05, normalisation="sequence")])
@pytest.mark.parametrize("updates", [1, 2])
def test_updates_over_a_tree_are_those_of_padded_rows(model, loss, updates):
    policies = [
        tiny_policy(model, layout=layout, minibatches=updates, max_microbatch_tokens=64)
        for layout in ("tree", "padded")
    ]
    for step in range(2):
        samples = branching_samples(step)
        done = [policy.update(samples, loss, temperature=0.8, constant_tokens=64) for policy in policies]
        for a, b in zip(done[0].logprobs, done[1].logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        assert done[0].metrics == pytest.approx(done[1].metrics, rel=1e-3, abs=1e-4)
    tree, padded = (policy.state_dict()["adapter"] for policy in policies)
    for name in tree:
        torch.testing.assert_close(tree[name], padded[name], atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_recomputes_over_the_same_tree(model):
    samples = branching_samples(3)
    weights = []
    for gradient_checkpointing in (False, True):
        policy = tiny_policy(model, gradient_checkpointing=gradient_checkpointing)
        policy.update(samples, LossConfig(), temperature=1.0, constant_tokens=64)
        assert policy.layout == "tree"
        weights.append(policy.state_dict()["adapter"])
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=1e-5)


def test_a_model_in_bfloat16_gives_over_a_tree_what_rounding_allows(tmp_path):
    model = save_tiny_llama(tmp_path, dtype=torch.bfloat16)
    samples = branching_samples(5)
    tree, padded = (
        torch.cat(
            moved(
                model,
                x,
            ).logprobs(samples, temperature=1.0)
        )
        for x in ("tree", "padded")
    )
    assert (tree - padded).abs().mean() < 0.1


def test_a_tree_larger_than_the_limit_is_cut_where_the_least_is_shared():
    trunk = list(range(3, 13))
    groups = [[*trunk, *range(20 + 10 * g, 28 + 10 * g)] for g in range(2)]
    rows = [FixedRow(token_ids=[*group, 80 + i, 90]) for group in groups for i in range(3)]
    # 10 + 2 · (8 + 3); a row's last token is only predicted.
    assert num_unique_tokens(rows) == 32
    parts = [sorted(m.row_indices) for m in pack(rows, 30, "tree")]
    assert parts == [[0, 1, 2], [3, 4, 5]]
    assert [m.token_ids_BT.numel() for m in pack(rows, 30, "tree")] == [21, 21]


def test_rows_that_share_nothing_fill_microbatches_by_their_sum():
    rows = [FixedRow(token_ids=[first] * (n + 1)) for first, n in enumerate((50, 30, 20, 40, 10, 50), start=3)]
    microbatches = pack(rows, 100, "tree")
    assert [m.token_ids_BT.numel() for m in microbatches] == [100, 100]


def test_a_row_longer_than_the_limit_stands_alone_in_a_tree_too():
    rows = [FixedRow(token_ids=list(range(3, 90))), FixedRow(token_ids=[3, 4, 5]), FixedRow(token_ids=[9, 4, 5])]
    assert [m.row_indices for m in pack(rows, 64, "tree")] == [(0,), (1, 2)]


def test_processes_get_whole_groups_or_whole_rollouts_of_a_group_that_is_too_large():
    samples = random_samples(4, 4)
    shares = share_out(samples, 2, cost=num_unique_tokens)
    assert sorted(map(id, samples)) == sorted(id(s) for share in shares for s in share)
    assert not {s.task_id for s in shares[0]} & {s.task_id for s in shares[1]}
    one_group = [replace(s, task_id="t") for s in samples]
    shares = share_out(one_group, 2, cost=num_unique_tokens)
    costs = [num_unique_tokens(share) for share in shares]
    assert max(costs) < 1.5 * min(costs)
    assert not {s.rollout_id for s in shares[0]} & {s.rollout_id for s in shares[1]}


PADDED = {
    "qwen3-next": "layers of linear_attention",
    "qwen3.5": "layers of linear_attention",
    "gemma2": "layers of sliding_attention",
    "gemma3": "layers of sliding_attention",
    "gemma3-vision": "layers of sliding_attention",
    "cohere2": "layers of sliding_attention",
    "mistral": "a sliding window of 4096 tokens",
    "mistral3": "a sliding window of 4096 tokens",
    "gpt-oss": "can't be exchanged",
}
"""Why; all other families share prefixes."""


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_family_shares_prefixes_where_all_its_layers_attend_to_everything_before(family, tmp_path):
    folder = families.build(family, tmp_path / "model", tmp_path)
    policy, padded = (tiny_policy(folder, layout=layout) for layout in ("tree", "padded"))
    if family in PADDED:
        assert policy.layout == "padded" and PADDED[family] in policy.padded_because
    else:
        assert (policy.layout, policy.padded_because) == ("tree", "")
    samples = branching_samples(2)
    for tree, alone in zip(*(p.logprobs(samples, temperature=1.0) for p in (policy, padded)), strict=True):
        torch.testing.assert_close(tree, alone, atol=1e-4, rtol=1e-4)


def test_attention_asked_for_by_name_is_left_alone(model):
    from accelerate import Accelerator

    from trainer.config import ModelConfig, OptimConfig

    eager = Policy(model, ModelConfig(dtype="float32", attn_implementation="eager"), OptimConfig(), Accelerator(), 0)
    assert eager.layout == "padded" and "model.attn_implementation is eager" in eager.padded_because


def test_the_rounding_of_a_trained_model_in_16_bits_does_not_keep_its_rows_padded(smollm2):
    from accelerate import Accelerator

    from trainer.config import ModelConfig, OptimConfig

    policy = Policy(smollm2, ModelConfig(dtype="bfloat16"), OptimConfig(), Accelerator(), 0)
    assert policy.padded_because == ""


def without_tree(model, microbatch):
    return lora.hidden_states(model, replace(microbatch, tree=None))


def without_places(model, microbatch):
    tree = microbatch.tree
    if tree is not None:
        tree = replace(tree, depth_T=torch.arange(len(tree.depth_T)))
    return lora.hidden_states(model, replace(microbatch, tree=tree))


def without_attention(model, microbatch):
    assert microbatch.tree is None, "no such kernel"
    return lora.hidden_states(model, microbatch)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (without_tree, "hidden states and gradients"),
        (without_places, "hidden states and gradients"),
        (without_attention, "AssertionError: no such kernel"),
    ],
)
def test_a_model_that_reads_a_tree_in_another_way_keeps_its_rows_padded(model, wrong, why):
    policy = tiny_policy(model, layout="padded")
    before = policy.model.get_base_model().config._attn_implementation
    assert why in why_unproved(policy.model, wrong)
    assert policy.model.get_base_model().config._attn_implementation == before
    assert why_unproved(policy.model, lora.hidden_states) == ""
