"""The supervised warm start: fine-tuning on scripted expert episodes before the first rollout.

For models that write no valid tool call by themselves, so that no reward would ever vary.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from envs.base import ExpertTurn, World
from envs.errors import UserError
from envs.tools import call_tool
from envs.types import Message, Task, ToolCall
from trainer.chat import Chat
from trainer.config import RunConfig
from trainer.rollout import derive_seed
from trainer.samples import Ledger

_EXPERT_VERSION = 0
IGNORED = -100
"""The label of a token outside the loss, by the convention of transformers."""


async def expert_ledger(task: Task, turns: Sequence[ExpertTurn], *, world: World, chat: Chat) -> Ledger:
    """Play the scripted turns in a real environment; the expert's own tokens are the trainable ones."""
    env = world.make_env()
    await env.open(task, f"expert-{task.task_id}")
    try:
        tools = {name: env.tools[name] for name in (env.tools if task.tools is None else task.tools)}
        schemas = [t.schema() for t in tools.values()]
        messages = list(task.messages)
        ledger, num_calls = Ledger(), 0
        ledger.append_context(chat.open(messages, schemas))
        for turn in turns:
            if isinstance(turn, str):
                message = Message(role="assistant", content=turn)
            else:
                calls = tuple(
                    ToolCall(call_id=f"call{num_calls + i:05d}", name=name, arguments=json.dumps(dict(arguments)))
                    for i, (name, arguments) in enumerate(turn)
                )
                message = Message(role="assistant", tool_calls=calls)
                num_calls += len(calls)
            token_ids = chat.encode_assistant(messages, message, schemas)
            ledger.append_sampled(token_ids, [0.0] * len(token_ids), _EXPERT_VERSION)
            answers = []
            for call in message.tool_calls:
                result = await call_tool(tools, call, timeout_s=60)
                answers.append(Message(role="tool", content=result.output, call_id=result.call_id, name=result.name))
            if message.tool_calls:
                ledger.append_context(chat.extend(messages, message, answers, schemas, token_ids).token_ids)
            messages += [message, *answers]
        return ledger
    finally:
        await env.close(None)


def expert_ledgers(config: RunConfig, tasks: Sequence[Task], *, world: World, chat: Chat) -> list[Ledger]:
    """The demonstrations of the whole warm start, in training order. Raises `UserError` when there are none."""
    assert config.warmstart is not None
    needed = config.warmstart.num_steps * config.warmstart.episodes_per_step

    async def play() -> list[Ledger]:
        ledgers: list[Ledger] = []
        rng = random.Random(derive_seed(config.seed, "warmstart"))
        for attempt in range(4 * needed):
            task = rng.choice(tasks)
            turns = world.expert_episode(task, derive_seed(config.seed, "expert", attempt))
            if turns:
                ledger = await expert_ledger(task, turns, world=world, chat=chat)
                if len(ledger) <= config.rollout.max_episode_tokens:
                    ledgers.append(ledger)
            if len(ledgers) == needed:
                return ledgers
        raise UserError(
            f"warmstart: only {len(ledgers)} of {needed} expert episodes fit into rollout.max_episode_tokens = "
            f"{config.rollout.max_episode_tokens}, or the world has none; raise the limit or leave the section out"
        )

    return asyncio.run(play())


def warm_start(
    model: Any, ledgers: Sequence[Ledger], *, config: RunConfig, folder: Path, on_step: Callable[[float], None]
) -> None:
    """Train the adapter of `model` (a PEFT model, in place) with trl's SFTTrainer; `on_step` gets each step's loss.

    The loss is the mean negative log-likelihood of the expert's own tokens, nats: prompts, tool results and template
    glue are context.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class ExpertTokensTrainer(SFTTrainer):  # type: ignore[misc]
        """Scores the expert's tokens only. Without Triton, trl 1.16 puts every position through the output head, in
        float32: on a CPU that was three quarters of the backward pass."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels_BT = inputs["labels"][:, 1:]
            positions_N = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
            outputs = model(input_ids=inputs["input_ids"], logits_to_keep=positions_N, use_cache=False)
            loss = torch.nn.functional.cross_entropy(
                outputs.logits.float().flatten(0, 1),
                labels_BT[:, positions_N].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            # The count is over all processes, whose gradients DDP averages.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                on_step(float(logs["loss"]))

    assert config.warmstart is not None
    # Rows of one: nothing is padded, so no attention mask is needed and only the expert's positions are scored.
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=config.warmstart.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, config.warmstart.episodes_per_step // num_processes),
        learning_rate=config.warmstart.learning_rate,
        lr_scheduler_type="constant",
        max_length=None,
        seed=config.seed,
        bf16=False,
        gradient_checkpointing=config.model.gradient_checkpointing,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not next(model.parameters()).is_cuda,
    )
    trainer = ExpertTokensTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(_columns(ledgers)), callbacks=[Report()]
    )
    trainer.train()
    model.eval()


def _columns(ledgers: Sequence[Ledger]) -> dict[str, list[list[int]]]:
    """The rows as trl takes them ready-made: token ids, and labels where the expert wrote."""
    rows = [ledger.to_sample(advantage=0.0, rollout_id="", task_id="") for ledger in ledgers]
    return {
        "input_ids": [list(row.token_ids) for row in rows],
        "labels": [
            [token if trained else IGNORED for token, trained in zip(row.token_ids, row.trainable, strict=True)]
            for row in rows
        ],
    }
