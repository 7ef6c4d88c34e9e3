"""The shapes that an episode can have: a user who answers, no tools, calls as the answer, tools that change, an end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError, WorldError
from envs.registry import build_world
from envs.remote.config import RemoteConfig
from envs.remote.world import RemoteWorld
from envs.tools import Tool, tool
from envs.types import Episode, Message, StopReason, Task, ToolErrorKind
from graders.hosted.reader import episode_from_sample
from graders.hosted.view import hosted_sample
from graders.user.custom import conversation
from tests.support.episodes import (
    CONFIG,
    TASK,
    LengthGrader,
    Played,
    assert_ledgers_hold_what_was_sampled,
    note,
    play,
)
from tests.support.episodes import World as PlainWorld
from tests.support.scripted_engine import BROKEN_CALL, Writer, call
from tests.support.template_play import DIALECTS, TOY_TEMPLATE
from trainer.config import RolloutConfig, RunConfig
from trainer.learning.samples import sample_of as training_row
from trainer.learning.warmstart import demonstration_ledgers
from trainer.rollouts.episode import MALFORMED_ANSWER
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.records import rollout_from_json, rollout_to_json
from trainer.tasks.expert import play_expert
from trainer.tasks.load import load_tasks
from trainer.tasks.offer import tools_offered
from trainer.templates.chat import Chat, TemplateRefused
from trainer.types import RolloutRequest


@dataclass
class Shop:
    """A world whose environments are made by a function; every one that was opened is closed, once."""

    make: Callable[[], Any]
    opened: list[str] = field(default_factory=list)
    closed: list[tuple[str, Episode | None]] = field(default_factory=list)

    def make_env(self) -> Any:
        env, world = self.make(), self

        class Watched(type(env)):  # type: ignore[misc]
            async def open(self, task: Task, rollout_id: str) -> None:
                world.opened.append(rollout_id)
                self.rollout_id = rollout_id

            async def close(self, episode: Episode | None) -> None:
                world.closed.append((self.rollout_id, episode))

        env.__class__ = Watched
        return env

    def tasks(self, split: str) -> Sequence[Task]:
        return [TASK]

    def expert_episode(self, task: Task, seed: int) -> Sequence[Any]:
        return ()


class Env:
    """With the tool `note`, and nothing else."""

    def __init__(self) -> None:
        self.tools: Mapping[str, Tool] = {"note": note}


class Talks(Env):
    """A user who says these words, one after the other."""

    def __init__(self, *words: str | Exception | None) -> None:
        super().__init__()
        self.words = list(words)
        self.heard: list[Message] = []

    async def respond(self, message: Message) -> str | None:
        self.heard.append(message)
        said = self.words.pop(0) if self.words else None
        if isinstance(said, Exception):
            raise said
        return said


def shop(env: Callable[[], Any]) -> Any:
    return Shop(env)


# --- a user who answers


async def test_a_users_reply_goes_on_with_the_episode_and_the_last_turn_is_the_answer(chat):
    env = Talks("In green, please.")
    turns = ["Which colour?", call("note", text="green"), "It is green."]
    played = await play(chat, turns, world=shop(lambda: env))
    episode = played.episode
    assert episode.stop_reason is StopReason.ANSWERED and episode.answer == "It is green."
    assert [m.role for m in episode.messages] == ["user", "assistant", "user", "assistant", "tool", "assistant"]
    assert [t.reply for t in episode.turns] == ["In green, please.", None, None]
    assert [m.content for m in env.heard] == ["Which colour?", "It is green."], "calls are not said to the user"
    # `play` has proved that the user's words are in the prompt and not trainable.
    assert "In green, please.<|im_end|>" in chat.decode(played.engine.requests[1][0])
    assert len(played.rollout.ledgers) == 1


async def test_the_prompt_with_a_users_reply_is_what_serving_renders(chat):
    played = await play(chat, ["Which?", "Done."], world=shop(lambda: Talks("Green.")))
    schemas = [note.schema()]
    assert played.engine.requests[1][0] == chat.open(played.episode.messages[:3], schemas)


async def test_a_user_who_never_ends_is_stopped_by_the_number_of_user_turns(chat):
    env = Talks(*"abcdefgh")
    played = await play(chat, lambda prompt, seed: "Yes?", world=shop(lambda: env), max_user_turns=2, max_turns=8)
    assert played.episode.stop_reason is StopReason.MAX_USER_TURNS and played.episode.answer is None
    assert [t.reply for t in played.episode.turns] == ["a", "b", None]
    assert played.episode.messages[-1] == Message(role="assistant", content="Yes?")
    assert played.rollout.grade is not None


async def test_a_user_who_ends_within_the_number_of_user_turns_has_an_answer(chat):
    played = await play(chat, ["Yes?", "Yes?", "Bye."], world=shop(lambda: Talks("a", "b")), max_user_turns=2)
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.answer == "Bye."


async def test_where_nobody_answers_the_number_of_user_turns_changes_nothing(chat):
    played = await play(chat, ["42"], max_user_turns=0)
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.turns[0].reply is None


async def test_a_malformed_call_is_not_said_to_the_user(chat):
    env = Talks("And now?")
    played = await play(chat, [BROKEN_CALL, "Hello.", "42"], world=shop(lambda: env))
    assert [m.content for m in env.heard] == ["Hello.", "42"]
    assert [t.malformed for t in played.episode.turns] == [True, False, False]
    assert played.episode.messages[2].content == MALFORMED_ANSWER


async def test_a_cut_off_turn_is_not_said_to_the_user(chat):
    env = Talks("And now?")
    played = await play(chat, ["word " * 100], world=shop(lambda: env), max_turn_tokens=20)
    assert played.episode.stop_reason is StopReason.MAX_TURN_TOKENS and env.heard == []


async def test_after_the_call_budget_is_used_up_the_user_may_still_be_answered(chat):
    turns = [call("note", text="0"), call("note", text="1"), "Sorry?", "42"]
    played = await play(chat, turns, world=shop(lambda: Talks("Go on.")), max_tool_calls=1)
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.answer == "42"


async def test_a_fault_of_the_simulated_user_is_the_worlds_and_retried(chat):
    envs = [Talks(WorldError("the user's model is down")), Talks("Fine.")]
    turns = ["Hello.", "Hello.", "42"]
    played = await play(chat, turns, world=shop(lambda: envs.pop(0)))
    assert played.rollout.num_attempts == 2 and played.episode.answer == "42"
    played = await play(chat, ["Hello."] * 3, world=shop(lambda: Talks(WorldError("the user's model is down"))))
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.grade is None
    assert played.episode.error == "the user's model is down"


async def test_a_user_who_does_not_answer_in_the_episodes_time_is_not_the_models_fault(chat):
    class Silent(Env):
        async def respond(self, message: Message) -> str | None:
            await asyncio.Event().wait()
            return None

    played = await play(chat, ["Hello."], world=shop(Silent), episode_timeout_s=0.5, world_retries=0)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.grade is None
    assert played.episode.error == "the user did not answer in the episode's time"


async def test_what_is_no_text_is_not_taken_for_a_reply(chat):
    with pytest.raises(TypeError, match="the simulated user gave int; expected the user's words, or None"):
        await play(chat, ["Hello."], world=shop(lambda: Talks(3)))


async def test_half_a_surrogate_pair_in_a_reply_is_replaced(chat):
    played = await play(chat, ["Hello.", "42"], world=shop(lambda: Talks("odd \ud83d word")))
    assert played.episode.turns[0].reply == "odd ? word" == played.episode.messages[2].content


async def test_graders_see_all_turns_and_read_them_back(chat):
    world = shop(lambda: Talks("In green, please.", "Error: I do not follow."))
    turns = [BROKEN_CALL, "Which colour?", call("note", text="green"), "Noted.", "Green."]
    played = await play(chat, turns, world=world)
    sample = hosted_sample(played.episode)
    assert [m["role"] for m in sample["messages"]] == [
        *("user", "assistant", "user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant")
    ]
    back = episode_from_sample(json.loads(json.dumps(sample)), rollout_id="r0")
    assert [(t.malformed, t.reply) for t in back.turns] == [(t.malformed, t.reply) for t in played.episode.turns]
    assert back.num_tool_calls == played.episode.num_tool_calls == 2
    assert hosted_sample(back) == sample
    prompt, completion = conversation(TASK, played.episode)
    assert len(prompt) == 1 and len(completion) == len(played.episode.messages) - 1
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(played.rollout)))) == played.rollout


# --- no tools


async def test_a_row_without_tools_is_a_single_answer_and_is_rendered_as_serving_renders_it(chat):
    world = RemoteWorld(RemoteConfig())
    engine = Writer(chat, ["42"])
    worker = RolloutWorker(world=world, grader=LengthGrader(), chat=chat, engine=engine, config=CONFIG)
    (rollout,) = await worker.run([RolloutRequest(task=TASK, rollout_id="r", seed=0)], temperature=1.0)
    await world.aclose()
    assert rollout.episode.answer == "42" and len(rollout.episode.turns) == 1
    assert engine.requests[0][0] == chat.open(TASK.messages, ())
    assert_ledgers_hold_what_was_sampled(Played([rollout], PlainWorld({}), engine, LengthGrader()))


# --- calls as the answer


def defined(**more: Any) -> Task:
    schema = {"type": "object", "properties": {"sku": {"type": "string"}}, "required": ["sku"]}
    buy = {"type": "function", "function": {"name": "buy", "description": "Buy.", "parameters": schema}}
    return Task(task_id="t", messages=TASK.messages, tools=("buy",), definitions={"buy": buy}, **more)


async def test_the_first_turn_with_calls_is_the_answer_and_runs_nothing(chat):
    turns = [f"I buy it.\n{call('buy', sku='P-10')}"]
    played = await play(chat, turns, world=PlainWorld({}), task=defined(), answer="tool_calls")
    episode = played.episode
    assert episode.stop_reason is StopReason.CALLED and len(episode.turns) == 1
    assert episode.turns[0].results == () and episode.num_invalid_calls == 0
    assert [m.role for m in episode.messages] == ["user", "assistant"]
    sample = hosted_sample(episode)
    assert [c["function"]["name"] for c in sample["output_tools"]] == ["buy"]
    assert sample["output_text"] == "I buy it." and sample["choices"][0]["finish_reason"] == "tool_calls"
    assert hosted_sample(episode_from_sample(sample, rollout_id="r0")) == sample
    assert "buy" in chat.decode(played.engine.requests[0][0])


def rows_config(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": folder / "rows.jsonl", "eval": folder / "rows.jsonl"}
    return RunConfig.model_validate(
        {"output_dir": folder / "run", "grader": {"type": "exact"}, "data": data} | sections
    )


def test_rows_whose_calls_are_the_answer_need_no_server_and_other_rows_are_told_how(tmp_path):
    row = {"messages": [{"role": "user", "content": "?"}], "answer": "1"}
    rows = [row | {"tools": [defined().definitions["buy"]]}, row, row | {"tools": []}]
    config = rows_config(tmp_path, rows, rollout={"answer": "tool_calls"})
    tasks = load_tasks(config, build_world(config.world), "train")
    offered = [list(tools_offered(task, {}, config.rollout)) for task in tasks]
    assert offered == [["buy"], [], []], "rows with and without tools go side by side"
    config = rows_config(tmp_path, rows)
    with pytest.raises(UserError, match=r"line 1: tools: 'buy' is not offered.* set rollout\.answer to tool_calls"):
        load_tasks(config, build_world(config.world), "train")


async def test_tools_of_the_world_are_not_run_either_where_calls_are_the_answer(chat):
    ran = []

    @tool
    def fire(text: str) -> str:
        """Fire.

        Args:
            text: anything
        """
        ran.append(text)
        return text

    played = await play(chat, [call("fire", text="x")], world=PlainWorld({"fire": fire}), answer="tool_calls")
    assert played.episode.stop_reason is StopReason.CALLED and ran == []


async def test_calls_that_no_tool_could_take_are_counted_where_calls_are_the_answer(chat):
    turns = ["\n".join([call("buy", sku="P-10"), call("buy", article=3), call("sell", sku="P-10")])]
    played = await play(
        chat, turns, world=PlainWorld({}), task=defined(), answer="tool_calls", max_turn_tokens=200, max_tool_calls=1
    )
    episode = played.episode
    assert episode.stop_reason is StopReason.CALLED and episode.num_tool_calls == 3
    assert [r.error for r in episode.turns[0].results] == [ToolErrorKind.BAD_ARGUMENTS, ToolErrorKind.UNKNOWN_TOOL]
    assert episode.num_invalid_calls == 2
    _, completion = conversation(TASK, episode)
    assert [m["role"] for m in completion] == ["assistant", "tool", "tool"]
    assert [c["error"] for c in hosted_sample(episode)["tool_calls"]] == [None, "bad_arguments", "unknown_tool"]


async def test_without_calls_the_text_is_the_answer_and_a_malformed_call_may_be_mended(chat):
    played = await play(chat, ["No."], world=PlainWorld({}), task=defined(), answer="tool_calls")
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.answer == "No."
    turns = [BROKEN_CALL, call("buy", sku="P-10")]
    played = await play(chat, turns, world=PlainWorld({}), task=defined(), answer="tool_calls")
    assert played.episode.stop_reason is StopReason.CALLED and played.episode.num_invalid_calls == 1


# --- tools that change


class Doors(Env):
    """Walking through the door shows another tool and takes the door away."""

    def __init__(self) -> None:
        @tool
        def enter(door: str) -> str:
            """Go through a door.

            Args:
                door: which
            """
            self.tools = {"look": look}
            return "you are inside"

        @tool
        def look(at: str) -> str:
            """Look at something.

            Args:
                at: what
            """
            return f"you see {at}"

        self.tools = {"enter": enter}


async def test_a_tool_that_appears_is_offered_from_the_next_turn_on_and_one_that_goes_is_unknown(chat):
    turns = [call("enter", door="left"), call("enter", door="right"), call("look", at="gold"), "gold"]
    played = await play(chat, turns, world=shop(Doors))
    results = [r for t in played.episode.turns for r in t.results]
    assert [r.error for r in results] == [None, ToolErrorKind.UNKNOWN_TOOL, None]
    prompts = [chat.decode(ids) for ids, _ in played.engine.requests]
    assert ["look(" in p or '"look"' in p.split("<|im_end|>")[0] for p in prompts] == [False, True, True, True]
    # Another prompt is another row; what serving renders for the same messages and tools.
    assert len(played.rollout.ledgers) == 2
    env = Doors()
    await asyncio.to_thread(env.tools["enter"].function, door="left")
    schemas = [t.schema() for t in env.tools.values()]
    assert played.engine.requests[1][0] == chat.open(played.episode.messages[:3], schemas)


async def test_tools_made_anew_for_each_look_fork_nothing(chat):
    class Fresh(Env):
        def __init__(self) -> None:
            pass

        @property
        def tools(self) -> Mapping[str, Tool]:
            return {"note": tool(note.function)}

    played = await play(chat, [call("note", text="a"), "42"], world=shop(Fresh))
    assert len(played.rollout.ledgers) == 1


async def test_a_tool_that_the_row_names_and_that_comes_later_is_offered_when_it_is_there(chat):
    task = Task(task_id="t", messages=TASK.messages, tools=("enter", "look"))
    turns = [call("look", at="gold"), call("enter", door="left"), call("look", at="gold"), "gold"]
    played = await play(chat, turns, world=shop(Doors), task=task)
    assert [r.error for t in played.episode.turns for r in t.results] == [ToolErrorKind.UNKNOWN_TOOL, None, None]


# --- an end and a state


class Game(Env):
    def __init__(self) -> None:
        self.moves: list[str] = []

        @tool
        def move(to: str) -> str:
            """Move.

            Args:
                to: where
            """
            self.moves.append(to)
            return "moved"

        self.tools = {"move": move}

    @property
    def is_over(self) -> bool:
        return len(self.moves) == 2

    async def final_state(self) -> Mapping[str, Any]:
        return {"moves": tuple(self.moves), "won": self.is_over}


async def test_an_environment_that_is_over_ends_the_episode_after_its_tool_results(chat):
    played = await play(chat, lambda prompt, seed: call("move", to="a1"), world=shop(Game))
    assert played.episode.stop_reason is StopReason.ENDED and len(played.episode.turns) == 2
    assert played.episode.messages[-1].role == "tool" and played.episode.answer is None
    assert played.rollout.grade is not None


async def test_the_final_state_reaches_graders_and_the_run_folder(chat):
    played = await play(chat, [call("move", to="a1"), "done"], world=shop(Game))
    (graded,) = played.grader.graded
    assert graded.state == {"moves": ["a1"], "won": False} == hosted_sample(graded)["state"]
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(played.rollout)))) == played.rollout
    assert hosted_sample(episode_from_sample(hosted_sample(graded), rollout_id="r0")) == hosted_sample(graded)


async def test_a_state_that_cannot_be_had_masks_the_rollout(chat):
    class Lost(Game):
        async def final_state(self) -> Mapping[str, Any]:
            raise WorldError("the server forgot")

    played = await play(chat, ["done"] * 3, world=shop(Lost))
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.grade is None
    assert played.episode.error == "the server forgot" and played.rollout.num_attempts == 3


async def test_a_state_that_is_no_json_is_a_bug_with_its_place(chat):
    class Odd(Game):
        async def final_state(self) -> Mapping[str, Any]:
            return {"moves": {1, 2}}

    with pytest.raises(TypeError) as caught:
        await play(chat, ["done"], world=shop(Odd))
    assert caught.value.__notes__ == ["final_state must give a mapping of JSON values"]


# --- templates that give up


async def test_a_template_that_cannot_go_on_ends_the_episode_and_no_other(smollm2, tmp_path):
    said = "(messages[-2].content ~ messages[-2].tool_calls | string)"
    refusal = f"{{%- if messages | length > 1 and 'odd' in {said} -%}}"
    refusal += "{{ raise_exception('what is odd?') }}{%- endif -%}"
    (tmp_path / "chat.jinja").write_text(refusal + TOY_TEMPLATE.replace("CALL_FORMAT", DIALECTS["hermes"]))
    chat = Chat(smollm2, chat_template=str(tmp_path / "chat.jinja"))
    world = PlainWorld({"note": note})
    played = await play(chat, [call("note", text="odd")], world=world)
    assert played.episode.stop_reason is StopReason.TEMPLATE_REFUSED and played.episode.answer is None
    assert played.rollout.grade is not None and hosted_sample(played.episode)["output_text"] == ""
    played = await play(chat, [call("note", text="even"), "42"], world=PlainWorld({"note": note}))
    assert played.episode.stop_reason is StopReason.ANSWERED


async def test_turns_that_the_template_takes_no_longer_are_text_when_the_tools_change_too(smollm2, tmp_path):
    """A template that takes calls of offered tools only, and a tool that goes once it was called."""
    refusal = "{%- for m in messages -%}{%- for c in m.tool_calls or [] -%}{%- set name = c.function.name -%}"
    refusal += "{%- if name not in (tools or []) | map(attribute='function.name') | list -%}"
    refusal += "{{ raise_exception('no tool ' ~ name) }}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    (tmp_path / "chat.jinja").write_text(refusal + TOY_TEMPLATE.replace("CALL_FORMAT", DIALECTS["hermes"]))
    chat = Chat(smollm2, chat_template=str(tmp_path / "chat.jinja"))
    played = await play(chat, [call("enter", door="left"), call("look", at="gold"), "gold"], world=shop(Doors))
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.answer == "gold"
    second, third = (chat.decode(ids) for ids, _ in played.engine.requests[1:])
    for prompt in (second, third):
        assert '{"name": "enter", "arguments": {"door": "left"}}' in prompt and "you are inside" in prompt
    assert third.startswith(second)
    with pytest.raises(TemplateRefused, match="no tool enter"):
        chat.open(played.episode.messages[:3], [note.schema()])


# --- the order of calls


async def test_an_environment_may_have_the_calls_of_a_turn_one_after_the_other(chat):
    class Ordered(Env):
        calls_in_order = True

        def __init__(self) -> None:
            self.said: list[str] = []

            @tool
            async def say(word: str, wait: int) -> str:
                """Say.

                Args:
                    word: what
                    wait: how many times the others may go first
                """
                for _ in range(wait):
                    await asyncio.sleep(0)
                self.said.append(word)
                return " ".join(self.said)

            self.tools = {"say": say}

    turns = ["\n".join(call("say", word=w, wait=n) for w, n in (("a", 20), ("b", 0))), "42"]
    played = await play(chat, turns, world=shop(Ordered), max_turn_tokens=200)
    assert [r.output for r in played.episode.turns[0].results] == ["a", "a b"]


# --- an expert's episodes


async def test_an_expert_talks_with_the_user_and_ends_where_the_user_does(chat):
    world = Scripted(lambda: Talks("Green.", None))
    turns = ["Which?", (("note", {"text": "green"}),), "Noted.", "never said"]
    shown = await play_expert(TASK, turns, world=world)
    assert [(m.role, m.content) for m in shown.messages[1:]] == [
        ("assistant", "Which?"),
        ("user", "Green."),
        ("assistant", ""),
        ("tool", "noted green"),
        ("assistant", "Noted."),
    ]
    ledger = demonstration_ledgers(shown, chat=chat)[-1]
    assert ledger.prompt_ids[: len(chat.open(shown.messages[:3], shown.tools))] == chat.open(
        shown.messages[:3], shown.tools
    )
    last = await play_expert(TASK, ["Bye."], world=Scripted(lambda: Talks("And?")))
    assert last.messages[-1].content == "Bye.", "what the user would say to the last turn is not asked"


async def test_an_expert_whose_tools_change_gives_a_row_for_each_set_and_each_turn_is_trained_once(chat):
    turns = [(("enter", {"door": "left"}),), (("look", {"at": "gold"}),), "gold"]
    shown = await play_expert(TASK, turns, world=Scripted(Doors))
    (earlier,) = shown.earlier
    assert [t["function"]["name"] for t in (*earlier.tools, *shown.tools)] == ["enter", "look"]
    assert shown.messages[: len(earlier.messages)] == earlier.messages
    trained = [
        sum(training_row(demonstration_ledgers(d, chat=chat)[-1], advantage=0, rollout_id="", task_id="").trainable)
        for d in (earlier, shown)
    ]
    alone = [
        len(chat.encode_assistant(shown.messages[:i], shown.messages[i], d.tools))
        for d, i in ((earlier, 1), (shown, 3), (shown, 5))
    ]
    assert trained == [alone[0], alone[1] + alone[2]]


async def test_an_expert_ends_where_the_environment_is_over_or_calls_are_the_answer(chat):
    turns = [(("move", {"to": "a1"}),), (("move", {"to": "a2"}),), "never said"]
    shown = await play_expert(TASK, turns, world=Scripted(Game))
    assert [m.role for m in shown.messages] == ["user", "assistant", "tool", "assistant", "tool"]
    called = await play_expert(
        defined(),
        [(("buy", {"sku": "P-10"}),), "never said"],
        world=Scripted(Env),
        rollout=RolloutConfig(answer="tool_calls"),
    )
    assert [m.role for m in called.messages] == ["user", "assistant"]
    assert [t["function"]["name"] for t in called.tools] == ["buy"]


async def test_an_expert_has_the_limits_and_the_tries_of_a_rollout():
    @tool
    async def read(lines: int) -> str:
        """Read.

        Args:
            lines: how many; of none it never ends
        """
        await asyncio.sleep(0 if lines else 3600)
        return "x" * lines

    async def opens(rollout_id: str) -> None:
        await asyncio.sleep(3600 if rollout_id == "e" else 0)

    config = RolloutConfig(episode_timeout_s=0.2, tool_timeout_s=0.02, max_tool_output_chars=50, world_retries=1)
    world = PlainWorld({"read": read}, on_open=opens)
    turns = [(("read", {"lines": 53}), ("read", {"lines": 0})), "read"]
    shown = await play_expert(TASK, turns, world=world, rollout=config, rollout_id="e")
    assert [m.content for m in shown.messages if m.role == "tool"] == [
        "x" * 50 + "\n[cut: 3 more characters]",
        "Error: read did not answer within 0.02 s",
    ]
    assert world.opened == ["e", "e-retry1"] and world.closed == [("e", None), ("e-retry1", None)]
    with pytest.raises(WorldError, match=r"expert's episode of task 't': its environment was not done within 0.2 s"):
        await play_expert(
            TASK, turns, world=world, rollout=config.model_copy(update={"world_retries": 0}), rollout_id="e"
        )


class Scripted:
    """A world of environments that need no opening."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def make_env(self) -> Any:
        env = self._make()

        async def nothing(*of: object) -> None: ...

        env.open, env.close = nothing, nothing
        return env

    def tasks(self, split: str) -> Sequence[Task]:
        return []

    def expert_episode(self, task: Task, seed: int) -> Sequence[Any]:
        return ()
