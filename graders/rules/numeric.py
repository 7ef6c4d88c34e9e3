"""The numeric grader: the rule of the public agent RFT demo, without a judge model.

1 for the gold number in any unit or format; partial credit (0.5) for a number off by at most 0.1 % or by rounding;
0 for anything else.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import Field

from envs.errors import UserError
from envs.types import Episode, Task
from graders.answers import final_answer, gold_text
from graders.rules.numbers import Number, find_numbers
from graders.rules.plain_text import marked
from graders.settings import GraderSettings
from graders.types import Grade

MAX_NUMBERS = 3
"""Different numbers that an answer may name (`from 398.1 to 412.5: 14.4`); more is fishing, and scores 0."""
RELATIVE_TOLERANCE = Decimal("0.001")
MIN_ROUNDED_DIGITS = 2
"""Significant digits that a rounded answer must keep: `4` is no rounding of 3.62, `3.6` is."""


class NumericConfig(GraderSettings):
    """1 for the gold number in any unit or format, partial credit for a near miss, 0 for any other."""

    type: Literal["numeric"]
    answer_key: str = Field(
        default="answer", min_length=1, description="Key of the task's item that holds the gold answer."
    )
    partial_credit: float = Field(
        default=0.5, ge=0, lt=1, description="Score of an answer off by at most 0.1 % or by rounding; 0 turns it off."
    )

    @property
    def score_gap(self) -> float:
        """The least difference of two scores that differ."""
        return min(self.partial_credit, 1 - self.partial_credit) if self.partial_credit else 1.0


class NumericGrader:
    """Compares the last number of the answer, or of what it marks as such, with the gold number.

    Marks are `\\boxed{…}`, `<answer>…</answer>`, `####` and a line that begins with `Answer:`. Only one number of an
    answer is ever compared, so that naming several can't raise the chance of a hit. Years, and numbers that refer
    (`page 45`, `2 decimal places`, `Confidence: 95%`), are passed over where other numbers stand.

    Units: an answer with a scale word or a per cent sign means what it says; a bare number is read in the gold's unit,
    or as the full amount. A gold number without a unit leaves the answer's unit open, one with a currency sign alone
    its scale. An amount of money and a per cent are never the same.
    """

    def __init__(self, config: NumericConfig) -> None:
        self._config = config

    async def grade(self, task: Task, episode: Episode) -> Grade:
        answer, gold = final_answer(episode), self._gold(task)
        if answer is None:
            score, why = 0.0, f"no answer: the episode ended with {episode.stop_reason}"
        else:
            score, why = self._score(answer, gold)
        return Grade(reward=score, parts={"numeric": score}, explanation=why)

    def check(self, task: Task) -> None:
        self._gold(task)

    def _gold(self, task: Task) -> Number:
        text = gold_text(task, self._config.answer_key)
        numbers = find_numbers(text)
        if len(numbers) != 1:
            raise UserError(
                f"task {task.task_id}: the numeric grader needs exactly one number under "
                f"{self._config.answer_key!r}, found {len(numbers)} in {text!r}"
            )
        return numbers[0]

    def _score(self, answer: str, gold: Number) -> tuple[float, str]:
        numbers = find_numbers(marked(answer) or "") or find_numbers(answer)
        if not numbers:
            return 0.0, f"no number in {answer!r}"
        numbers = tuple(n for n in numbers if not n.refers) or numbers
        numbers = tuple(n for n in numbers if not n.looks_like_a_year) or numbers
        if len({n.full for n in numbers}) > MAX_NUMBERS:
            return 0.0, f"the answer names more than {MAX_NUMBERS} different numbers"
        last = numbers[-1]
        pairs = list(_readings(last, gold))
        if any(given == wanted for given, wanted, _ in pairs):
            return 1.0, f"{last.text!r} equals the gold {gold.text!r}"
        if self._config.partial_credit:
            if any(abs(given - wanted) <= RELATIVE_TOLERANCE * abs(wanted) for given, wanted, _ in pairs):
                return self._config.partial_credit, f"{last.text!r} is within 0.1 % of the gold {gold.text!r}"
            if last.significant >= MIN_ROUNDED_DIGITS and any(
                abs(given - wanted) <= half_unit for given, wanted, half_unit in pairs
            ):
                return self._config.partial_credit, f"{last.text!r} is the gold {gold.text!r}, rounded"
        return 0.0, f"{last.text!r} is not the gold {gold.text!r}"


def _readings(given: Number, gold: Number) -> list[tuple[Decimal, Decimal, Decimal]]:
    """Each admissible reading: the answer's amount, the gold amount, and half of the answer's last decimal place.

    Empty where the units exclude each other.
    """
    if given.percent and not gold.percent and (gold.exponent is not None or gold.currency):
        return []
    if gold.percent and not given.percent and (given.exponent is not None or given.currency):
        return []
    if given.exponent is None and gold.exponent is None:
        exponents = [(0, 0)]
    elif given.exponent is None:
        assert gold.exponent is not None
        exponents = [(gold.exponent, gold.exponent), (0, gold.exponent)]
    elif gold.exponent is None:
        exponents = [(given.exponent, 0), (0, 0)]
    else:
        exponents = [(given.exponent, gold.exponent)]
    signs = (1, -1) if given.either_sign else (1,)
    half = Decimal("0.5")
    return [
        (sign * given.value.scaleb(a), gold.value.scaleb(b), half.scaleb(a - given.decimals))
        for a, b in exponents
        for sign in signs
    ]
