"""How logits are made, and what log-probabilities and gradients come of them: plain autograd, transformers' models."""

from __future__ import annotations

import itertools

import pytest
import torch

from envs.errors import UserError
from tests.support.policy_worker import VOCABULARY, naive_logprobs, random_samples, tiny_policy
from trainer.learning.head import Head, token_logprobs, token_logprobs_and_entropy
from trainer.learning.packing.layouts import pack

HEADS = {
    "plain": {},
    "scaled": {"scale": 0.0625},
    "capped": {"cap": 1.5},
    "with a bias": {"bias": True},
    "all": {"scale": 2.5, "cap": 1.5, "bias": True},
}


def random_head(vocabulary: int, hidden: int, *, bias: bool = False, **how: float) -> Head:
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64)
    return Head(weight_VH=weight, bias_V=torch.randn(vocabulary, dtype=torch.float64) if bias else None, **how)


def naive_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V)
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return logits * head.scale


@pytest.mark.parametrize("name", HEADS)
def test_log_probabilities_and_gradient_are_those_of_a_log_softmax_in_every_chunk(monkeypatch, name):
    monkeypatch.setattr("trainer.learning.head.CHUNK_BYTES", 4 * 11 * 3)
    head = random_head(11, 5, **HEADS[name])
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 11, (8,)), torch.randn(8, dtype=torch.float64)
    ours = token_logprobs(hidden, head, targets, 0.6)
    naive = torch.log_softmax(naive_logits(hidden, head) / 0.6, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(*[torch.autograd.grad(x, hidden, upstream)[0] for x in (ours, naive)])


@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_is_the_slope_of_the_log_probability(name):
    head, targets = random_head(7, 4, **HEADS[name]), torch.randint(0, 7, (5,))
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, head, targets, 0.8), hidden)


@pytest.mark.parametrize("name", HEADS)
def test_the_entropy_and_its_gradient_are_those_of_a_softmax_in_every_chunk(monkeypatch, name):
    monkeypatch.setattr("trainer.learning.head.CHUNK_BYTES", 4 * 11 * 3)
    head = random_head(11, 5, **HEADS[name])
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 11, (8,)), torch.randn(2, 8, dtype=torch.float64)
    ours = token_logprobs_and_entropy(hidden, head, targets, 0.6)
    logs = torch.log_softmax(naive_logits(hidden, head) / 0.6, -1)
    naive = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b)
    sums = [(upstream * torch.stack(both)).sum() for both in (ours, naive)]
    torch.testing.assert_close(*[torch.autograd.grad(x, hidden)[0] for x in sums])
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs_and_entropy(hidden, head, targets, 0.6)[1], naive[1])


def test_the_entropy_is_that_of_the_allowed_tokens():
    head, hidden = random_head(5, 4), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([0b10110, 0b00100, 0b11111], dtype=torch.int32)[:, None]
    _, entropy = token_logprobs_and_entropy(hidden, head, torch.tensor([2, 2, 2]), 1.0, allowed_NW=allowed)
    (grad,) = torch.autograd.grad(entropy.sum(), hidden)
    logits = naive_logits(hidden, head)
    forbidden = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 1, 1], [0] * 5]).bool()
    logs = torch.log_softmax(logits.masked_fill(forbidden, -1e9), -1)
    expected = -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), hidden)[0])
    assert entropy[1] == 0.0


def test_the_log_softmax_of_half_precision_is_taken_in_float32():
    head = Head(weight_VH=torch.randn(300, 8).bfloat16(), cap=30.0)
    hidden, targets = torch.randn(20, 8).bfloat16(), torch.randint(0, 300, (20,))
    ours = token_logprobs(hidden, head, targets, 1.0)
    logits = 30 * torch.tanh((hidden @ head.weight_VH.T).float() / 30)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES = {
    "granite": ({"logits_scaling": 8.0}, {"scale": 1 / 8, "cap": None}),
    "granitemoe": ({"logits_scaling": 6.0, "num_local_experts": 4}, {"scale": 1 / 6, "cap": None}),
    "hyperclovax": ({"logits_scaling": 0.125}, {"scale": 0.125, "cap": None}),
    "cohere": ({"logit_scale": 0.0625}, {"scale": 0.0625, "cap": None}),
    "cohere2": ({"logit_scale": 0.25}, {"scale": 0.25, "cap": None}),
    "gemma2": ({"final_logit_softcapping": 30.0, "head_dim": 8}, {"scale": 1.0, "cap": 30.0}),
    "gemma3_text": ({"final_logit_softcapping": None, "head_dim": 8}, {"scale": 1.0, "cap": None}),
    "phi": ({}, {"scale": 1.0, "cap": None}),
    "llama": ({}, {"scale": 1.0, "cap": None}),
}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Writes a random model of a family, with the small weights of a fresh initialisation, and gives its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    number = itertools.count()

    def write(family: str, dtype: torch.dtype = torch.float32, **change: object):
        folder = tmp_path_factory.mktemp("family") / f"{family}-{next(number)}"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **SMALL | FAMILIES[family][0] | change)
            )
            bias = getattr(model.get_output_embeddings(), "bias", None)
            if bias is not None:
                torch.nn.init.normal_(bias)
            model.to(dtype).save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_scale_and_cap_are_found_though_its_logits_are_too_small_to_show_them(save, family, dtype):
    head = tiny_policy(save(family, dtype), dtype=str(dtype).removeprefix("torch.")).reader.head
    assert {"scale": head.scale, "cap": head.cap} == FAMILIES[family][1]
    assert (head.bias_V is not None) == (family == "phi")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_log_probabilities_and_gradient_are_those_of_its_own_logits(save, family):
    # Large weights, so that the caps below bend the logits.
    cap = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    policy = tiny_policy(save(family, initializer_range=1.0, **cap))
    sample = random_samples(1, 1)[0]
    (batch,) = pack([sample], 1000, policy.layout)
    both = (policy.reader.logprobs(batch, 0.7, adapter=True), naive_logprobs(policy, sample, 0.7))
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(x.sum(), policy._parameters) for x in both]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    assert max(g.abs().max() for g in gradients[0]) > 1e-2


def test_a_cap_that_the_config_does_not_name_is_refused(save, monkeypatch):
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward
    for change in (lambda x: x / 8, lambda x: 30 * torch.tanh(x / 30), lambda x: x + x.abs().sqrt()):

        def changed(self, *args, change=change, **kwargs):
            out = plain(self, *args, **kwargs)
            out.logits = change(out.logits)
            return out

        monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
        with pytest.raises(UserError, match=r"model\.name: LlamaForCausalLM .*final_logit_softcapping"):
            tiny_policy(save("llama"))


def test_a_scale_that_the_config_names_and_the_model_does_not_apply_is_not_applied(save):
    assert tiny_policy(save("llama", logit_scale=0.25, final_logit_softcapping=30.0)).reader.head.scale == 1.0
