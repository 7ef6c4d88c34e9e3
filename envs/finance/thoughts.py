"""What the scripted expert says to itself before it acts: what leads to the turn, and what a talkative model adds."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from envs.base import Act
from envs.types import Task

_MOST_DETOURS = 6
_NEEDLESS = (
    "Let me think about this step by step.",
    "The question asks for one figure, and I have to be careful with it.",
    "There may be a company with nearly the same name, so I look at the name twice.",
    "I should not mix up the years.",
    "The unit may be thousands or millions, so I keep it in mind.",
    "Wait, let me check that once more before I go on.",
    "First I find the report, then I read the line, then I answer.",
    "I could also list the folder, but that may not be needed.",
    "The report of that year counts, not the one after it.",
    "Some figures are restated later, which does not matter here.",
    "I do not know the answer yet, so I must not guess.",
    "It may help to say again what is asked, which is this question.",
)
"""True of every task and of no use to any."""


def thought_before(task: Task, act: Act, rng: random.Random, *, detour_thoughts: float) -> str:
    """What leads to the act (a search planned, a change worked out), after a number of needless sentences.

    Their number is binomial with mean `detour_thoughts` out of at most six.
    """
    num = sum(rng.random() < detour_thoughts / _MOST_DETOURS for _ in range(_MOST_DETOURS))
    return " ".join([*rng.sample(_NEEDLESS, num), _needed(task.item, act)])


def _needed(item: Mapping[str, Any], act: Act) -> str:
    if isinstance(act, str):
        return f"I have what I need: {act}."
    [(name, arguments)] = act
    about = ", ".join(value if isinstance(value, str) else json.dumps(value) for value in arguments.values())
    match name:
        case "search":
            return f"I need the right report first. I search for {about}."
        case "cat":
            return f"I read {about} and look for {_looked_for(item)}."
        case "list":
            return f"I am not sure which reports there are. I list {about}."
        case _:
            facts = " and ".join(item.get("facts", ()))
            return f"The figures are {facts}. I work out {about}." if facts else f"I work out {about}."


def _looked_for(item: Mapping[str, Any]) -> str:
    return str(item.get("metric") or "the line")
