"""The supervised warm start: fine-tuning on scripted expert episodes before the first rollout.

For models that write no valid tool call by themselves, so that no reward would ever vary.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from envs.base import ExpertTurn, World
from envs.errors import UserError
from envs.types import Task
from envs.users import ScriptUsers, Users
from trainer.chat import Chat, TemplateRefused
from trainer.config import RolloutConfig, RunConfig
from trainer.expert import Demonstration, play_expert
from trainer.rollout import derive_seed
from trainer.samples import Ledger

_EXPERT_VERSION = 0
IGNORED = -100
"""The label of a token outside the loss, by the convention of transformers."""


def demonstration_ledgers(demonstration: Demonstration, *, chat: Chat) -> list[Ledger]:
    """The conversation as training rows; the expert's own tokens are the trainable ones, each in one row only.

    One row, unless the template rewrites earlier turns (drops their reasoning, say): from there on it is a new one, as
    in a rollout. Raises `UserError` where the template leaves out the reasoning of a turn: the model would be taught to
    answer without.
    """
    _check_texts(demonstration, chat)
    try:
        return _ledgers(demonstration, chat)
    except TemplateRefused as e:
        raise UserError(f"{demonstration.where}: {e}") from e


def _ledgers(demonstration: Demonstration, chat: Chat) -> list[Ledger]:
    messages, tools = demonstration.messages, demonstration.tools
    own = [i for i, message in enumerate(messages) if message.role == "assistant"]
    ledgers = [Ledger()]
    ledgers[-1].append_context(chat.open(messages[: own[0]] if own else messages, tools))
    for i, following in itertools.pairwise([*own, len(messages)]):
        token_ids = chat.encode_assistant(messages[:i], messages[i], tools)
        if i in demonstration.untrained:
            ledgers[-1].append_context(token_ids)
        else:
            ledgers[-1].append_sampled(token_ids, [0.0] * len(token_ids), _EXPERT_VERSION)
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
            ledgers.append(Ledger())
        ledgers[-1].append_context(continuation.token_ids)
    return ledgers


def check_demonstrations(demonstrations: Sequence[Demonstration], *, chat: Chat) -> None:
    """Raise `UserError` where the template takes none of their kind: one with reasoning, one without.

    And for a turn to be learned whose text no policy could have written: see `_check_texts`.
    """
    for demonstration in demonstrations:
        _check_texts(demonstration, chat)
    for thinks in (True, False):
        of_kind = (d for d in demonstrations if any(m.reasoning for m in d.messages) == thinks)
        for demonstration in itertools.islice(of_kind, 1):
            demonstration_ledgers(demonstration, chat=chat)


def _check_texts(demonstration: Demonstration, chat: Chat) -> None:
    """Raise `UserError` for a token that begins or ends turns in the text of one: it would be trained on as such."""
    for i, message in enumerate(demonstration.messages):
        is_trained = message.role == "assistant" and i not in demonstration.untrained
        if is_trained and (found := chat.special.of_turns_in(message)):
            raise UserError(
                f"{demonstration.where}: messages[{i}]: its text holds {found!r}, which begins or ends turns in the "
                "chat format, so that no policy could write it; leave it out, or give the turn a weight of 0"
            )


def _says(text: str, words: str) -> bool:
    """Whether `words` stand in it, whatever the white space."""
    return "".join(words.split()) in "".join(text.split())


async def expert_ledger(
    task: Task,
    turns: Sequence[ExpertTurn],
    *,
    world: World,
    chat: Chat,
    users: Users | None = None,
    rollout: RolloutConfig | None = None,
) -> Ledger:
    """The training row of the scripted turns, played in a real environment; of several it is the last."""
    played = await play_expert(task, turns, world=world, users=users, rollout=rollout)
    return demonstration_ledgers(played, chat=chat)[-1]


def expert_ledgers(
    config: RunConfig,
    tasks: Sequence[Task],
    *,
    world: World,
    chat: Chat,
    demonstrations: Sequence[Demonstration] = (),
    users: Users | None = None,
) -> list[Ledger]:
    """The rows of the whole warm start, in training order: of `demonstrations`, or of the world's expert.

    Raises `UserError` when there are too few that fit into an episode, and for an expert who talks with a model.
    """
    assert config.warmstart is not None
    needed = config.warmstart.num_steps * config.warmstart.episodes_per_step

    async def play() -> list[Ledger]:
        ledgers: list[Ledger] = []
        rng = random.Random(derive_seed(config.seed, "warmstart"))
        for attempt in range(4 * needed):
            if demonstrations:
                shown = rng.choice(demonstrations)
            else:
                task = rng.choice(tasks)
                turns = world.expert_episode(task, derive_seed(config.seed, "expert", attempt))
                if not turns:
                    continue
                _check_company(turns, users)
                shown = await play_expert(task, turns, world=world, users=users, rollout=config.rollout)
            for demonstration in (*shown.earlier, shown):
                rows = demonstration_ledgers(demonstration, chat=chat)
                ledgers += [row for row in rows if row.num_trainable and len(row) <= config.rollout.max_episode_tokens]
            if len(ledgers) >= needed:
                return ledgers[:needed]
        raise UserError(
            f"warmstart: only {len(ledgers)} of {needed} expert episodes fit into rollout.max_episode_tokens = "
            f"{config.rollout.max_episode_tokens}, or the world has none; raise the limit, name a file of "
            "demonstrations (warmstart.data), or leave the section out"
        )

    return asyncio.run(play())


def _check_company(turns: Sequence[ExpertTurn], users: Users | None) -> None:
    if users is None or isinstance(users, ScriptUsers) or not any(isinstance(turn, str) for turn in turns[:-1]):
        return
    raise UserError(
        "warmstart: the world's expert goes on after what it says to the user, but world.user is a model or a server, "
        "which can be asked in rollouts only; name a file of demonstrations (warmstart.data), or a user of type script"
    )


def warm_start(
    model: Any, ledgers: Sequence[Ledger], *, config: RunConfig, folder: Path, on_step: Callable[[float], None]
) -> None:
    """Train the adapter of `model` (a PEFT model, in place) with trl's SFTTrainer; `on_step` gets each step's loss.

    The loss is the mean negative log-likelihood of the expert's own tokens, nats: prompts, tool results and template
    glue are context. The model is left in the mode (train or eval) that it came in.
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
    # One process would spread over all the GPUs that it sees, which trl refuses: only a launcher's processes see one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    was_training = model.training
    trainer = ExpertTokensTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(_columns(ledgers)), callbacks=[Report()]
    )
    trainer.train()
    # Activations are recomputed in train mode only, in which a model that does so was loaded.
    model.train(was_training)


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
