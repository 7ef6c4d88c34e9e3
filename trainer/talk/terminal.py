"""The person's side: questions and commands read, turns and calls shown."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from rich.text import Text

from envs.errors import UserError
from envs.terminal import Terminated, clean, console
from envs.types import Message, StopReason, Task
from trainer.reports.watch.screen import call_text, one_line
from trainer.talk.agent import Agent
from trainer.talk.conversation import Conversation, Over, Said, YourTurn
from trainer.types import Rollout

_HELP = """a question      to the agent, where the run's tasks play; it remembers until /reset
/tasks [N]      the run's tasks, held-out ones first, from number N on
/task N         give it that task
/reset          end this conversation; the next words begin another
/quit           (or the end of the input) end
Ctrl-C          ends the agent's turn, twice the program"""
_NUM_LISTED = 20
_MOST_LINES = 12
"""Of a tool's result; the model reads all of it."""
_ENDS = {
    StopReason.ANSWERED: "",
    StopReason.CALLED: "these calls are its answer (rollout.answer: tool_calls)",
    StopReason.ENDED: "the environment has ended it",
    StopReason.MAX_TURN_TOKENS: "the turn was cut off at rollout.max_turn_tokens",
    StopReason.MAX_EPISODE_TOKENS: "its tokens are used up (rollout.max_episode_tokens)",
    StopReason.WALL_CLOCK: "its time is used up (rollout.episode_timeout_s)",
    StopReason.TEMPLATE_REFUSED: "the chat template can't render what the agent wrote",
}


class Talk:
    """Until the person ends it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._tasks = agent.tasks
        self._place = self._tasks[0]
        """Where the person's own questions are asked."""
        self._conversation: Conversation | None = None
        self._is_waiting = False
        self._num_begun = 0
        self._console = console()
        self._reads_keys = sys.stdin.isatty()

    def run(self) -> None:
        """Raises `KeyboardInterrupt` at the second Ctrl-C."""
        self._greet()
        try:
            if self._agent.first is not None:
                self._begin_task(self._agent.first)
            while (line := self._read()) is not None and self._heed(line.strip()):
                pass
            self._reset()
        finally:
            if self._conversation is not None:
                self._conversation.end()

    # ---- what the person says

    def _read(self) -> str | None:
        """A line; None at the end of the input, and at the second Ctrl-C in a row."""
        for attempt in range(2):
            try:
                if self._reads_keys:
                    return input("\nyou> ")
                line = sys.stdin.readline()
                return line if line else None
            except EOFError:
                return None
            except KeyboardInterrupt as e:
                if attempt or isinstance(e, Terminated):
                    raise
                self._show("\nCtrl-C once more, or /quit, ends", "dim")
        raise AssertionError("the second has been raised")

    def _heed(self, line: str) -> bool:
        """False at the end."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                self._show(_HELP, "dim")
            case "/reset":
                self._reset()
            case "/tasks":
                self._list(rest.strip())
            case "/task":
                try:
                    self._begin_task(self._agent.numbered(rest.strip()))
                except UserError as e:
                    self._show(str(e), "red")
            case _ if command.startswith("/") and command[1:].isalpha():
                self._show(f"{command}: no such command; /help names them", "red")
            case _:
                self._say(line)
        return True

    def _say(self, text: str) -> None:
        self._listen(
            lambda: self._answer(text) if self._conversation else self._begin(self._agent.asked(text, self._place))
        )

    def _answer(self, text: str | None) -> None:
        assert self._conversation is not None
        self._conversation.say(text)
        self._is_waiting = False

    def _begin_task(self, task: Task) -> None:
        self._reset()
        self._place = task
        for message in task.messages:
            self._tell(message)
        self._listen(lambda: self._begin(task))

    def _begin(self, task: Task) -> None:
        self._num_begun += 1
        self._conversation = Conversation(self._agent, task, number=self._num_begun)

    def _reset(self) -> None:
        if self._conversation is not None and self._is_waiting:
            self._listen(lambda: self._answer(None))

    # ---- what comes back

    def _listen(self, begin: Callable[[], None]) -> None:
        """From what begins the turn until it is the person's again, or the conversation is over."""
        was_asked, has_begun = False, False
        while not has_begun or (self._conversation is not None and not self._is_waiting):
            try:
                if not has_begun:
                    has_begun = True
                    with _heard_afterwards():
                        begin()
                    continue
                assert self._conversation is not None
                event = self._conversation.next()
            except KeyboardInterrupt as e:
                if was_asked or isinstance(e, Terminated):
                    raise
                was_asked = True
                self._show("  (ending the turn; Ctrl-C once more ends the program)", "dim")
                if self._conversation is not None:
                    self._conversation.interrupt()
                continue
            match event:
                case Said(message):
                    self._tell(message)
                case YourTurn(num_tokens, was_interrupted):
                    self._is_waiting = True
                    so_far = f"{num_tokens:,} token{'' if num_tokens == 1 else 's'} so far"
                    self._show(f"  ({'interrupted' if was_interrupted else so_far})", "dim")
                case Over(rollout):
                    self._conversation = None
                    self._close(rollout)

    def _close(self, rollout: Rollout) -> None:
        episode = rollout.episode
        if episode.stop_reason is StopReason.WORLD_FAULT:
            self._show(f"the world failed, and the conversation is over: {episode.error}", "red")
        elif why := _ENDS.get(episode.stop_reason, str(episode.stop_reason)):
            self._show(f"the conversation is over: {why}", "yellow")
        if rollout.grade is not None:
            parts = ", ".join(f"{name} {value:+.3f}" for name, value in rollout.grade.parts.items())
            self._show(f"reward {rollout.grade.reward:.3f} ({parts}) {rollout.grade.explanation}", "bold")
        elif self._agent.grades and episode.error and episode.stop_reason is not StopReason.WORLD_FAULT:
            self._show(f"no grade: {episode.error}", "red")
        for why in rollout.unclosed:
            self._show(f"the environment did not close: {why}", "yellow")

    # ---- the screen

    def _greet(self) -> None:
        tools = ", ".join(self._agent.tools_of(self._place)) or "none"
        self._show(f"{self._agent.policy}\ntools: {tools}\n/help names the commands", "dim")

    def _list(self, start: str) -> None:
        first = int(start) if start.isdecimal() else 1
        held_out = len(self._agent.prepared.eval_tasks)
        for number, task in list(enumerate(self._tasks, start=1))[max(0, first - 1) :][:_NUM_LISTED]:
            mark = "held out" if number <= held_out else "training"
            question = one_line(task.messages[-1].content if task.messages else "")
            line = Text(f"{number:>4}  {mark}  {question}", no_wrap=True, overflow="ellipsis")
            self._console.print(line, highlight=False)
        if first + _NUM_LISTED <= len(self._tasks):
            self._show(f"      {len(self._tasks)} in all; /tasks {first + _NUM_LISTED} goes on", "dim")

    def _tell(self, message: Message) -> None:
        if message.reasoning:
            self._show(message.reasoning.strip(), "dim italic")
        if message.role == "tool":
            lines = message.content.strip().splitlines() or ["(nothing)"]
            more = [f"… {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
            for line in [*lines[:_MOST_LINES], *more]:
                self._show(f"    {line}", "dim")
            return
        if text := message.content.strip():
            marks = {"assistant": ("agent> ", "green"), "user": ("told> ", "cyan"), "system": ("system> ", "dim")}
            mark, style = marks[message.role]
            self._show(f"{mark}{text}", style)
        for call in message.tool_calls:
            self._show(f"  → {call_text(call.name, call.arguments)}", "magenta")

    def _show(self, text: str, style: str = "") -> None:
        self._console.print(Text(clean(text), style=style), highlight=False, soft_wrap=not self._console.is_terminal)


def talk(agent: Agent) -> None:
    """Raises `KeyboardInterrupt` where the person breaks it off."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its line editing)
    Talk(agent).run()


@contextlib.contextmanager
def _heard_afterwards() -> Iterator[None]:
    """A Ctrl-C meanwhile is raised at the end: a turn that is half begun could be neither ended nor gone on with."""
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt
