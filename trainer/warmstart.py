"""The supervised warm start: fine-tuning on scripted expert episodes before the first rollout.

For models that write no valid tool call by themselves, so that no reward would ever vary.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.base import ExpertTurn, World
from envs.errors import UserError
from envs.tools import Tool, call_tool, offered_tools
from envs.types import Message, Task, ToolCall
from trainer.chat import Chat
from trainer.config import RunConfig
from trainer.rollout import derive_seed
from trainer.samples import Ledger

_EXPERT_VERSION = 0
IGNORED = -100
"""The label of a token outside the loss, by the convention of transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A conversation to imitate: the assistant messages of it are the expert's."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions (Chat Completions JSON) of the tools that the expert was offered."""
    untrained: frozenset[int] = frozenset()
    """Places of messages that are context, though they may be the assistant's: mistakes that are put right, say."""
    where: str = "warmstart"
    """The file and line, or what else it came of."""


async def play_expert(task: Task, turns: Sequence[ExpertTurn], *, world: World) -> Demonstration:
    """Play the scripted turns in a real environment. Without turns there is only the prompt, and none is opened."""
    env = world.make_env()
    if not turns:
        return Demonstration(messages=task.messages, tools=_schemas(offered_tools(task, env.tools)))
    await env.open(task, f"expert-{task.task_id}")
    try:
        tools = offered_tools(task, env.tools)
        messages, num_calls = list(task.messages), 0
        for turn in turns:
            if isinstance(turn, str):
                messages.append(Message(role="assistant", content=turn))
                continue
            calls = tuple(
                ToolCall(call_id=f"call{num_calls + i:05d}", name=name, arguments=json.dumps(dict(arguments)))
                for i, (name, arguments) in enumerate(turn)
            )
            messages.append(Message(role="assistant", tool_calls=calls))
            num_calls += len(calls)
            for call in calls:
                result = await call_tool(tools, call, timeout_s=60)
                messages.append(Message(role="tool", content=result.output, call_id=result.call_id, name=result.name))
        return Demonstration(messages=tuple(messages), tools=_schemas(tools))
    finally:
        await env.close(None)


def _schemas(tools: Mapping[str, Tool]) -> tuple[Mapping[str, Any], ...]:
    return tuple(t.schema() for t in tools.values())


def demonstration_ledger(demonstration: Demonstration, *, chat: Chat) -> Ledger:
    """The conversation as a training row; the expert's own tokens are the trainable ones.

    Raises `UserError` where the template rewrites earlier turns, so that no single row holds them all, and where it
    leaves out the reasoning of a turn: the model would be taught to answer without.
    """
    messages, tools = demonstration.messages, demonstration.tools
    own = [i for i, message in enumerate(messages) if message.role == "assistant"]
    ledger = Ledger()
    ledger.append_context(chat.open(messages[: own[0]] if own else messages, tools))
    for i, following in itertools.pairwise([*own, len(messages)]):
        token_ids = chat.encode_assistant(messages[:i], messages[i], tools)
        if i in demonstration.untrained:
            ledger.append_context(token_ids)
        else:
            ledger.append_sampled(token_ids, [0.0] * len(token_ids), _EXPERT_VERSION)
            if not _says(chat.decode(token_ids), messages[i].reasoning):
                raise UserError(
                    f"{demonstration.where}: messages[{i}].reasoning_content: the chat template writes no reasoning "
                    "there; leave it out, or name a template that does (model.chat_template, "
                    "model.chat_template_kwargs)"
                )
        answers = messages[i + 1 : following]
        if not answers:
            continue
        continuation = chat.extend(messages[:i], messages[i], answers, tools, token_ids)
        if continuation.forked:
            raise UserError(
                f"{demonstration.where}: the chat template rewrites the earlier turns of this demonstration"
            )
        ledger.append_context(continuation.token_ids)
    return ledger


def check_demonstrations(demonstrations: Sequence[Demonstration], *, chat: Chat) -> None:
    """Raise `UserError` where the template takes none of their kind: one with reasoning, one without."""
    for thinks in (True, False):
        of_kind = (d for d in demonstrations if any(m.reasoning for m in d.messages) == thinks)
        for demonstration in itertools.islice(of_kind, 1):
            demonstration_ledger(demonstration, chat=chat)


def _says(text: str, words: str) -> bool:
    """Whether `words` stand in it, whatever the white space."""
    return "".join(words.split()) in "".join(text.split())


async def expert_ledger(task: Task, turns: Sequence[ExpertTurn], *, world: World, chat: Chat) -> Ledger:
    """The training row of the scripted turns, played in a real environment."""
    return demonstration_ledger(await play_expert(task, turns, world=world), chat=chat)


def expert_ledgers(
    config: RunConfig,
    tasks: Sequence[Task],
    *,
    world: World,
    chat: Chat,
    demonstrations: Sequence[Demonstration] = (),
) -> list[Ledger]:
    """The rows of the whole warm start, in training order: of `demonstrations`, or of the world's expert.

    Raises `UserError` when there are too few that fit into an episode.
    """
    assert config.warmstart is not None
    needed = config.warmstart.num_steps * config.warmstart.episodes_per_step

    async def play() -> list[Ledger]:
        ledgers: list[Ledger] = []
        rng = random.Random(derive_seed(config.seed, "warmstart"))
        for attempt in range(4 * needed):
            if demonstrations:
                ledger = demonstration_ledger(rng.choice(demonstrations), chat=chat)
            else:
                task = rng.choice(tasks)
                turns = world.expert_episode(task, derive_seed(config.seed, "expert", attempt))
                if not turns:
                    continue
                ledger = await expert_ledger(task, turns, world=world, chat=chat)
            if len(ledger) <= config.rollout.max_episode_tokens:
                ledgers.append(ledger)
            if len(ledgers) == needed:
                return ledgers
        raise UserError(
            f"warmstart: only {len(ledgers)} of {needed} expert episodes fit into rollout.max_episode_tokens = "
            f"{config.rollout.max_episode_tokens}, or the world has none; raise the limit, name a file of "
            "demonstrations (warmstart.data), or leave the section out"
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
