"""Templates: `{{ item.* }}` and `{{ sample.* }}` inside a grader's texts.

Covered: paths of names, list places and quoted keys (`sample.output_tools[0].function['name']`); each fault of the text
is named when the grader is built. Not covered, and refused: expressions, filters, other namespaces. What is filled in
is never read as a template again, so a model can't write `{{ item.answer }}` into its answer and be shown it. Jinja2's
parser would not do: it takes `item.ref-answer` for a difference and writes line ends its own way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envs.errors import UserError, nearest
from envs.types import Task
from graders.hosted.view import SAMPLE_KEYS, item_of
from graders.types import GraderErrorKind

_STEP = re.compile(
    r"""\.(?P<name>[^\W\d][\w-]*)|\[(?P<place>-?\d{1,9})\]|\[(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)")\]"""
)
_NAMESPACE = re.compile(r"\s*(?P<namespace>item|sample)(?=[.\[])")
_ALLOWED = "allowed are {{ item.KEY }} and {{ sample.KEY }}, followed by .name, [0] or ['a key']"
_CLOSE = re.compile(r"\s*\}\}")
_MAX_ECHO = 60


class MissingVariable(LookupError):
    """A template names what this item or sample does not have."""

    def __init__(self, path: str, kind: GraderErrorKind) -> None:
        super().__init__(f"{path} is missing")
        self.path = path
        """The variable as the template writes it."""
        self.kind = kind
        """SAMPLE_PARSE where it asks for JSON of an answer that is none; INVALID_VARIABLE otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One `{{ … }}` of a template."""

    text: str
    """As the template writes it."""
    namespace: str
    """`item` or `sample`."""
    steps: tuple[str | int, ...]
    """Keys and list places, from the namespace on; the first is a key."""

    def value(self, root: Mapping[str, Any]) -> Any:
        """Raises `LookupError` where a step leads nowhere."""
        found: Any = root
        for step in self.steps:
            fits = isinstance(found, list | tuple) if isinstance(step, int) else isinstance(found, Mapping)
            if not fits:
                raise LookupError(step)
            found = found[step]
        return found


class Template:
    """A text with variables. Raises `UserError` for one that can't be read; `where` says which key holds it."""

    def __init__(self, text: str, *, where: str) -> None:
        self._where = where
        self._parts: list[str | Variable] = []
        position = 0
        while (start := text.find("{{", position)) >= 0:
            variable, end = _parse(text, start, where)
            self._parts += [text[position:start], variable]
            position = end
        self._parts.append(text[position:])

    @property
    def variables(self) -> tuple[Variable, ...]:
        return tuple(part for part in self._parts if isinstance(part, Variable))

    def render(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
        """The text with its variables filled in: texts as they are, anything else as JSON.

        Raises `MissingVariable`. Lone surrogates, which JSON can smuggle in and no server takes, become `?`.
        """
        roots = {"item": item, "sample": sample}
        filled = "".join(p if isinstance(p, str) else _shown(_look_up(p, roots)) for p in self._parts)
        return filled.encode("utf-8", "replace").decode()

    def check(self, task: Task) -> None:
        """Raise `UserError` for a variable that the task's item does not have."""
        of_item = [variable for variable in self.variables if variable.namespace == "item"]
        # Not without need: the whole conversation is written anew for it.
        item = item_of(task) if of_item else {}
        for variable in of_item:
            try:
                variable.value(item)
            except LookupError:
                keys = ", ".join(sorted(item)) or "none"
                raise UserError(
                    f"{self._where}: task {task.task_id} has no {{{{ {variable.text} }}}}; its item's keys are: {keys}"
                    f"{nearest(variable.steps[0], item) if variable.steps[0] not in item else ''}"
                ) from None


def _look_up(variable: Variable, roots: Mapping[str, Mapping[str, Any]]) -> Any:
    sample = roots["sample"]
    needs_json = variable.namespace == "sample" and variable.steps[0] == "output_json"
    if needs_json and sample.get("output_json") is None:
        raise MissingVariable(variable.text, GraderErrorKind.SAMPLE_PARSE)
    try:
        return variable.value(roots[variable.namespace])
    except LookupError:
        raise MissingVariable(variable.text, GraderErrorKind.INVALID_VARIABLE) from None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _parse(text: str, start: int, where: str) -> tuple[Variable, int]:
    """The variable that opens at `start`, and where the text goes on after it."""

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: {what}; {_ALLOWED}")

    close = text.find("}}", start)
    inside = text[start + 2 : close] if close >= 0 else text[start + 2 :]
    shown = inside.strip()
    shown = repr(shown if len(shown) <= _MAX_ECHO else shown[:_MAX_ECHO] + "…")
    if close < 0 or "{{" in inside:
        raise refuse(f"no }}}} closes the {{{{ before {shown}")
    head = _NAMESPACE.match(text, start + 2)
    if head is None:
        raise refuse(f"can't read the variable {shown}")
    position, steps = head.end(), []
    while step := _STEP.match(text, position):
        name = next(step[group] for group in ("name", "single", "double", "place") if step[group] is not None)
        steps.append(int(name) if step["place"] is not None else name)
        position = step.end()
    path = text[head.start("namespace") : position]
    end = _CLOSE.match(text, position)
    if end is None or not steps or isinstance(steps[0], int):
        raise refuse(f"can't read the variable {shown}")
    if head["namespace"] == "sample" and steps[0] not in SAMPLE_KEYS:
        hint = nearest(steps[0], SAMPLE_KEYS)
        raise UserError(f"{where}: {path} does not exist; a sample has {', '.join(SAMPLE_KEYS)}{hint}")
    return Variable(text=path, namespace=head["namespace"], steps=tuple(steps)), end.end()
