"""Every error the project raises on purpose.

AgentRFTError
├── UserError(ValueError)     a config, data set or grader is wrong: one screen, exit code 2, nothing loaded
│   └── FoundLate             only the run at work has shown it: one screen, exit code 1
├── WorldError                a tool server, judge or engine failed: the rollout is masked, never scored 0
│   └── Unscored              the user's reward functions passed the rollout over: masked too, but not tried again
├── ToolError                 a tool refuses its arguments: shown to the model, the episode goes on
├── PublishError              the engine does not run the policy that is being trained: the run stops
└── EngineHungError           the engine answers nothing any more: the run stops

Faults of our own code are plain Python errors and stop the run.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import AsyncIterator, Iterable, Iterator

from envs.terminal import clean

_MAX_CHARS = 10_000


class AgentRFTError(Exception):
    """Base of the tree. What it says is written down and shown: secrets and control characters are left out of it.

    So is what makes it longer than anyone reads, a server's megabytes say.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= _MAX_CHARS:
            return clean(text)
        # Between words: half a secret would not be known as one.
        shown = text[: text.rfind(" ", 0, _MAX_CHARS) + 1]
        return f"{clean(shown)}[cut: {len(text) - len(shown):,} more characters]"


class UserError(AgentRFTError, ValueError):
    """Something the user wrote is wrong. The message names the file, line or key, and what was expected."""

    exit_code = 2
    """Of a script that ends with it."""


class FoundLate(UserError):
    """What the user wrote is wrong, and nothing but the run at work could show it: a model has been loaded by then.

    One process alone may have met with it, so each that has tells it.
    """

    exit_code = 1


class WorldError(AgentRFTError):
    """The world around the model failed, not the model. The rollout is masked out of the loss and counted."""


class Unscored(WorldError):
    """Every reward function gave None: there is nothing to learn from this rollout, and another try gives no more."""


class ToolError(AgentRFTError):
    """Raised by a tool to tell the model what it did wrong. The text is the tool's output; the episode goes on."""

    def __str__(self) -> str:
        # What the model reads in training is what it reads when it is served.
        return Exception.__str__(self)


class PublishError(AgentRFTError):
    """The engine's answers do not come from the published policy version."""


class EngineHungError(AgentRFTError):
    """The engine lives but answers nothing any more."""


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Put in front of a `UserError` of what it is told: a row's file and line, a key; nothing where that is empty."""
    try:
        yield
    except UserError as e:
        if not where:
            raise
        raise UserError(f"{where}: {e}") from e


@contextlib.contextmanager
def found_late() -> Iterator[None]:
    """What is a `UserError` within is `FoundLate`."""
    try:
        yield
    except FoundLate:
        raise
    except UserError as e:
        raise FoundLate(str(e)) from e


def nearest(word: object, known: Iterable[object]) -> str:
    """The question after a word that is none of those known, where one of them is like it; else empty."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextlib.asynccontextmanager
async def first_error() -> AsyncIterator[None]:
    """Raise one of the errors that end a task group: ours before the world's, the first of its kind."""
    try:
        yield
    except ExceptionGroup as e:
        ours = [x for x in e.exceptions if not isinstance(x, WorldError)]
        raise (ours or e.exceptions)[0] from None
