"""Answers with a form: what the config takes, which tokens a grammar allows, and that the update is the masked one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, Field

from envs.errors import UserError
from envs.tools import schema_tool
from envs.types import Message, Task
from tests.support.policy_worker import naive_logprobs, tiny_policy
from tests.support.scripted_engine import ScriptedEngine, engine_starter
from trainer.config import LossConfig, validate_config
from trainer.config.response_format import schema_text
from trainer.learning.head import Head, token_logprobs
from trainer.learning.samples import Sample, sample_of
from trainer.prepare import prepare
from trainer.tasks.offer import tools_offered
from trainer.templates.chat import Chat
from trainer.templates.grammar import Grammar, check_schema, first_constrained
from trainer.train import train
from trainer.types import Ledger

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer"}, "kind": {"enum": ["right", "wrong"]}},
    "required": ["score", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # accelerate leaves its TensorBoard writer to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
CONSTANT = {"type": "python", "name": "g", "source": "def grade(sample, item):\n    return 1.0\n"}


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


@pytest.fixture(scope="module")
def grammar(chat: Chat) -> Grammar:
    return chat.grammar(json.dumps(SCHEMA), vocab_size=2048)


def answer_ids(chat: Chat, text: str) -> list[int]:
    return [*chat._encode(text), chat._answer_end.token_id]


# --- the config ---


def config(tmp_path: Path, rows: list[dict] | None = None, **rollout: object) -> dict:
    rows = rows or [{"messages": [{"role": "user", "content": f"Is {i} = {i + i % 2}?"}], "n": i} for i in range(4)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"tools": [], **row}) + "\n" for row in rows))
    return {
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "grader": CONSTANT,
        "rollout": rollout,
    }


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (FORMAT, json.dumps(SCHEMA)),
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "text"}, None),
        (None, None),
    ],
)
def test_a_response_format_is_written_as_a_request_writes_it(tmp_path, response_format, schema):
    loaded = validate_config(config(tmp_path, response_format=response_format), source="test")
    assert schema_text(loaded.rollout.response_format) == schema
    # As the run folder keeps it.
    assert validate_config(json.loads(json.dumps(loaded.model_dump(mode="json"))), source="again") == loaded


def test_a_response_format_may_be_a_file(tmp_path):
    path = tmp_path / "format.json"
    path.write_text(json.dumps(FORMAT))
    loaded = validate_config(config(tmp_path, response_format=str(path)), source="test")
    assert schema_text(loaded.rollout.response_format) == json.dumps(SCHEMA)
    with pytest.raises(UserError, match=r"rollout\.response_format.*response_format file .*no-such"):
        validate_config(config(tmp_path, response_format=str(tmp_path / "no-such.json")), source="test")


@pytest.mark.parametrize(
    ("response_format", "complaint"),
    [
        ({"type": "json"}, "json_schema"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "name"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "shema": 1}}, "shema"),
        ({"type": "json_object", "schema": SCHEMA}, "schema"),
        ([FORMAT], "dictionary"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [date(2024, 1, 31)]}}}, "not JSON"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"minimum": float("nan")}}}, "not JSON"),
    ],
)
def test_a_malformed_response_format_is_refused_by_its_key(tmp_path, response_format, complaint):
    with pytest.raises(UserError, match=rf"rollout\.response_format[\s\S]*{complaint}"):
        validate_config(config(tmp_path, response_format=response_format), source="test")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 5}}},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    ],
)
def test_a_schema_that_would_not_be_enforced_is_refused_before_anything_is_loaded(tmp_path, schema):
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    loaded = validate_config(config(tmp_path, response_format=response_format), source="test")
    with pytest.raises(UserError, match=r"rollout\.response_format: vLLM's xgrammar"):
        prepare(loaded)


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "nonsense"}, "type: 'nonsense' is no type of JSON; expected one of array, boolean,"),
        ({"properties": {"n": {"type": "strng"}}}, r"properties\.n\.type: 'strng' .*; did you mean 'string'\?"),
        ({"properties": {"n": {"minimun": 1}}}, r"properties\.n\.minimun: .*did you mean 'minimum'\?"),
        ({"required": "n"}, "required: 'n' is not of type 'array'"),
    ],
)
def test_what_is_no_schema_is_told_in_our_words_with_its_place(schema, told):
    with pytest.raises(UserError, match=rf"^rollout\.response_format: its schema is none: {told}"):
        check_schema(json.dumps(schema))


def test_a_task_that_offers_tools_is_refused_by_its_name(tmp_path, tiny_model):
    data = config(tmp_path, response_format=FORMAT)
    finance = data | {"world": {"type": "finance"}, "data": None, "model": {"name": str(tiny_model)}}
    with pytest.raises(UserError, match=r"rollout\.response_format: task '.*' offers tools \(search, "):
        prepare(validate_config(finance, source="test"))
    call = {"type": "function", "function": {"name": "submit", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"messages": [{"role": "user", "content": "?"}]}, {"messages": [{"role": "user", "content": "!"}]}]
    rows[1]["tools"] = [call]
    data = config(tmp_path, rows, response_format=FORMAT, answer="tool_calls")
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: tools: rollout\.response_format: .* tools \(submit\)"):
        prepare(validate_config(data, source="test"))


def test_tools_that_appear_later_stop_the_run(tmp_path):
    rollout = validate_config(config(tmp_path, response_format=FORMAT), source="test").rollout
    task = Task(task_id="row-1", messages=(Message(role="user", content="?"),))
    assert tools_offered(task, {}, rollout) == {}
    with pytest.raises(UserError, match=r"task 'row-1' offers tools \(look\)"):
        tools_offered(
            task, {"look": schema_tool({"function": {"name": "look"}}, lambda call: "", is_remote=False)}, rollout
        )


def test_a_parser_with_a_grammar_of_its_own_is_refused(chat, monkeypatch):
    def adjust(request):
        from vllm.sampling_params import StructuredOutputsParams

        request.response_format = None
        request.structured_outputs = StructuredOutputsParams(structural_tag="{}")
        return request

    chat.check_response_format(FORMAT, json.dumps(SCHEMA))
    chat.check_response_format({"type": "json_object"}, '{"type": "object"}')
    with monkeypatch.context() as patch, pytest.raises(UserError, match="grammar of its own"):
        patch.setattr(chat._parser, "_reasoning_name", "openai_gptoss")
        chat.check_response_format(FORMAT, json.dumps(SCHEMA))
    monkeypatch.setattr(chat._parser, "_new_parser", lambda tools: SimpleNamespace(adjust_request=adjust))
    with pytest.raises(UserError, match="grammar of its own"):
        chat.check_response_format(FORMAT, json.dumps(SCHEMA))


# --- the grammar ---


def bits(grammar: Grammar, token_ids: list[int]) -> torch.Tensor:
    allowed_NW = torch.full((len(token_ids) + 1, 64), -1, dtype=torch.int32)
    grammar.fill(allowed_NW, 1, token_ids)
    assert (allowed_NW[0] == -1).all(), "rows that are not the answer's stay free"
    return torch.stack([(allowed_NW[1:, v // 32] >> v % 32) & 1 for v in range(2048)], dim=1).bool()


def test_what_may_follow_continues_to_a_text_that_fits(chat, grammar):
    ids = answer_ids(chat, '{"score": 12, "kind": "wrong"}')
    allowed_NV = bits(grammar, ids)
    assert all(row[t] for row, t in zip(allowed_NV, ids, strict=True))
    stop_ids = sorted(chat.stop_token_ids)
    assert allowed_NV[-1, stop_ids].all() and not allowed_NV[:-1, stop_ids].any()
    # Past the first letter of "wrong" all is determined, up to where a token ends.
    second = next(i for i in range(len(ids)) if chat.decode(ids[: i + 1]).endswith('"w'))
    assert {chat.decode([v])[0] for v in allowed_NV[second + 1].nonzero()[:, 0].tolist()} == {"r"}


def test_a_token_that_the_grammar_forbids_is_our_own_fault(chat, grammar):
    with pytest.raises(AssertionError, match="forbids"):
        bits(grammar, answer_ids(chat, '{"score": "high"}'))


TURNS = {
    "no reasoning": ["", "{}"],
    "opened by the prompt": ["<think>", "maybe</think>{}"],
    "opened by the turn": ["", "<think>maybe so</think>{}"],
    "ended by the prompt": ["<think>\n\n</think>\n\n", "{}"],
    "of an earlier turn": ["<think>yes</think>{}<|im_end|>\n<think>", "no</think>\n{}"],
    "never ended": ["<think>", "maybe"],
    "ended twice": ["<think>", "a</think>b</think>{}"],
}


@pytest.fixture(scope="module")
def thinking_tokenizer(tiny_model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "deepseek_v3", "glm45", "minimax_m2", "nemotron_v3"])
def test_the_grammar_starts_where_vllm_s_engine_starts_it(thinking_tokenizer, name):
    from vllm.reasoning import ReasoningParserManager
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.request import StructuredOutputRequest

    parser = ReasoningParserManager.get_reasoning_parser(name)
    engine = object.__new__(StructuredOutputManager)
    engine.__dict__ |= {"reasoner_cls": parser, "tokenizer": thinking_tokenizer, "enable_in_reasoning": False}
    starts = {}
    for what, texts in TURNS.items():
        prompt, sampled = (thinking_tokenizer.encode(text) for text in (f"<|im_start|>assistant\n{texts[0]}", texts[1]))
        structured = StructuredOutputRequest(params=StructuredOutputsParams(json_object=True))
        structured.grammar = SimpleNamespace(accept_tokens=lambda number, tokens: True)
        request = SimpleNamespace(
            request_id="0",
            structured_output_request=structured,
            use_structured_output=True,
            prompt_token_ids=prompt,
            all_token_ids=list(prompt),
        )
        constrained = []
        for token_id in sampled:
            constrained.append(engine._get_constraint_start(request, ()) == 0)
            request.all_token_ids.append(token_id)
            engine.accept_tokens(request, [token_id])
        starts[what] = first_constrained(parser(thinking_tokenizer), prompt, sampled)
        assert constrained == [i >= starts[what] for i in range(len(sampled))], what
    assert starts["ended by the prompt"] == 0


# --- ledger and loss ---


def constrained_sample(chat: Chat, *, advantage: float = 1.0) -> Sample:
    """Two user turns: an answer after three free tokens of reasoning, then one without any."""
    ledger = Ledger()
    ledger.append_context(chat._encode("Is it right?"))
    first = [50, 60, 70, *answer_ids(chat, '{"score": 7, "kind": "right"}')]
    ledger.append_sampled(first, [-0.5] * len(first), 0, constrained_from=3)
    ledger.append_context(chat._encode("And now?"))
    second = answer_ids(chat, '{ "score": -1, "kind": "wrong"}')
    ledger.append_sampled(second, [-0.5] * len(second), 0, constrained_from=0)
    return sample_of(ledger, advantage=advantage, rollout_id="r", task_id="t")


def test_a_ledger_keeps_which_tokens_a_grammar_constrained(chat):
    sample = constrained_sample(chat)
    (a, b), (c, d) = sample.constrained
    assert chat.decode(sample.token_ids[a : b - 1]) == '{"score": 7, "kind": "right"}'
    assert chat.decode(sample.token_ids[c : d - 1]) == '{ "score": -1, "kind": "wrong"}'
    ledger = Ledger()
    ledger.append_context([1])
    ledger.append_sampled([2, 3, 4], [-1.0] * 3, 0, constrained_from=1)
    ledger.append_sampled([5, 6], [-1.0] * 2, 0, constrained_from=2)
    record = json.loads(json.dumps(ledger.to_json()))
    assert record["constrained"] == [[2, 4]] and Ledger.from_json(record) == ledger
    del record["constrained"]
    free = Ledger.from_json(record)
    assert "constrained" not in free.to_json() and free != ledger


def masked_logprobs(policy, grammar: Grammar, sample: Sample, temperature: float) -> torch.Tensor:
    """By the model's own logits of all positions, an explicit mask and plain autograd."""
    logits = policy.model(input_ids=torch.tensor([sample.token_ids])).logits[0].float() / temperature
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for start, end in sample.constrained:
        mask[start - 1 : end - 1] = ~bits(grammar, list(sample.token_ids[start:end]))
    logprobs = torch.log_softmax(logits.masked_fill(mask, -math.inf), dim=-1)
    return torch.stack([logprobs[t - 1, sample.token_ids[t]] for t, on in enumerate(sample.trainable) if on])


def test_log_probabilities_and_gradient_are_those_of_the_masked_distribution(tiny_model, chat, grammar):
    policy = tiny_policy(tiny_model)
    policy.reader.grammar = grammar
    free = [replace(constrained_sample(chat), constrained=()), constrained_sample(chat)]
    both = policy.logprobs(free, temperature=0.7)
    torch.testing.assert_close(both[0], naive_logprobs(policy, free[0], 0.7).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], masked_logprobs(policy, grammar, free[1], 0.7).detach(), atol=1e-4, rtol=1e-4)
    assert (both[1] == 0).sum() > 3 and (both[1] >= both[0] - 1e-5).all() and both[1].sum() > both[0].sum() + 10


def test_an_update_follows_the_gradient_of_the_masked_distribution(tiny_model, chat, grammar):
    policy, sample = tiny_policy(tiny_model), constrained_sample(chat, advantage=1.5)
    policy.reader.grammar = grammar
    advantages = tuple(-0.5 if on else 0.0 for on in sample.trainable)
    other = replace(sample, constrained=(), rollout_id="free", advantages=advantages)
    policy.update([sample, other], LossConfig(), temperature=0.8, constant_tokens=64)  # so that B is not zero
    loss = torch.zeros(())
    num_tokens = sample.num_trainable + other.num_trainable
    for row, logprobs in (
        (sample, masked_logprobs(policy, grammar, sample, 0.8)),
        (other, naive_logprobs(policy, other, 0.8)),
    ):
        engine = torch.tensor([x for x, on in zip(row.logprobs, row.trainable, strict=True) if on])
        weight = torch.exp(logprobs.detach() - engine).clamp(max=2.0)
        loss = loss - (weight * torch.exp(logprobs - logprobs.detach()) * row.advantage).sum() / num_tokens
    expected = torch.autograd.grad(loss, policy._parameters)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    taken: list[torch.Tensor] = []
    step = policy._optimizer._adamw.step
    policy._optimizer._adamw.step = lambda: (taken.extend(p.grad.clone() for p in policy._parameters), step())
    metrics = policy.update([sample, other], LossConfig(), temperature=0.8, constant_tokens=64).metrics
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    scale = min(1.0, 1.0 / (float(norm) + 1e-6))
    for ours, naive in zip(taken, expected, strict=True):
        torch.testing.assert_close(ours, naive * scale, atol=1e-5, rtol=1e-3)


def test_the_head_leaves_out_what_is_not_allowed_in_every_chunk(monkeypatch):
    monkeypatch.setattr("trainer.learning.head.CHUNK_BYTES", 4 * 70 * 3)
    head = Head(weight_VH=torch.randn(70, 5, dtype=torch.float64), cap=2.0, scale=1.5)
    hidden, targets = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 70, (8,))
    allowed = torch.rand(8, 70) < 0.3
    allowed[0] = False
    allowed[torch.arange(8), targets] = True
    words = torch.zeros(8, 3, dtype=torch.int64)
    for v in range(70):
        words[:, v // 32] |= allowed[:, v].long() << v % 32
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    ours = token_logprobs(hidden, head, targets, 0.6, allowed_NW=packed)
    logits = (1.5 * 2 * torch.tanh(hidden @ head.weight_VH.T / 2) / 0.6).masked_fill(~allowed, -math.inf)
    naive = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, naive)
    upstream = torch.randn(8, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, hidden, upstream)[0] for x in (ours, naive)]
    torch.testing.assert_close(*gradients)
    assert ours[0] == 0 and (gradients[0][0] == 0).all()


# --- a run ---


def script(prompt: str, seed: int) -> str:
    return json.dumps({"score": seed % 7, "kind": "right" if seed % 2 else "wrong"})


def test_a_run_whose_answers_have_a_form(tiny_model, tmp_path):
    source = "def grade(sample, item):\n    return sample['output_json']['score'] / 7\n"
    data = config(
        tmp_path, response_format=FORMAT, tasks_per_step=2, group_size=4, max_turn_tokens=64, max_episode_tokens=512
    )
    data |= {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "grader": {"type": "python", "name": "g", "source": source},
        "optim": {"num_steps": 2, "learning_rate": 0.001},
    }
    started: list[ScriptedEngine] = []
    train(validate_config(data, source="test"), start_engine=engine_starter(script, started=started))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mismatch = [m[key] for m in metrics for key in m if key.endswith("/mismatch_abs")]
    assert len(mismatch) == 2 and max(mismatch) < 1e-3
    rollouts = sorted((tmp_path / "run" / "rollouts").glob("*"))
    rows = [json.loads(line) for path in rollouts if path.suffix == ".jsonl" for line in path.read_text().splitlines()]
    assert rows and all(len(r["ledgers"][0]["constrained"]) == 1 for r in rows)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "not": {"const": 3}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "dependentRequired": {"a": ["b"]}},
        {"allOf": [{"type": "object"}, {"required": ["a"]}]},
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/x.json"}}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["b"]},
        {"type": "array", "items": {"type": "string", "pattern": "^(?!a).*$"}},
        {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 5},
        {"anyOf": [{"type": "object", "if": {}}, {"type": "null"}]},
    ],
    ids=lambda schema: next(k for k in reversed(schema)),
)
def test_a_schema_of_which_a_part_would_be_left_out_is_refused(schema):
    with pytest.raises(UserError, match="does not enforce this schema wholly: schema"):
        check_schema(json.dumps(schema))


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "object", "required": 3}, ""),
        ({"type": "object", "properties": [1]}, ""),
        ({"properties": {"x": {"$ref": "#/properties/y"}, "y": {"$ref": "#/properties/x"}}}, "leads round in a circle"),
    ],
)
def test_a_schema_that_is_none_or_has_no_end_is_refused_by_its_key(schema, told):
    with pytest.raises(UserError, match=rf"^rollout\.response_format: .*{told}"):
        check_schema(json.dumps(schema))


def test_a_schema_as_pydantic_writes_it_is_taken():
    class Part(BaseModel):
        name: str = Field(description="of the part", max_length=10)
        note: str | None = None

    class Whole(BaseModel):
        parts: list[Part] = Field(max_length=3)
        kind: Literal["a", "b"] = "a"
        first: Part

    check_schema(json.dumps(Whole.model_json_schema()))
