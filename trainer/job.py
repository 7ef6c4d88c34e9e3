"""What a config asks for, checked before any model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.base import World
from envs.errors import UserError
from envs.finance.world import FinanceWorld
from envs.types import Task
from graders.build import build_grader, check_tasks
from graders.types import Grader
from trainer.chat import Chat
from trainer.config import RunConfig
from trainer.model_cache import resolve_model
from trainer.runs import RunFolder
from trainer.tasks import load_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the config asks for, checked; no model is loaded yet."""

    config: RunConfig
    world: World
    grader: Grader
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    model_path: Path
    chat: Chat


def prepare(config: RunConfig) -> Job:
    """Everything that a user can get wrong is found here. Raises `UserError`; writes nothing but the model cache.

    What takes long to load (vLLM's parsers, the tokenizer) comes last, so that most mistakes are told at once.
    """
    RunFolder.check(config)
    _check_trackers(config)
    world = FinanceWorld(config.world)
    train_tasks, eval_tasks = load_tasks(config, world, "train"), load_tasks(config, world, "eval")
    check_tasks(config.grader, [*train_tasks, *eval_tasks])
    grader = build_grader(config.grader, config.penalties)
    model_path = resolve_model(config.model.name)
    chat = Chat(
        model_path,
        tool_parser=config.model.tool_parser,
        reasoning_parser=config.model.reasoning_parser,
        chat_template=config.model.chat_template,
        template_kwargs=config.model.chat_template_kwargs,
    )
    return Job(
        config=config,
        world=world,
        grader=grader,
        train_tasks=train_tasks,
        eval_tasks=eval_tasks,
        model_path=model_path,
        chat=chat,
    )


def _check_trackers(config: RunConfig) -> None:
    # accelerate leaves out a tracker whose package is missing without a word.
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: the package {name} is not installed; install it, or leave {name} out")
