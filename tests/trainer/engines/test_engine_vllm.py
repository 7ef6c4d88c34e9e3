"""The real engine: vLLM samples what the trainer trains, and a publish that did not happen is caught.

On two narrow layers in float32: what engine and trainer make of them is the same to six digits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jsonschema
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from envs.errors import EngineHungError, PublishError, WorldError
from envs.remote.config import RemoteConfig
from envs.types import Message, Task, Turn
from envs.users import Exchange
from tests.support.families import VOCABULARY
from tests.support.taught import THOUGHT
from trainer.config import EngineConfig, ModelConfig, OptimConfig
from trainer.engines.arguments import engine_environment
from trainer.engines.canary import Canary
from trainer.engines.engine import Completion, EngineStart, Sampling
from trainer.engines.local import VllmEngine
from trainer.engines.publish import Publisher
from trainer.engines.watched import WatchedEngine
from trainer.learning.policy import Policy
from trainer.learning.samples import Sample, sample_of
from trainer.rollouts.model_users import ModelUsers, build_users
from trainer.runs.scratch import Scratch
from trainer.templates.chat import Chat
from trainer.templates.grammar import Grammar
from trainer.types import Ledger

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_process"),
]

PROMPTS = [list(range(1000 + 40 * i, 1040 + 40 * i)) for i in range(6)]
CANARIES = [list(range(100 + 100 * i, 200 + 100 * i)) for i in range(4)]
TOLERANCE = EngineConfig().canary_mean_tolerance
SAME = 1e-3
"""Log-probabilities of a token that differ by less are those of one model."""
END = {"merged": 0, "lora": 2}
"""The token that ends a turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    loop: asyncio.Runner
    engine: VllmEngine
    policy: Policy
    publisher: Publisher
    scratch: Path


@contextlib.contextmanager
def start_rig(folder: Path, publish: Literal["merged", "lora"], model: ModelConfig) -> Iterator[Rig]:
    from accelerate import Accelerator

    policy = Policy(folder, model, OptimConfig(), Accelerator(cpu=True), 0)
    engine = VllmEngine(
        EngineConfig(publish=publish, seeded_requests=True, enforce_eager=True, kv_cache_gib=1, max_num_seqs=16)
    )
    given = EngineStart(model_path=folder, model=model, max_model_len=512, stop_token_ids=[END[publish]], device="cpu")
    with asyncio.Runner() as loop:
        loop.run(engine.start(given))
        try:
            with Scratch() as scratch:
                publisher = Publisher(policy, engine, Canary(CANARIES, tolerance=TOLERANCE), scratch.path)
                loop.run(publisher.note_base())
                yield Rig(loop=loop, engine=engine, policy=policy, publisher=publisher, scratch=scratch.path)
        finally:
            engine.shutdown()


@pytest.fixture(scope="module")
def thinking(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model under a tokenizer in which its end of turn closes reasoning."""
    folder = tmp_path_factory.mktemp("thinking")
    for path in taught_model.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
            continue
        text = path.read_text().replace("<|im_end|>", "</think>").replace("<repo_name>", "<think>")
        (folder / path.name).write_text(text)
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("generation_config.json", "eos_token_id", 0),
        ("config.json", "eos_token_id", 0),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {key: value}))
    return folder


@pytest.fixture(scope="module")
def merged(thinking: Path, one_process: None) -> Iterator[Rig]:
    """Its reasoning parser is of no account but to answers with a schema."""
    with start_rig(thinking, "merged", ModelConfig(dtype="float32", reasoning_parser="deepseek_r1")) as rig:
        yield rig


@pytest.fixture(scope="module")
def lora(taught_model: Path, one_process: None) -> Iterator[Rig]:
    with start_rig(taught_model, "lora", ModelConfig(dtype="float32")) as rig:
        yield rig


def change_adapter(policy: Policy, *, size: float, seed: int) -> None:
    """As a training step would: the adapter moves, the version counts on."""
    state = policy.state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["adapter"] = {
        name: value + size * torch.randn(value.shape, generator=generator) if "lora_B" in name else value
        for name, value in state["adapter"].items()
    }
    policy.load_state_dict(state | {"num_updates": policy.num_updates + 1})


def as_row(prompt: list[int], completion: Completion) -> Sample:
    ledger = Ledger()
    ledger.append_context(prompt)
    ledger.append_sampled(
        completion.token_ids,
        completion.logprobs,
        completion.policy_version,
        constrained_from=completion.constrained_from,
    )
    return sample_of(ledger, advantage=1.0, rollout_id="r", task_id="t")


def sampling(seed: int, max_tokens: int = 24) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=1.0, top_p=1.0, seed=seed)


def test_sampled_logprobs_are_those_of_the_trainer(merged: Rig) -> None:
    completions = merged.loop.run(_generate_all(merged))
    rows = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        rows.append(as_row(prompt, completion))
    version = merged.engine._version
    trainer = torch.cat(merged.policy.logprobs(rows, temperature=1.0, adapter=version > 0))
    engine = torch.tensor([x for c in completions for x in c.logprobs])
    assert (trainer - engine).abs().mean() < SAME
    assert {c.policy_version for c in completions} == {version}


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch(merged: Rig) -> None:
    batched = merged.loop.run(_generate_all(merged))
    alone = merged.loop.run(merged.engine.generate(PROMPTS[2], sampling(2)))
    assert alone.token_ids == batched[2].token_ids


def test_a_turn_cut_at_its_limit_is_not_finished(merged: Rig) -> None:
    completion = merged.loop.run(merged.engine.generate(PROMPTS[0], sampling(0, max_tokens=1)))
    assert len(completion.token_ids) == len(completion.logprobs) == 1
    assert completion.finished == (completion.token_ids == [END["merged"]])


def test_merged_weights_are_published_and_proved_version_after_version(merged: Rig) -> None:
    for seed in (1, 2):
        change_adapter(merged.policy, size=0.02, seed=seed)
        metrics = merged.loop.run(merged.publisher.publish())
        assert metrics["canary/mismatch"] < TOLERANCE
        assert metrics["canary/applied_since_model"] == pytest.approx(1, abs=0.25)
    assert metrics["canary/applied_since_version"] == pytest.approx(1, abs=0.25)
    completion = merged.loop.run(merged.engine.generate(PROMPTS[0], sampling(0)))
    assert completion.policy_version == merged.policy.num_updates


def test_a_cached_prefix_of_one_version_never_serves_the_next(merged: Rig) -> None:
    prompt = list(range(1500, 1700))
    for seed in (6, 7):
        change_adapter(merged.policy, size=0.02, seed=seed)
        merged.loop.run(merged.publisher.publish())
        # The second request finds the first one's prefix in the cache; both must be the published policy's.
        for _ in range(2):
            completion = merged.loop.run(merged.engine.generate(prompt, sampling(seed)))
            (trainer,) = merged.policy.logprobs([as_row(prompt, completion)], temperature=1.0)
            assert (trainer - torch.tensor(completion.logprobs)).abs().mean() < SAME


def test_an_engine_that_kept_the_former_weights_is_caught(merged: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    change_adapter(merged.policy, size=0.02, seed=3)
    merged.loop.run(merged.publisher.publish())
    change_adapter(merged.policy, size=0.005, seed=4)

    async def ignored(weights: Path, version: int) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(merged.engine, "publish", ignored)
        with pytest.raises(PublishError, match=r"still answers as|runs another policy"):
            merged.loop.run(merged.publisher.publish())
    # The same update, published for real, passes.
    merged.loop.run(merged.publisher.publish())


def test_a_publish_during_generation_is_refused(merged: Rig, tmp_path: Path) -> None:
    async def publish_too_early() -> None:
        running = asyncio.create_task(merged.engine.generate(PROMPTS[0], sampling(0, max_tokens=64)))
        await asyncio.sleep(0)
        try:
            await merged.engine.publish(tmp_path, 99)
        finally:
            await running

    with pytest.raises(PublishError, match="requests are running"):
        merged.loop.run(publish_too_early())


def test_an_engine_whose_process_stands_still_is_told_and_answers_when_it_goes_on(merged: Rig) -> None:
    children = psutil.Process().children(recursive=True)
    cores = [child for child in children if "EngineCore" in "".join(child.cmdline())]
    assert cores, [child.cmdline() for child in children]
    watched = WatchedEngine(merged.engine, limit_s=2)
    for core in cores:
        core.suspend()
    try:
        with pytest.raises(EngineHungError, match="answered nothing for 2 s"):
            merged.loop.run(watched.generate(CANARIES[0], sampling(1)))
    finally:
        for core in cores:
            core.resume()
    assert merged.loop.run(WatchedEngine(merged.engine, limit_s=300).generate(CANARIES[0], sampling(1))).token_ids


def test_under_a_reasoning_parser_the_schema_holds_after_the_reasoning(merged: Rig, thinking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    schema = json.dumps({"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]})
    turns = [THOUGHT.format(i) for i in (3, 5, 2, 7, 4)]
    # Reasoning that the prompt opens, that it has begun, that it has ended, and that finds no end in the turn.
    heads = ["<think>", "<think> I think", "<think> I think it is right.</think>", "<think> I think"]
    prompts = [tokenizer.encode("".join(turns) + head) for head in heads]
    limits = [64, 64, 64, 2]
    merged.policy.reader.grammar = Grammar(tokenizer, schema, vocab_size=VOCABULARY, stop_token_ids=[0])

    async def answers() -> list[Completion]:
        how = [replace(sampling(i, limit), schema=schema) for i, limit in enumerate(limits)]
        return await asyncio.gather(*(merged.engine.generate(p, s) for p, s in zip(prompts, how, strict=True)))

    completions = merged.loop.run(answers())
    rows = [as_row(p, c) for p, c in zip(prompts, completions, strict=True)]
    trainer = merged.policy.logprobs(rows, temperature=1.0, adapter=merged.engine._version > 0)
    for completion, logprobs, limit in zip(completions, trainer, limits, strict=True):
        start = completion.constrained_from
        assert start is not None
        reasoning, answer = completion.token_ids[:start], completion.token_ids[start:]
        if limit == 2:
            assert (len(reasoning), answer) == (2, [])
        else:
            assert not reasoning or reasoning.index(2) == start - 1
            assert json.loads(tokenizer.decode(answer, skip_special_tokens=True)).keys() >= {"score"}
        assert (logprobs - torch.tensor(completion.logprobs)).abs().mean() < SAME
    assert completions[0].constrained_from and completions[1].constrained_from and completions[2].constrained_from == 0


VERDICT = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 60},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "verdict": {"enum": ["correct", "false"]},
    },
    "required": ["reason", "score", "verdict"],
    "additionalProperties": False,
}


def _questions(chat: Chat) -> list[list[int]]:
    asked = [f"Is {i} + {i} = {2 * i + i % 2}? Explain, and give a score." for i in range(6)]
    return [chat.open([Message(role="user", content=text)], []) for text in asked]


def _forced(grammar: Grammar, token_ids: Sequence[int]) -> torch.Tensor:
    """Whether the grammar allows but one token at each place of an answer."""
    allowed_NW = torch.full((len(token_ids), VOCABULARY // 32), -1, dtype=torch.int32)
    grammar.fill(allowed_NW, 0, token_ids)
    bits = (allowed_NW[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.sum((1, 2)) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_with_a_schema_fit_it_and_have_the_trainer_s_constrained_log_probabilities(
    lora: Rig, taught_model: Path, temperature: float
) -> None:
    chat = Chat(taught_model)
    change_adapter(lora.policy, size=0.02, seed=10)
    lora.loop.run(lora.publisher.publish())
    lora.policy.reader.grammar = chat.grammar(json.dumps(VERDICT), vocab_size=VOCABULARY)

    async def answers() -> list[Completion]:
        how = [replace(sampling(i, 160), schema=json.dumps(VERDICT), temperature=temperature) for i in range(6)]
        asked = zip(_questions(chat), how, strict=True)
        return await asyncio.gather(*(lora.engine.generate(prompt, s) for prompt, s in asked))

    completions = lora.loop.run(answers())
    rows = [as_row(prompt, completion) for prompt, completion in zip(_questions(chat), completions, strict=True)]
    assert all(completion.constrained_from == 0 for completion in completions)
    # A small model may go on with the white space that JSON allows until its limit.
    finished = [completion for completion in completions if completion.finished]
    assert finished
    for completion in finished:
        jsonschema.validate(json.loads(chat.parse(completion.token_ids).message.content), VERDICT)
    trainer = torch.cat(lora.policy.logprobs(rows, temperature=temperature, adapter=True))
    engine = torch.tensor([x for c in completions for x in c.logprobs])
    assert (trainer - engine).abs().mean() < SAME
    # Where one token alone is allowed, such as the end of turn after a whole answer, both are certain.
    forced = torch.cat([_forced(lora.policy.reader.grammar, completion.token_ids) for completion in completions])
    assert all(_forced(lora.policy.reader.grammar, completion.token_ids)[-1] for completion in finished)
    assert trainer[forced].abs().max() == 0 and engine[forced].abs().max() < 1e-4
    free = [replace(row, constrained=()) for row in rows]
    unmasked = torch.cat(lora.policy.logprobs(free, temperature=temperature, adapter=True))
    assert (unmasked - engine).abs().mean() > 3 * TOLERANCE


def test_an_adapter_is_published_under_its_version_and_proved(lora: Rig) -> None:
    for seed in (1, 2):
        change_adapter(lora.policy, size=0.02, seed=seed)
        metrics = lora.loop.run(lora.publisher.publish())
    assert metrics["canary/mismatch"] < TOLERANCE
    assert metrics["canary/applied_since_model"] == pytest.approx(1, abs=0.25)
    assert metrics["canary/applied_since_version"] == pytest.approx(1, abs=0.25)
    assert lora.engine._lora.lora_name == f"policy-v{lora.policy.num_updates}"
    assert set(lora.loop.run(lora.engine._llm.list_loras())) == {lora.engine._lora.lora_int_id}


def test_the_base_model_answers_beside_the_adapter_and_fits_the_schema(lora: Rig, taught_model: Path) -> None:
    chat = Chat(taught_model)
    prompt = chat.open([Message(role="user", content="Is 2 + 2 = 4? Answer with JSON.")], [])
    # Between the parts of an object a grammar lets a model write blank lines for ever, and this one may.
    schema = {"enum": [0, 1]}

    def judged() -> list[int]:
        asked = lora.engine.generate_base(prompt, max_tokens=40, temperature=0, top_p=1, seed=None, schema=schema)
        return lora.loop.run(asked)

    before = judged()
    # An adapter as large as this one turns the policy into another model.
    change_adapter(lora.policy, size=0.5, seed=8)
    lora.loop.run(lora.engine.publish(_saved(lora), lora.policy.num_updates))
    assert judged() == before
    with pytest.raises(WorldError, match="does not fit the engine"):
        prompt[:] = prompt * 40
        judged()
    prompt[:] = prompt[: len(prompt) // 40]
    assert json.loads(chat.parse(before).message.content) in (0, 1)


def test_the_base_model_plays_the_user_beside_the_adapter(lora: Rig, taught_model: Path) -> None:
    chat = Chat(taught_model)
    user = {"type": "engine", "prompt": "You want a red mug. You talk to a shop.", "max_tokens": 24}
    users = build_users(RemoteConfig.model_validate({"user": user}))
    assert isinstance(users, ModelUsers) and users.engine is not None
    users.engine.bind(lora.engine, chat)
    said = Message(role="assistant", content="Which colour do you want?")
    exchange = Exchange(
        task=Task(task_id="t", messages=(Message(role="user", content="A mug, please."),)),
        rollout_id="r",
        messages=(Message(role="user", content="A mug, please."), said),
        turns=(Turn(message=said),),
        seed=1,
    )

    def heard(seed: int) -> str | None:
        return lora.loop.run(users.reply(replace(exchange, seed=seed)))

    before = [heard(seed) for seed in range(4)]
    change_adapter(lora.policy, size=0.5, seed=9)
    lora.loop.run(lora.engine.publish(_saved(lora), lora.policy.num_updates))
    assert [heard(seed) for seed in range(4)] == before
    assert len(set(before)) > 1 and all(before)
    assert users.take_metrics()["user/requests"] == 8


def _saved(rig: Rig) -> Path:
    folder = rig.scratch / "saved"
    rig.policy.save_adapter(folder)
    return folder


def test_an_engine_that_never_loads_the_adapter_is_caught(lora: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    change_adapter(lora.policy, size=0.02, seed=5)
    with monkeypatch.context() as patch:
        # What a forgotten `lora_request` does: the engine answers as the base model.
        patch.setattr(lora.engine, "publish", _forget_the_adapter(lora.engine))
        with pytest.raises(PublishError, match=r"still answers as the base model|runs another policy"):
            lora.loop.run(lora.publisher.publish())


def _forget_the_adapter(engine: VllmEngine):  # type: ignore[no-untyped-def]
    async def publish(weights: Path, version: int) -> None:
        engine._lora = None

    return publish


async def _generate_all(rig: Rig):  # type: ignore[no-untyped-def]
    return await asyncio.gather(*(rig.engine.generate(p, sampling(i)) for i, p in enumerate(PROMPTS)))


def test_vllm_takes_the_quantisation_beside_adapters(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to vLLM's own configuration of the engine; what it quantises is not loaded."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    taken: list[AsyncEngineArgs] = []
    monkeypatch.setattr(AsyncLLM, "from_engine_args", taken.append)
    with asyncio.Runner() as loop:
        for quantization in ("fp8", None):
            given = EngineStart(
                model_path=smollm2, model=ModelConfig(), max_model_len=512, stop_token_ids=[2], device="cuda"
            )
            loop.run(VllmEngine(EngineConfig(quantization=quantization)).start(given))
    quantised, plain = (args.create_engine_config() for args in taken)
    assert plain.quant_config is None
    assert quantised.lora_config is not None and quantised.quant_config.get_name() == "online"
    weight = quantised.quant_config.args.linear.weight
    assert weight.dtype.itemsize == 1 and weight.dtype.is_floating_point


def test_engines_started_together_share_out_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 5, 7, 8})

    def cores(local_rank: int) -> str:
        with engine_environment(EngineConfig(), device="cpu", local_rank=local_rank):
            assert "LOCAL_WORLD_SIZE" not in os.environ, "vLLM would take itself for a part of the trainer's group"
            return os.environ["VLLM_CPU_OMP_THREADS_BIND"]

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores(0) == "2,3,5,7,8"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [cores(0), cores(1)] == ["2,5,8", "3,7"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert cores(8) == "2,3,5,7,8", "more processes than cores: each uses them all"
    assert os.environ["LOCAL_WORLD_SIZE"] == "9"


STARTING = """
import asyncio, sys
from pathlib import Path
from envs.terminal import run
from trainer.config import EngineConfig, ModelConfig
from trainer.engines.engine import EngineStart
from trainer.engines.local import VllmEngine
from envs.terminal import end_on_signals

def main():
    end_on_signals()
    given = EngineStart(
        model_path=Path(sys.argv[1]), model=ModelConfig(), max_model_len=512, stop_token_ids=[2], device="cpu"
    )
    with asyncio.Runner() as loop:
        loop.run(VllmEngine(EngineConfig(enforce_eager=True, kv_cache_gib=1, max_num_seqs=16)).start(given))
    return 0

if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_while_the_engine_starts_is_heeded_and_leaves_no_process(
    tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "start.py").write_text(STARTING)
    starting = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py"), str(tiny_model)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def children() -> list[psutil.Process]:
        return psutil.Process(starting.pid).children(recursive=True)

    until = time.monotonic() + 300
    while not any("spawn_main" in word for child in children() for word in child.cmdline()):
        assert starting.poll() is None and time.monotonic() < until, starting.communicate()[1]
        time.sleep(0.05)
    left = children()
    starting.send_signal(number)
    said = starting.communicate(timeout=120)[1]
    assert starting.returncode == 130, said
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
