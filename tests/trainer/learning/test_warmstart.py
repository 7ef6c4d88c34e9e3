"""The warm start: demonstrations played in the real world, and a loss on the expert's own tokens only."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file

from envs.errors import UserError
from envs.finance.tools import FinanceEnv
from envs.finance.world import FinanceWorld
from envs.types import Message, Task
from tests.support.configs import scripted_config
from tests.support.run_server import Server
from tests.support.scripted_engine import engine_starter, finance_script
from trainer.config import RunConfig
from trainer.learning.policy import Policy
from trainer.learning.samples import Sample, sample_of
from trainer.learning.warmstart import demonstration_ledgers, expert_ledger, expert_ledgers, in_steps
from trainer.prepare import Prepared, prepare
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.session import canary_ids, load_policy
from trainer.tasks.expert import play_expert
from trainer.train import train
from trainer.types import Demonstration, Ledger

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

WARMSTART: dict[str, object] = {"num_steps": 12, "episodes_per_step": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("warmstart") / "run"
    config = scripted_config(folder, tiny_model, warmstart=WARMSTART, world={"num_train_tasks": 8})
    return prepare(RunConfig.model_validate(config))


def rows_of(job: Prepared) -> list[Ledger]:
    with asyncio.Runner() as loop:
        return expert_ledgers(
            job.config,
            job.train_tasks,
            world=job.world,
            chat=job.chat,
            loop=loop,
            run_id="run",
            demonstrations=job.demonstrations,
        )


def fresh_policy(job: Prepared) -> Policy:
    config = job.config
    return Policy(job.model_path, config.model, config.optim, Accelerator(cpu=True), config.seed)


def test_the_trainable_tokens_of_a_demonstration_are_the_experts_words_and_nothing_else(job: Prepared) -> None:
    task = job.train_tasks[0]
    turns = job.world.expert_episode(task, 0)
    ledger = asyncio.run(expert_ledger(task, turns, world=job.world, chat=job.chat))
    sample = sample_of(ledger, advantage=0.0, rollout_id="r", task_id="t")
    own = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if trained])
    given = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if not trained])
    assert own.count("<tool_call>") == sum(not isinstance(turn, str) for turn in turns)
    assert own.endswith(f"{turns[-1]}<|im_end|>")
    assert task.messages[-1].content in given and "report" in given
    assert task.messages[-1].content not in own


def test_the_demonstrations_are_a_function_of_config_and_seed(job: Prepared) -> None:
    first, second = rows_of(job), rows_of(job)
    assert first == second
    assert len(first) == 24
    assert rows_of(replace(job, config=job.config.model_copy(update={"seed": 1}))) != first


def test_demonstrations_that_do_not_fit_are_an_error_that_names_the_limit(job: Prepared) -> None:
    short = job.config.rollout.model_copy(update={"max_episode_tokens": 100})
    config = job.config.model_copy(update={"rollout": short})
    with pytest.raises(UserError, match="max_episode_tokens = 100"):
        rows_of(replace(job, config=config))


def test_rows_of_a_users_own_have_a_canary_and_no_expert(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "What was the profit of Acme?"}], "answer": "3 million"}
    rows.write_text(f"{json.dumps(row)}\n" * 2)
    data = {"train": str(rows), "eval": str(rows)}
    with pytest.raises(UserError, match=r"warmstart: there is nothing to imitate: .* the world has no expert"):
        prepare(RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, data=data, warmstart=WARMSTART)))
    own = prepare(RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, data=data)))
    ids = asyncio.run(canary_ids(own, name="canary"))
    assert len(ids) == 2 and "profit of Acme" in own.chat.decode(ids[0])


def test_the_canary_of_a_long_prompt_is_the_end_of_its_episode_where_the_models_own_turns_are(job: Prepared) -> None:
    rules = Message(role="system", content="Read the reports with care. " * 400)
    tasks = [replace(task, messages=(rules, *task.messages)) for task in job.train_tasks[:3]]
    rows = asyncio.run(canary_ids(replace(job, train_tasks=tasks), name="canary"))
    assert len(rows) > 1
    for task, row in zip(tasks, rows, strict=False):
        turns = job.world.expert_episode(task, 0)
        ledger = asyncio.run(expert_ledger(task, turns, world=job.world, chat=job.chat))
        assert row == ledger.prompt_ids[-len(row) :] and len(row) < len(ledger) / 2
        assert job.chat.decode(row).endswith(f"{turns[-1]}<|im_end|>")
        own = sample_of(ledger, advantage=0.0, rollout_id="r", task_id="t").trainable[-len(row) :]
        assert sum(own) > 10, "tokens that the model itself writes"


def test_a_users_own_conversations_are_imitated_in_place_of_an_expert(
    job: Prepared, tiny_model: Path, tmp_path: Path
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
    ledgers = rows_of(own)
    assert len(ledgers) == 24
    expected = [demonstration_ledgers(d, chat=job.chat)[-1] for d in played]
    assert all(ledger in expected for ledger in ledgers) and all(ledger in ledgers for ledger in expected)


def test_a_message_that_is_not_to_be_learned_is_context_of_the_row(job: Prepared) -> None:
    words = [("user", "Q"), ("assistant", "WRONG"), ("user", "Again"), ("assistant", "RIGHT")]
    messages = tuple(Message(role=role, content=text) for role, text in words)
    ledger = demonstration_ledgers(Demonstration(messages=messages, untrained=frozenset({1})), chat=job.chat)[-1]
    sample = sample_of(ledger, advantage=0.0, rollout_id="r", task_id="t")
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
SILENT = THINKING.replace(THINKING[THINKING.index("{% if m.reas") : THINKING.index("{{ m.content")], "")


def test_the_reasoning_of_a_demonstration_is_learned_or_refused_before_a_model_is_loaded(
    job: Prepared, tiny_model: Path, tmp_path: Path
) -> None:
    file, template = tmp_path / "demonstrations.jsonl", tmp_path / "thinking.jinja"
    answer = {"role": "assistant", "content": "42", "reasoning_content": " BECAUSE\n"}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}, answer]}))
    config = scripted_config(tmp_path / "run", tiny_model, warmstart=WARMSTART | {"data": str(file)})
    template.write_text(SILENT)
    config["model"] |= {"chat_template": str(template)}
    with pytest.raises(UserError, match=r"line 1: messages\[1\].reasoning_content: the chat template writes no reason"):
        prepare(RunConfig.model_validate(config))
    template.write_text(THINKING)
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


def test_the_loss_is_the_mean_over_the_experts_tokens_and_falls(job: Prepared) -> None:
    steps = in_steps(rows_of(job), job.config.warmstart)
    assert [len(step) for step in steps] == [2] * 12
    policy, losses = fresh_policy(job), []
    expected = _mean_nll(policy.model, steps[0])
    policy.imitate(steps, learning_rate=1e-2, on_step=losses.append)
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert policy.num_updates == policy.num_steps == 0, "the policy before the first step is version 0"
    assert not any(policy.state_dict()["moments"]), "reinforcement starts with an optimizer of its own"


def test_loss_and_adapter_are_those_of_trls_own_trainer_on_the_same_rows(job: Prepared, tmp_path: Path) -> None:
    steps = in_steps(rows_of(job), job.config.warmstart)
    ours, trls, losses = fresh_policy(job), fresh_policy(job), []
    start = _weights(ours)
    ours.imitate(steps, learning_rate=1e-3, on_step=losses.append)
    expected = _train_with_trl(trls.model, steps, tmp_path, learning_rate=1e-3)
    assert losses == pytest.approx(expected, abs=1e-5)
    theirs = _weights(trls)
    for name, weight in _weights(ours).items():
        moved = (theirs[name] - start[name]).norm()
        assert moved > 1e-3
        # Adam divides by the root of the second moment: where a gradient is near zero its rounding shows.
        assert (weight - theirs[name]).norm() < 1e-3 * moved, name


def _train_with_trl(model: Any, steps: list[list[Sample]], folder: Path, *, learning_rate: float) -> list[float]:
    """Each step's loss as trl logs it, five digits."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [row for step in steps for row in step]
    labels = [[t if on else -100 for t, on in zip(r.token_ids, r.trainable, strict=True)] for r in rows]
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=len(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(steps[0]),
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    dataset = Dataset.from_dict({"input_ids": [list(r.token_ids) for r in rows], "labels": labels})
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    adapter: dict[str, torch.Tensor] = policy.state_dict()["adapter"]
    return adapter


def _mean_nll(model: torch.nn.Module, rows: list[Sample]) -> float:
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row.token_ids])).logits.log_softmax(-1)[0]
        positions = [t for t, trained in enumerate(row.trainable) if trained]
        total -= sum(float(logprobs[t - 1, row.token_ids[t]]) for t in positions)
        count += len(positions)
    return total / count


def test_an_interrupted_warm_start_is_done_again_to_the_same_bytes(job: Prepared, tmp_path: Path) -> None:
    class Stops(Progress):
        """Is interrupted in the fifth step."""

        def advance(self, num_done: int, *, tokens: int = 0) -> None:
            steps.append(tokens)
            if len(steps) == 5:
                raise KeyboardInterrupt

    def warm_started(folder: Path, progress: Progress) -> dict[str, torch.Tensor]:
        own = replace(job, config=job.config.model_copy(update={"output_dir": folder}))
        RunFolder.create(own.config)
        run = RunFolder.open(own.config, rank=0)
        with asyncio.Runner() as loop:
            return _weights(load_policy(own, run, Accelerator(cpu=True), progress, loop))

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        warm_started(tmp_path / "one", Stops(None, 0, show=False))
    assert not list((tmp_path / "one" / "checkpoints").glob("step-*"))
    again, whole = (warm_started(tmp_path / name, Progress(None, 0, show=False)) for name in ("one", "two"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert any(weight.abs().sum() > 0 for name, weight in whole.items() if "lora_B" in name)
    losses = [json.loads((tmp_path / name / "run.json").read_text())["warmstart_loss"] for name in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_two_processes_share_out_the_warm_start_and_end_with_the_same_adapter(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    """Three episodes a step: no even share."""
    warmstart: dict[str, object] = {"num_steps": 3, "episodes_per_step": 3, "learning_rate": 1e-2}
    for processes, name in enumerate(("one", "two"), start=1):
        config = scripted_config(tmp_path / name, tiny_model, warmstart=warmstart, optim={"num_steps": 0})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        server.start(tmp_path / f"{name}.yaml", processes=processes)
        assert server.wait() == 0
    assert {p.name for p in (tmp_path / "two").glob("run*.log")} == {"run.log", "run.rank1.log"}
    losses = [json.loads((tmp_path / name / "run.json").read_text())["warmstart_loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 3
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert (two[name] - weight).norm() < 1e-3 * weight.norm() + 1e-6, name


def test_an_expert_that_thinks_is_imitated_with_its_reasoning(smollm2: Path, tmp_path: Path) -> None:
    sections = scripted_config(tmp_path / "run", smollm2, warmstart=WARMSTART, world={"detour_thoughts": 1.0})
    with pytest.raises(ValidationError, match=r"its expert reasons, but there is no model\.reasoning_parser"):
        RunConfig.model_validate(sections)
    sections["model"] |= {"reasoning_parser": "olmo3"}  # type: ignore[operator]
    job = prepare(RunConfig.model_validate(sections))
    for ledger in rows_of(job)[:3]:
        sample = sample_of(ledger, advantage=1.0, rollout_id="r", task_id="t")
        own = job.chat.decode([t for t, trained in zip(sample.token_ids, sample.trainable, strict=True) if trained])
        assert own.count("<think>") == own.count("</think>") == own.count("<|im_end|>") > 1


def test_what_experts_hold_is_known_should_the_run_be_killed_as_what_rollouts_hold(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the warm start and of the canary."""
    seen: list[tuple[str, str]] = []
    own_open, own_close = FinanceEnv.open, FinanceEnv.close

    async def opens(env: FinanceEnv, task: Task, rollout_id: str) -> None:
        seen.append(("env opened", rollout_id))
        await own_open(env, task, rollout_id)

    async def closes(env: FinanceEnv, episode: Any) -> None:
        await own_close(env, episode)
        seen.append(("env closed", ""))

    async def sweep(world: FinanceWorld, rollout_ids: Any) -> None: ...

    monkeypatch.setattr(FinanceEnv, "open", opens)
    monkeypatch.setattr(FinanceEnv, "close", closes)
    monkeypatch.setattr(FinanceWorld, "sweep", sweep, raising=False)
    monkeypatch.setattr(RunFolder, "opened", lambda run, name: seen.append(("opened", name)))
    monkeypatch.setattr(RunFolder, "closed", lambda run, name: seen.append(("closed", name)))
    warmstart = {"num_steps": 1, "episodes_per_step": 2}
    config = RunConfig.model_validate(
        scripted_config(tmp_path / "run", tiny_model, warmstart=warmstart, optim={"num_steps": 0})
    )
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world)), None, []))
    of_experts = [
        i for i, (what, _) in enumerate(seen) if what == "opened" and re.search("-(expert|canary)-", seen[i][1])
    ]
    names = " ".join(seen[i][1] for i in of_experts)
    assert names.count("-expert-") == 2 and names.count("-canary-") >= 1
    for i in of_experts:
        assert seen[i + 1 : i + 4] == [("env opened", seen[i][1]), ("env closed", ""), ("closed", seen[i][1])]


def test_an_expert_that_hangs_is_told_before_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinanceWorld, "expert_episode", lambda *_: time.sleep(60))
    config = scripted_config(tmp_path / "run", tiny_model, warmstart=WARMSTART)
    config["rollout"] = config["rollout"] | {"episode_timeout_s": 0.3, "tool_timeout_s": 0.2}
    with pytest.raises(UserError, match=r"world: expert_episode: not done within 0.3 s \(rollout.episode_timeout_s\)"):
        prepare(RunConfig.model_validate(config))
