"""The warm start: demonstrations played in the real world, and a loss on the expert's own tokens only."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import scripted_config

from envs.errors import UserError
from envs.types import Message
from trainer.config import ModelConfig, RunConfig
from trainer.job import Job, prepare
from trainer.warmstart import (
    Demonstration,
    demonstration_ledgers,
    expert_ledger,
    expert_ledgers,
    play_expert,
    warm_start,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

WARMSTART: dict[str, object] = {"num_steps": 12, "episodes_per_step": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("warmstart") / "run"
    config = scripted_config(folder, tiny_model, warmstart=WARMSTART, world={"num_train_tasks": 8})
    return prepare(RunConfig.model_validate(config))


def test_the_trainable_tokens_of_a_demonstration_are_the_experts_words_and_nothing_else(job: Job) -> None:
    task = job.train_tasks[0]
    turns = job.world.expert_episode(task, 0)
    ledger = asyncio.run(expert_ledger(task, turns, world=job.world, chat=job.chat))
    sample = ledger.to_sample(advantage=0.0, rollout_id="r", task_id="t")
    own = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if trained])
    given = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if not trained])
    assert own.count("<tool_call>") == sum(not isinstance(turn, str) for turn in turns)
    assert own.endswith(f"{turns[-1]}<|im_end|>")
    assert task.messages[-1].content in given and "report" in given
    assert task.messages[-1].content not in own


def test_the_demonstrations_are_a_function_of_config_and_seed(job: Job) -> None:
    first, second = (expert_ledgers(job.config, job.train_tasks, world=job.world, chat=job.chat) for _ in range(2))
    assert first == second
    assert len(first) == 24
    other = job.config.model_copy(update={"seed": 1})
    assert expert_ledgers(other, job.train_tasks, world=job.world, chat=job.chat) != first


def test_demonstrations_that_do_not_fit_are_an_error_that_names_the_limit(job: Job) -> None:
    short = job.config.rollout.model_copy(update={"max_episode_tokens": 100})
    config = job.config.model_copy(update={"rollout": short})
    with pytest.raises(UserError, match="max_episode_tokens = 100"):
        expert_ledgers(config, job.train_tasks, world=job.world, chat=job.chat)


def test_rows_of_a_users_own_have_a_canary_and_no_expert(tiny_model: Path, tmp_path: Path) -> None:
    from trainer.setup import canary_ids

    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "What was the profit of Acme?"}], "answer": "3 million"}
    rows.write_text(f"{json.dumps(row)}\n" * 2)
    data = {"train": str(rows), "eval": str(rows)}
    own = prepare(
        RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, data=data, warmstart=WARMSTART))
    )
    ids = canary_ids(own)
    assert len(ids) == 2 and "profit of Acme" in own.chat.decode(ids[0])
    with pytest.raises(UserError, match="the world has none"):
        expert_ledgers(own.config, own.train_tasks, world=own.world, chat=own.chat)


def test_the_canary_of_a_long_prompt_is_the_end_of_its_episode_where_the_models_own_turns_are(job: Job) -> None:
    from trainer.setup import canary_ids

    rules = Message(role="system", content="Read the reports with care. " * 400)
    tasks = [replace(task, messages=(rules, *task.messages)) for task in job.train_tasks[:3]]
    rows = canary_ids(replace(job, train_tasks=tasks))
    assert len(rows) > 1
    for task, row in zip(tasks, rows, strict=False):
        turns = job.world.expert_episode(task, 0)
        ledger = asyncio.run(expert_ledger(task, turns, world=job.world, chat=job.chat))
        assert row == ledger.prompt_ids[-len(row) :] and len(row) < len(ledger) / 2
        assert job.chat.decode(row).endswith(f"{turns[-1]}<|im_end|>")
        own = ledger.to_sample(advantage=0.0, rollout_id="r", task_id="t").trainable[-len(row) :]
        assert sum(own) > 10, "tokens that the model itself writes"


def test_a_users_own_conversations_are_imitated_in_place_of_an_expert(
    job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    played = [
        asyncio.run(play_expert(task, job.world.expert_episode(task, 0), world=job.world))
        for task in job.train_tasks[:3]
    ]
    file = tmp_path / "demonstrations.jsonl"
    rows = [{"messages": [m.to_openai() for m in d.messages], "tools": list(d.tools)} for d in played]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = scripted_config(tmp_path / "run", tiny_model, warmstart=WARMSTART | {"data": str(file)})
    own = prepare(RunConfig.model_validate(config))
    ledgers = expert_ledgers(
        own.config, own.train_tasks, world=own.world, chat=own.chat, demonstrations=own.demonstrations
    )
    assert len(ledgers) == 24
    expected = [demonstration_ledgers(d, chat=job.chat)[-1] for d in played]
    assert all(ledger in expected for ledger in ledgers) and all(ledger in ledgers for ledger in expected)


def test_a_message_that_is_not_to_be_learned_is_context_of_the_row(job: Job) -> None:
    words = [("user", "Q"), ("assistant", "WRONG"), ("user", "Again"), ("assistant", "RIGHT")]
    messages = tuple(Message(role=role, content=text) for role, text in words)
    ledger = demonstration_ledgers(Demonstration(messages=messages, untrained=frozenset({1})), chat=job.chat)[-1]
    sample = ledger.to_sample(advantage=0.0, rollout_id="r", task_id="t")
    own = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if trained])
    assert own == "RIGHT<|im_end|>"
    whole = demonstration_ledgers(Demonstration(messages=messages), chat=job.chat)[-1]
    assert whole.prompt_ids == ledger.prompt_ids, "only what is learned differs"


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content | trim }}</think>
{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_the_reasoning_of_a_demonstration_is_learned_or_refused_before_a_model_is_loaded(
    job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    file, template = tmp_path / "demonstrations.jsonl", tmp_path / "thinking.jinja"
    answer = {"role": "assistant", "content": "42", "reasoning_content": " BECAUSE\n"}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}, answer]}))
    config = scripted_config(tmp_path / "run", tiny_model, warmstart=WARMSTART | {"data": str(file)})
    with pytest.raises(UserError, match=r"line 1: messages\[1\].reasoning_content: the chat template writes no reason"):
        prepare(RunConfig.model_validate(config))
    template.write_text(THINKING)
    config["model"] |= {"chat_template": str(template)}
    own = prepare(RunConfig.model_validate(config))
    ledger = demonstration_ledgers(own.demonstrations[0], chat=own.chat)[-1]
    assert own.chat.decode(ledger.prompt_ids).endswith("<think>BECAUSE</think>\n42<|im_end|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "line 1: messages: the last message must be the assistant's",
        ),
        ("{", "line 1: not valid JSON"),
    ],
)
def test_a_bad_demonstration_is_named_by_file_and_line(
    tiny_model: Path, tmp_path: Path, row: object, expected: str
) -> None:
    file = tmp_path / "demonstrations.jsonl"
    file.write_text(row if isinstance(row, str) else json.dumps(row))
    config = scripted_config(tmp_path / "run", tiny_model, warmstart=WARMSTART | {"data": str(file)})
    with pytest.raises(UserError, match=expected):
        prepare(RunConfig.model_validate(config))


def test_the_loss_falls_and_starts_at_the_mean_over_the_experts_tokens(job: Job, tmp_path: Path) -> None:
    from trainer.adapter import load_model

    model = load_model(job.model_path, ModelConfig(dtype="float32"), device=torch.device("cpu"), seed=0)
    ledgers = expert_ledgers(job.config, job.train_tasks, world=job.world, chat=job.chat)
    losses: list[float] = []
    warm_start(model, ledgers, config=job.config, folder=tmp_path, on_step=losses.append)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    fresh = load_model(job.model_path, ModelConfig(dtype="float32"), device=torch.device("cpu"), seed=0)
    means = [_mean_nll(fresh, ledgers, i) for i in range(0, len(ledgers), 2)]
    # The first step's loss is that of some pair of demonstrations under the untrained adapter.
    assert min(means) - 0.3 < losses[0] < max(means) + 0.3


def test_the_loss_is_that_of_trl_itself(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer

    from trainer.adapter import load_model

    ledgers = expert_ledgers(job.config, job.train_tasks, world=job.world, chat=job.chat)
    ours: list[float] = []
    trls: list[float] = []

    def both(trainer: SFTTrainer, *args: object, **kwargs: object) -> object:
        start = trainer.training_step

        def step(model: object, inputs: dict[str, torch.Tensor], num_items_in_batch: object = None) -> object:
            with torch.no_grad():
                ours.append(float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)))
                trls.append(
                    float(SFTTrainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=num_items_in_batch))
                )
            return start(model, inputs, num_items_in_batch)

        trainer.training_step = step
        return original(trainer, *args, **kwargs)

    original = SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", both)
    model = load_model(job.model_path, ModelConfig(dtype="float32"), device=torch.device("cpu"), seed=0)
    warm_start(model, ledgers, config=job.config, folder=tmp_path, on_step=lambda loss: None)
    assert len(ours) == 24
    assert ours == pytest.approx(trls, abs=1e-5)


def test_one_process_that_sees_several_gpus_trains_on_one(job: Job, tmp_path: Path, monkeypatch) -> None:
    import trl

    from trainer.adapter import load_model

    original = trl.SFTConfig
    # Off the CPU transformers counts what torch counts.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(trl, "SFTConfig", lambda **options: original(**options | {"use_cpu": False}))
    assert trl.SFTConfig(output_dir=str(tmp_path), bf16=False).n_gpu == 4
    model = load_model(job.model_path, ModelConfig(dtype="float32"), device=torch.device("cpu"), seed=0)
    section = job.config.warmstart.model_copy(update={"num_steps": 2})
    config = job.config.model_copy(update={"warmstart": section})
    ledgers = expert_ledgers(config, job.train_tasks, world=job.world, chat=job.chat)
    losses: list[float] = []
    warm_start(model, ledgers, config=config, folder=tmp_path, on_step=losses.append)
    assert len(losses) == 2 and not model.training


def _mean_nll(model: torch.nn.Module, ledgers: list, start: int) -> float:  # type: ignore[type-arg]
    total, count = 0.0, 0
    for ledger in ledgers[start : start + 2]:
        row = ledger.to_sample(advantage=0.0, rollout_id="r", task_id="t")
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row.token_ids])).logits.log_softmax(-1)[0]
        positions = [t for t, trained in enumerate(row.trainable) if trained]
        total -= sum(float(logprobs[t - 1, row.token_ids[t]]) for t in positions)
        count += len(positions)
    return total / count
