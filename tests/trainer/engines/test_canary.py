"""The proof that the sampler runs the trained policy (invariant 2): what it must notice, and what it must not."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import PublishError
from tests.support.scripted_engine import Faults, ScriptedEngine
from trainer.config import LoraConfig, ModelConfig, OptimConfig
from trainer.engines.canary import Canary
from trainer.engines.publish import Publisher
from trainer.learning.adapter import adapter_state, load_weights
from trainer.learning.policy import Policy
from trainer.runs.scratch import Scratch

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = [random.Random(i).choices(range(20, 2000), k=40) for i in range(3)]


@pytest.fixture(scope="module")
def policy(tiny_model) -> Policy:
    from accelerate import Accelerator

    config = ModelConfig(dtype="float32", lora=LoraConfig(r=4, alpha=8))
    return Policy(tiny_model, config, OptimConfig(), Accelerator(cpu=True), 0)


def move(policy: Policy, size: float, *, seed: int) -> None:
    """An update of a known size in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy._parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    policy.num_updates += 1


@pytest.fixture(autouse=True)
def as_new(policy):
    """Every test begins with an adapter that changes nothing."""
    state = policy.state_dict()
    yield
    policy.load_state_dict(state)


def start(model: Path, **faults: object) -> ScriptedEngine:
    return loaded(ScriptedEngine(lambda prompt, seed: "", Faults(**faults)), model)


def loaded(engine: ScriptedEngine, model: Path) -> ScriptedEngine:
    engine.load(model, stop_token_ids=[2])
    return engine


async def published(policy: Policy, engine: ScriptedEngine, *sizes: float, tolerance: float = 0.15) -> dict[str, float]:
    """Publish the untouched adapter, then one update of each size; the last proof's figures."""
    with Scratch() as scratch:
        publisher = Publisher(policy, engine, Canary(TOKENS, tolerance=tolerance), scratch.path)
        await publisher.note_base()
        metrics = await publisher.publish()
        for seed, size in enumerate(sizes):
            move(policy, size, seed=seed)
            metrics = await publisher.publish()
        return metrics


@pytest.mark.parametrize("size", [3e-3, 3e-2, 0.1])
async def test_the_right_engine_is_proved_for_updates_of_all_sizes(tiny_model, policy, size):
    metrics = await published(policy, start(tiny_model), size, size)
    assert metrics["canary/mismatch"] < 1e-4
    assert metrics["canary/applied_since_version"] == pytest.approx(1, abs=0.02)
    assert metrics["canary/applied_since_model"] == pytest.approx(1, abs=0.02)


async def test_another_kernels_constant_error_does_not_disturb_the_proof(tiny_model, policy):
    """The mismatch of two implementations is far larger than the update and the same before and after it."""
    metrics = await published(policy, start(tiny_model, score_noise=0.1), 3e-2, 3e-2)
    assert 0.05 < metrics["canary/mismatch"] < 0.15
    assert metrics["canary/applied_since_version"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.05])
async def test_an_engine_that_keeps_the_former_version_is_noticed(tiny_model, policy, noise):
    engine = start(tiny_model, stale_from=2, score_noise=noise)
    with pytest.raises(PublishError, match=r"policy-v2 was published the engine still answers as the former version"):
        await published(policy, engine, 2e-2, 1e-2, tolerance=5)


@pytest.mark.parametrize("noise", [0.0, 0.05])
async def test_an_engine_that_stays_the_base_model_is_noticed(tiny_model, policy, noise):
    engine = start(tiny_model, always_base=True, score_noise=noise)
    with pytest.raises(PublishError, match=r"still answers as the base model: it shows 0%"):
        await published(policy, engine, 2e-2, tolerance=5)


async def test_a_large_difference_stops_the_run_whatever_its_direction(tiny_model, policy):
    with pytest.raises(PublishError, match=r"differ from the trainer's by .* nats a token .* runs another policy"):
        await published(policy, start(tiny_model, always_base=True), 0.5, tolerance=0.05)


async def test_an_adapter_of_another_policy_is_noticed(tiny_model, policy, tmp_path):
    move(policy, 3e-2, seed=99)
    policy.save_adapter(tmp_path / "foreign")
    move(policy, -3e-2, seed=99)
    policy.num_updates = 0

    class Foreign(ScriptedEngine):
        async def publish(self, weights: Path, version: int) -> None:
            await super().publish(tmp_path / "foreign" if version else weights, version)

    engine = loaded(Foreign(lambda prompt, seed: ""), tiny_model)
    with pytest.raises(PublishError, match=r"runs another policy|still answers as"):
        await published(policy, engine, 3e-2)


async def test_an_engine_that_holds_another_base_model_is_noticed_before_the_first_publish(tiny_model, policy):
    engine = start(tiny_model)
    with torch.no_grad():
        engine._base.model.layers[0].mlp.down_proj.weight.mul_(3)
    with pytest.raises(PublishError, match="after the base model was loaded"):
        await published(policy, engine)


async def test_what_the_probe_says_of_a_part_is_of_the_part_that_is_published(tiny_model, policy, tmp_path):
    """However many times it has to be scaled up: here 5 % of its weights move next to nothing."""
    engine = start(tiny_model)
    queries = [layer.self_attn.q_proj for layer in engine._base.model.layers]
    queries += [layer.self_attn.q_proj.base_layer for layer in policy.model.get_base_model().model.layers]
    publisher = Publisher(policy, engine, Canary(TOKENS, tolerance=0.15), tmp_path)
    with torch.no_grad():
        for layer in queries:
            layer.weight *= 2**-10
        await publisher.note_base()
        moves = publisher._load_probe()["q_proj"]
        published = adapter_state(policy.model)
        load_weights(policy.model, {n: w * ("q_proj" in n or "lora_A" in n) for n, w in published.items()})
        moved = np.subtract(publisher._scores(adapter=True), publisher._scores(adapter=False))
        for layer in queries:
            layer.weight *= 2**10
    assert moves == pytest.approx(list(moved), abs=1e-5)


async def test_an_update_too_small_to_see_is_not_judged(tiny_model, policy):
    metrics = await published(policy, start(tiny_model, score_noise=0.05), 1e-6)
    assert "canary/applied_since_version" not in metrics and "canary/applied_since_model" not in metrics
    assert metrics["canary/mismatch"] < 0.15


async def test_scores_that_are_no_numbers_are_a_mismatch(tiny_model, policy):
    engine = start(tiny_model, score_noise=float("nan"))
    with pytest.raises(PublishError, match="by nan nats"):
        await published(policy, engine)


async def soon(scores: list[float]) -> list[float]:
    return scores


class GivenScores:
    """An engine that has been told what to answer; only `score` is ever called."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    async def score(self, token_ids: list[int]) -> list[float]:
        return self.scores


async def judged(share: float, *, noise: float, size: float, seed: int, num_tokens: int = 400) -> float:
    """The share that the proof finds, for an engine that applied `share` of an update of `size` nats a token.

    Every scoring of the engine has fresh noise, `noise` times the update.
    """
    rng = random.Random(seed)
    before = [rng.gauss(-3, 1) for _ in range(num_tokens)]
    update = [rng.gauss(0, size) for _ in before]
    canary = Canary([[0] * (num_tokens + 1)], tolerance=100)
    blur = noise * size / 2**0.5  # of each of the two scorings that are compared
    await canary.note_base(GivenScores([x + rng.gauss(0, blur) for x in before]), before)
    scores = [x + share * u + rng.gauss(0, blur) for x, u in zip(before, update, strict=True)]
    metrics = await canary.prove(
        GivenScores(scores), soon([x + u for x, u in zip(before, update, strict=True)]), version=1
    )
    return metrics["canary/applied_since_model"]


SEEDS = st.integers(0, 2**32)
SIZES = st.floats(2e-3, 1)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, size=SIZES, share=st.floats(0.3, 1), noise=st.floats(0, 1))
def test_an_engine_that_applied_the_update_even_in_part_is_never_refused(seed, size, share, noise):
    """Noise widens the error bar, not the suspicion."""
    assert asyncio.run(judged(share, noise=noise, size=size, seed=seed)) == pytest.approx(share, abs=0.3 * noise + 1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, size=SIZES, noise=st.floats(0, 0.4))
def test_an_engine_that_ignored_the_update_is_noticed_through_noise(seed, size, noise):
    with pytest.raises(PublishError, match="still answers as the base model"):
        asyncio.run(judged(0.0, noise=noise, size=size, seed=seed))


ROUNDING = 0.07
"""Root mean square of what rounding does to the difference of two scorings, nats (measured, bfloat16)."""


async def judged_through_rounding(*, size: float, stale: bool, seed: int, num_tokens: int = 450) -> None:
    """Twenty updates of `size` nats a token, one after the other, whose scores engine and trainer round alike.

    Rounding differs with the weights and stays the same for the same weights, as on a deterministic engine.
    """
    rng = random.Random(seed)

    def rounded(scores: list[float]) -> list[float]:
        return [x + rng.gauss(0, ROUNDING / 2**0.5) for x in scores]

    exact = [rng.gauss(-3, 1) for _ in range(num_tokens)]
    engine = GivenScores(rounded(exact))
    canary = Canary([[0] * (num_tokens + 1)], tolerance=100)
    await canary.note_base(engine, rounded(exact))
    for version in range(1, 21):
        exact = [x + rng.gauss(0, size) for x in exact]
        if not stale or version == 1:
            engine = GivenScores(rounded(exact))
        await canary.prove(engine, soon(rounded(exact)), version=version)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, size=st.floats(1e-4, 0.5))
def test_a_right_engine_is_never_refused_however_far_the_update_lies_below_the_rounding(seed, size):
    asyncio.run(judged_through_rounding(size=size, stale=False, seed=seed))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, size=st.floats(1e-4, 0.5))
def test_an_engine_that_kept_its_weights_is_noticed_however_far_the_update_lies_below_the_rounding(seed, size):
    with pytest.raises(PublishError, match=r"policy-v2 was published the engine still answers as the former version"):
        asyncio.run(judged_through_rounding(size=size, stale=True, seed=seed))
