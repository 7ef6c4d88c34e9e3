"""Is this run worth its time? Plain rules over the preflight's figures, each with its numbers in sight. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from envs.types import StopReason
from trainer.config import EngineConfig, RunConfig
from trainer.config.advantages import WITHOUT_TIES, advantage_settings
from trainer.measures.masked import WHY_MASKED, Masked
from trainer.models.machines import GIB
from trainer.models.memory import MemoryRow, gpu_bytes, memory_bytes
from trainer.preflight.figures import Figures
from trainer.tasks.difficulty import pooled

FEW_VARIED, ENOUGH_VARIED = 0.10, 0.15
"""Share of tasks with reward variance; about 15 % was what the published demo had, and it gained 0.04 in ten steps."""
SMALL_HEADROOM = 0.05
"""best-of-k minus mean; the published demo had 0.73 - 0.59 = 0.14."""
MANY_CUT = 0.10
"""Share of rollouts that a limit ended."""
MANY_MALFORMED = 0.30
"""Share of rollouts with a malformed call."""
MANY_TOOL_ERRORS = 0.30
"""Errors per tool call."""
MANY_GRADER_ERRORS = 0.05
MANY_MASKED = 0.05
MANY_DRIFTED = 0.02
MANY_BY_PENALTIES = 0.50
"""Of the tasks that vary, those in which only penalties do."""


class Level(StrEnum):
    """How much a piece of advice weighs."""

    STOP = "stop"
    """Training would teach nothing, or the wrong thing."""
    WARN = "warn"
    """Look at it first."""
    GOOD = "good"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    level: Level
    finding: str
    what_to_do: str = ""


def advise(figures: Figures, config: RunConfig, *, offers_tools: bool) -> list[Advice]:
    """The most pressing first."""
    found = [
        *_calls(figures, offers_tools),
        *_variance(figures, config),
        *_limits(figures),
        *_faults(figures),
        *_penalties(figures),
    ]
    order = list(Level)
    return sorted(found, key=lambda advice: order.index(advice.level))


def verdict(advice: list[Advice]) -> str:
    """One sentence over it all."""
    levels = {a.level for a in advice}
    if Level.STOP in levels:
        return "Not yet: as it stands, training would teach little or nothing."
    return "Worth training, once the warnings are looked at." if Level.WARN in levels else "Worth training."


def _calls(figures: Figures, offers_tools: bool) -> Iterator[Advice]:
    if offers_tools and figures.parsed_calls_share == 0:
        tried = f"{figures.malformed_share:.0%} of the rollouts tried and failed" if figures.malformed_share else "none"
        yield Advice(
            level=Level.STOP,
            finding=f"No rollout made a tool call that parsed ({tried}).",
            what_to_do="Look at a rollout in rollouts.jsonl. Calls in another format: set model.tool_parser or "
            "model.chat_template. No attempt at all: the template hides the tools, or the model does not know tools; "
            "add a warmstart section.",
        )
    elif figures.malformed_share > MANY_MALFORMED:
        yield Advice(
            level=Level.WARN,
            finding=f"{figures.malformed_share:.0%} of the rollouts hold a malformed call.",
            what_to_do="If the calls look right in rollouts.jsonl, model.tool_parser is the wrong one; else a "
            "warmstart section teaches the format faster than rewards do.",
        )
    if figures.tool_error_share > MANY_TOOL_ERRORS:
        worst = next(iter(figures.tool_errors), "")
        yield Advice(
            level=Level.WARN,
            finding=f"{figures.tool_error_share:.0%} of the tool calls failed, most often {worst}.",
            what_to_do="Say in the tools' descriptions what they expect. A penalty on invalid calls or a warm start "
            "helps.",
        )
    if figures.drifted_share > MANY_DRIFTED:
        yield Advice(
            level=Level.WARN,
            finding=f"In {figures.drifted_share:.0%} of the rollouts a turn's text differs from what serving would "
            "render for it.",
            what_to_do="Serve with the exported chat template, and check model.tool_parser and model.reasoning_parser.",
        )


def _variance(figures: Figures, config: RunConfig) -> Iterator[Advice]:
    if advantage_settings(config.loss.advantage).type in WITHOUT_TIES and not pooled([*figures.tasks.values()]).tied:
        # Rewards are compared with those of other tasks, and these vary.
        yield from _headroom(figures)
        return
    if figures.varied_share == 0:
        highest = max(stats.best for stats in figures.tasks.values())
        if figures.never_passed == 1 or (figures.never_passed is None and highest <= 0):
            finding = "Every task is tied at failure: no rollout passed."
            do = (
                "The tasks are too hard for this model, or the grader never gives credit. Grade a known good answer "
                "first; then a warm start, easier tasks, partial credit or a larger model."
            )
        elif figures.always_passed == 1:
            finding = "Every task is tied at success: every rollout passed."
            do = "There is nothing left to learn here but brevity: harder tasks, or penalties on calls and tokens."
        else:
            finding = "No task's rewards vary: every rollout of a task got the same."
            do = "Harder or easier tasks, a grader with finer credit, a higher temperature, or more rollouts a task."
        yield Advice(level=Level.STOP, finding=finding, what_to_do=do)
        return
    share = f"{figures.varied_share:.0%} of the tasks have rewards that vary over {figures.samples_per_task} rollouts"
    if figures.varied_share < ENOUGH_VARIED:
        low = figures.varied_share < FEW_VARIED
        yield Advice(
            level=Level.STOP if low else Level.WARN,
            finding=f"Only {share}; the published demo had about 15 %.",
            what_to_do=f"Of the {config.rollout.tasks_per_step} groups of a step the others teach nothing. Take "
            "tasks by measured difficulty (curriculum.preflight: this preflight's JSON), replace tied groups by fresh "
            "ones (rollout.tied_groups: replace), raise rollout.group_size, or give partial credit.",
        )
    else:
        yield Advice(level=Level.GOOD, finding=f"{share}; the published demo had about 15 %.")
    yield from _headroom(figures)


def _headroom(figures: Figures) -> Iterator[Advice]:
    if figures.samples_per_task == 1:
        return
    headroom = figures.best - figures.mean
    said = f"best of {figures.samples_per_task} is {figures.best:.3f}, the mean {figures.mean:.3f}"
    if headroom < SMALL_HEADROOM:
        yield Advice(
            level=Level.WARN,
            finding=f"Little headroom: {said}.",
            what_to_do="Training moves the mean towards what the model can reach already. Harder tasks, or penalties "
            "on what a rollout costs, give it something to gain.",
        )
    else:
        yield Advice(level=Level.GOOD, finding=f"Headroom {headroom:.3f}: {said} (the published demo: 0.73 and 0.59).")


_LIMITS = {
    StopReason.MAX_EPISODE_TOKENS: "the context limit; raise rollout.max_episode_tokens, or let tools return less "
    "(rollout.max_tool_output_chars)",
    StopReason.MAX_TURN_TOKENS: "the length of a turn; raise rollout.max_turn_tokens",
    StopReason.MAX_TURNS: "the number of turns; raise rollout.max_turns, or tell the model its limit",
    StopReason.MAX_USER_TURNS: "how often the user may speak; raise rollout.max_user_turns, or let the user come to an "
    "end",
    StopReason.MAX_TOOL_CALLS: "the call budget; raise rollout.max_tool_calls, or tell the model its budget",
    StopReason.WALL_CLOCK: "the wall clock; raise rollout.episode_timeout_s, or look for a slow tool",
    StopReason.TEMPLATE_REFUSED: "a chat template that can't render what the model wrote; choose another template "
    "(model.chat_template), or train on: the model learns not to write it",
}


def _limits(figures: Figures) -> Iterator[Advice]:
    for reason, words in _LIMITS.items():
        share = figures.stop_shares.get(str(reason), 0.0)
        if share > MANY_CUT:
            limit, _, do = words.partition("; ")
            yield Advice(
                level=Level.WARN,
                finding=f"{share:.0%} of the rollouts were ended by {limit}, without an answer.",
                what_to_do=do[0].upper() + do[1:] + ". Cut rollouts are graded as they stand, so the limit is part of "
                "the task.",
            )


_MEND_MASKED = {
    Masked.WORLD: "Mend the server.",
    Masked.GRADER: "Mend the judge, endpoint or sandbox.",
    Masked.NO_REWARD: "Let one function give a number, or leave such tasks out.",
    Masked.DEADLINE: "Raise overlap.deadline_s, or look for a slow tool.",
}


def _faults(figures: Figures) -> Iterator[Advice]:
    share = figures.num_masked / figures.num_rollouts
    for kind, causes in figures.masked_causes.items():
        cause, num_masked = max(causes, key=lambda c: causes[c]), sum(causes.values())
        yield Advice(
            level=Level.STOP if share > MANY_MASKED else Level.WARN,
            finding=f"{num_masked} of {figures.num_rollouts} rollouts {WHY_MASKED[kind]}: {cause}",
            what_to_do="Such rollouts are not trained on, and what is lost is seldom a fair sample. "
            f"{_MEND_MASKED[kind]}",
        )
    errors = sum(figures.grader_errors.values())
    if errors > MANY_GRADER_ERRORS:
        worst = next(iter(figures.grader_errors))
        yield Advice(
            level=Level.STOP,
            finding=f"The grader had {errors:.2f} errors a rollout, most often {worst}; such rollouts are scored 0.",
            what_to_do="Mend the grader first: training would learn to please its faults.",
        )


def _penalties(figures: Figures) -> Iterator[Advice]:
    if figures.varied_share and figures.varied_by_penalties_only > MANY_BY_PENALTIES:
        yield Advice(
            level=Level.WARN,
            finding=f"In {figures.varied_by_penalties_only:.0%} of the tasks that vary only penalties do: the grader "
            "gives all rollouts the same.",
            what_to_do="Training would learn to be brief before it learns to be right. Start with lower penalties.",
        )
    if figures.penalty < 0 and -figures.penalty > figures.score / 2:
        yield Advice(
            level=Level.WARN,
            finding=f"Penalties take {-figures.penalty:.3f} of a mean score of {figures.score:.3f}.",
            what_to_do="Penalties of that size may outweigh the score. Lower their slopes, or raise what is free.",
        )


def advise_memory(rows: Sequence[MemoryRow], config: RunConfig, *, total_bytes: float, on_cpu: bool) -> list[Advice]:
    """Whether it fits: on a CPU into all there is; on a GPU the engine into its share, the trainer beside it.

    Of an engine of the user's own nothing is known: the trainer alone is looked at, beside which it has to fit.
    """
    engine = config.engine
    if not isinstance(engine, EngineConfig):
        remedy = "model.gradient_checkpointing or a smaller optim.max_microbatch_tokens"
        return _fit("The trainer beside an engine of your own", memory_bytes(rows), total_bytes, remedy)
    if on_cpu:
        return _fit("Run and engine", memory_bytes(rows), total_bytes, "less of optim.max_microbatch_tokens")
    sleep = engine.sleep
    weights = sum(row.num_bytes for row in rows if row.where == "engine" and row.name != "KV cache")
    taken = gpu_bytes(engine, weights, total_bytes)
    left_by_engine = {"none": total_bytes - taken, "kv": total_bytes - weights, "weights": total_bytes}[sleep]
    advice = _fit(
        "The trainer",
        memory_bytes(rows, "trainer"),
        left_by_engine,
        "model.gradient_checkpointing, engine.sleep, a smaller optim.max_microbatch_tokens or "
        "engine.gpu_memory_utilization",
    )
    if sleep != "none":
        held = sum(row.num_bytes for row in rows if row.where == "trainer" and not row.name.startswith("activations"))
        remedy = "a smaller engine.gpu_memory_utilization"
        advice += _fit("The trainer while the engine is at work", held, total_bytes - taken, remedy)
    cache = memory_bytes(rows, "engine") - weights
    room = taken - weights
    if room <= 0:
        return advice + _fit("The engine's weights", weights, taken, "a GPU with more memory")
    sequences = min(engine.max_num_seqs, config.rollout.num_rollouts)
    if room * sequences < cache:
        return advice + _fit(
            "The KV cache of one episode at full length",
            cache / sequences,
            room,
            "a larger engine.gpu_memory_utilization or engine.kv_cache_gib, or a smaller rollout.max_episode_tokens",
        )
    if room < cache:
        advice.append(
            Advice(
                level=Level.GOOD,
                finding=f"The KV cache has room for {room / cache * sequences:.0f} of {sequences} sequences at full "
                "length at once; the others wait. Most episodes are shorter.",
            )
        )
    return advice


def _fit(what: str, needed: float, room: float, remedy: str) -> list[Advice]:
    finding = f"{what}: about {needed / GIB:.1f} GiB needed by the formulas, {room / GIB:.1f} GiB there."
    if needed > room:
        return [Advice(level=Level.STOP, finding=finding, what_to_do=f"It would run out of memory. Try {remedy}.")]
    if needed > 0.85 * room:
        return [Advice(level=Level.WARN, finding=finding, what_to_do=f"It is tight. Try {remedy}.")]
    return [Advice(level=Level.GOOD, finding=finding)]
