"""What the supervised warm start imitates, before the first rollout: see `Policy.imitate`.

For models that write no valid tool call by themselves, so that no reward would ever vary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from envs.base import ExpertTurn, World
from envs.errors import UserError, WorldError
from envs.limits.loops import Loop
from envs.types import Task
from envs.user_code import looked_at
from envs.users import ScriptUsers, Users
from trainer import processes
from trainer.config import RolloutConfig, RunConfig, WarmstartConfig
from trainer.learning.samples import Sample, sample_of
from trainer.seeds import derive_seed
from trainer.tasks.expert import expert_turns, parts_of, play_expert
from trainer.templates.chat import Chat, TemplateRefused
from trainer.types import Demonstration, Ledger, LiveRollouts

_EXPERT_VERSION = 0


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


def check_demonstrations(demonstrations: Sequence[Demonstration], *, chat: Chat, max_tokens: int) -> None:
    """Raise `UserError` where the template takes none of their kind (one with reasoning, one without), or none fits.

    And for a turn to be learned whose text no policy could have written: see `_check_texts`.
    """
    for demonstration in demonstrations:
        _check_texts(demonstration, chat)
    for thinks in (True, False):
        of_kind = (d for d in demonstrations if any(m.reasoning for m in d.messages) == thinks)
        for demonstration in itertools.islice(of_kind, 1):
            demonstration_ledgers(demonstration, chat=chat)
    ledgers = (row for demonstration in demonstrations for row in demonstration_ledgers(demonstration, chat=chat))
    if demonstrations and not any(row.num_trainable and len(row) <= max_tokens for row in ledgers):
        raise UserError(
            f"warmstart.data: not one of {len(demonstrations)} conversations fits into rollout.max_episode_tokens = "
            f"{max_tokens}; raise the limit, or shorten them"
        )


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
    rollout_id: str | None = None,
    live: LiveRollouts | None = None,
) -> Ledger:
    """The training row of the scripted turns, played in a real environment; of several it is the last."""
    played = await play_expert(task, turns, world=world, users=users, rollout=rollout, rollout_id=rollout_id, live=live)
    return demonstration_ledgers(played, chat=chat)[-1]


def expert_ledgers(
    config: RunConfig,
    tasks: Sequence[Task],
    *,
    world: World,
    chat: Chat,
    loop: Loop,
    run_id: str,
    demonstrations: Sequence[Demonstration] = (),
    users: Users | None = None,
    live: LiveRollouts | None = None,
) -> list[Ledger]:
    """The rows of the whole warm start, in training order: of `demonstrations`, or of the world's expert.

    Each of the run's processes plays its share of the episodes, and all get the same rows, however many they are.
    Raises `UserError` when there are too few that fit into an episode, and for an expert who talks with a model.
    """
    assert config.warmstart is not None
    needed = config.warmstart.num_steps * config.warmstart.episodes_per_step
    longest = config.rollout.max_episode_tokens
    rng = random.Random(derive_seed(config.seed, "warmstart"))
    shown_or_asked: Sequence[Demonstration | Task] = demonstrations or tasks
    drawn = [rng.choice(shown_or_asked) for _ in range(4 * needed)]

    async def rows_of(attempt: int) -> list[Ledger]:
        shown = drawn[attempt]
        if isinstance(shown, Task):
            seed = derive_seed(config.seed, "expert", attempt)
            turns = expert_turns(world, shown, seed, limit_s=config.rollout.episode_timeout_s)
            if not turns:
                return []
            check_company(turns, users)
            name = f"{run_id}-expert-{attempt}"
            shown = await play_expert(
                shown, turns, world=world, users=users, rollout=config.rollout, rollout_id=name, live=live, seed=seed
            )
        rows = [row for part in (*shown.earlier, shown) for row in demonstration_ledgers(part, chat=chat)]
        return [row for row in rows if row.num_trainable and len(row) <= longest]

    async def play(attempts: Sequence[int]) -> list[list[Ledger]]:
        return [await rows_of(attempt) for attempt in attempts]

    ledgers: list[Ledger] = []
    attempts: Sequence[int] = range(len(drawn))
    while attempts and (missing := needed - len(ledgers)) > 0:
        wave, attempts = attempts[:missing], attempts[missing:]
        played = processes.share_out(wave, lambda mine: loop.run(play(mine)))
        ledgers += [row for rows in played for row in rows]
    if len(ledgers) < needed:
        raise UserError(
            f"warmstart: only {len(ledgers)} of {needed} expert episodes fit into rollout.max_episode_tokens = "
            f"{longest}, or the world has none; raise the limit, name a file of demonstrations (warmstart.data), or "
            "leave the section out"
        )
    return ledgers[:needed]


def in_steps(ledgers: Sequence[Ledger], config: WarmstartConfig) -> list[list[Sample]]:
    """The samples of each supervised step: what the expert did is to become likelier, so its advantage is 1."""
    samples = [
        sample_of(ledger, advantage=1.0, rollout_id=f"expert-{i}", task_id="") for i, ledger in enumerate(ledgers)
    ]
    size = config.episodes_per_step
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def check_expert(
    config: RunConfig,
    world: World,
    users: Users | None,
    tasks: Sequence[Task],
    demonstrations: Sequence[Demonstration],
) -> None:
    """Raise `UserError` where there is nothing to imitate, or the expert can't be asked for it before the run."""
    if config.warmstart is None or demonstrations:
        return
    limit_s = config.rollout.episode_timeout_s
    try:
        with looked_at("world: expert_episode()"):
            turns = next(filter(None, (expert_turns(world, task, 0, limit_s=limit_s) for task in tasks)), ())
    except WorldError as e:
        raise UserError(f"world: {e} (rollout.episode_timeout_s)") from e
    if not turns:
        raise UserError(
            "warmstart: there is nothing to imitate: warmstart.data names no conversations, and the world has no "
            "expert (expert_episode) for any training task; name a file of demonstrations, or leave the section out"
        )
    check_company(turns, users)


def check_company(turns: Sequence[ExpertTurn], users: Users | None) -> None:
    """Raise `UserError` for an expert who talks with a user that can't be asked before the run."""
    talks = any(isinstance(parts_of(turn)[1], str) for turn in turns[:-1])
    if users is None or isinstance(users, ScriptUsers) or not talks:
        return
    raise UserError(
        "warmstart: the world's expert goes on after what it says to the user, but world.user is a model or a server, "
        "which can be asked in rollouts only; name a file of demonstrations (warmstart.data), or a user of type script"
    )
