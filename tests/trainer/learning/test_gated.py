import weakref

import torch

from tests.support.policy_worker import random_samples, save_tiny_llama, tiny_policy
from trainer.learning import adapter
from trainer.learning.packing.layouts import pack


def gradient_of(policy) -> tuple[torch.Tensor, ...]:
    [microbatch] = pack(random_samples(2, 2), 10_000, policy.layout)
    logprobs_N = policy.reader.logprobs(microbatch, 0.8, adapter=True)
    return logprobs_N.detach(), *torch.autograd.grad(logprobs_N.sum(), policy._parameters)


def moved(policy):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy._parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_layers_that_keep_less_give_the_same_bits(tmp_path, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        model = save_tiny_llama(tmp_path / dtype, dtype=getattr(torch, dtype))
        lean = moved(tiny_policy(model, dtype=dtype))
        with monkeypatch.context() as patched:
            patched.setattr(adapter, "keep_less", lambda decoder: 0)
            plain = moved(tiny_policy(model, dtype=dtype))
        names = [type(m).__name__ for m in lean.model.modules() if "forward" in vars(m)]
        assert names.count("LlamaMLP") == 2
        for a, b in zip(gradient_of(lean), gradient_of(plain), strict=True):
            assert torch.equal(a, b)


def test_what_the_last_projection_reads_is_not_kept(tmp_path):
    policy = moved(tiny_policy(save_tiny_llama(tmp_path)))
    read = []
    for name, module in policy.model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _, args: read.append(weakref.ref(args[0])))
    [microbatch] = pack(random_samples(2, 2), 10_000, policy.layout)
    logprobs_N = policy.reader.logprobs(microbatch, 1.0, adapter=True)
    assert len(read) == 2 and not any(product() is not None for product in read)
    logprobs_N.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy._parameters)
