"""Answers to the finance world's questions whose right score is known by how they were made.

A rule writes an answer out of the gold one, and its label follows from what it did:

1     the same amount, in another unit, format or wording
0.5   off by at most 0.1 %, or rounded to fewer digits
0     anything else

Left out, because the rule can be read both ways: a per cent gold as a decimal fraction, a number rounded to tens and
written with its zeros (1020 for 1015.2), a scale word on a gold number that has none (data sets often leave it out),
two candidates of which the last one is right. Left out too: questions for yes or no.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from envs.finance.contents import Contents
from envs.types import Task

EXPONENTS = {"thousand": 3, "million": 6, "billion": 9}
_GOLD = re.compile(
    r"(?P<sign>-?)(?P<dollar>\$?)(?P<digits>[0-9]+(?:\.[0-9]+)?)(?P<unit>%| thousand| million| billion|)"
)
_FIGURE = re.compile(r"(?<![\w.,$])[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![\w%])|(?<![\w.,$])[0-9]+\.[0-9]+(?![\w%])")
"""Figures of a report: with separators or decimals, so that no year is among them."""
_APART = Decimal("0.1")
"""Another figure differs by more than a tenth: rounding to two digits bridges a twentieth at most."""
_NO_NUMBER = (
    "I could not find it in the reports.",
    "The annual report does not say.",
    "I do not know.",
    "It cannot be worked out from what the report shows.",
)
_SENTENCES = (
    "The answer is {gold}.",
    "According to the annual report it was {gold}.",
    "I have looked it up in the annual report, and the result is **{gold}**.",
    "It comes to {gold}, as the annual report of that year shows.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """A gold answer taken apart."""

    text: str
    number: Decimal
    """Signed, in its unit."""
    unit: str
    """`thousand`, `million`, `billion`, `percent`, `dollars`, or `` for none."""

    @property
    def exponent(self) -> int | None:
        return EXPONENTS.get(self.unit)

    @property
    def decimals(self) -> int:
        return max(0, -int(self.number.as_tuple().exponent))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a rule makes an answer of."""

    gold: Gold
    others: Sequence[str]
    """Other figures of the same report, as they stand there, none within a tenth of the gold number or each other."""
    rng: random.Random


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswer:
    """An answer with the score that it deserves."""

    rule: str
    """How it was made; a key of `RULES`."""
    label: float
    task: Task
    answer: str


def labelled_answers(contents: Contents, *, per_rule: int, seed: int) -> list[LabelledAnswer]:
    """At most `per_rule` answers of each rule, each to another question; fewer where too few questions allow it.

    A pure function of its arguments.
    """
    candidates = [(task, gold) for tasks in contents.tasks.values() for task in tasks if (gold := gold_of(task))]
    rows: list[LabelledAnswer] = []
    for rule, (label, write) in RULES.items():
        rng = random.Random(f"{seed}/{rule}")
        found = 0
        for task, gold in rng.sample(candidates, len(candidates)):
            others = other_figures(contents.texts[task.item["paths"][0]], gold, rng)
            answer = write(Case(gold=gold, others=others, rng=rng))
            if answer is not None:
                rows.append(LabelledAnswer(rule=rule, label=label, task=task, answer=answer))
                found += 1
            if found == per_rule:
                break
    return rows


def gold_of(task: Task) -> Gold | None:
    """None for yes or no, and for a bare number that could be a year."""
    text = str(task.item["answer"])
    match = _GOLD.fullmatch(text)
    if match is None or task.item["kind"] == "greater" or re.fullmatch(r"(?:19|20)[0-9]{2}", text):
        return None
    unit = "dollars" if match["dollar"] else {"%": "percent"}.get(match["unit"], match["unit"].strip())
    return Gold(text=text, number=Decimal(match["sign"] + match["digits"]), unit=unit)


def other_figures(text: str, gold: Gold, rng: random.Random) -> list[str]:
    """Up to five figures of the document."""
    kept: list[str] = []
    numbers = [abs(gold.number)]
    figures = list(dict.fromkeys(_FIGURE.findall(text)))
    for figure in rng.sample(figures, len(figures)):
        number = Decimal(figure.replace(",", ""))
        if number and all(abs(number - n) > _APART * max(number, n) for n in numbers):
            kept.append(figure)
            numbers.append(number)
        if len(kept) == 5:
            break
    return kept


def written(number: Decimal | str, unit: str, *, separators: bool = False) -> str:
    """A number with its unit: `-$1.5`, `1.5%`, `1,500 thousand`."""
    digits = number if isinstance(number, str) else f"{number:,f}" if separators else f"{number:f}"
    match unit:
        case "percent":
            return f"{digits}%"
        case "dollars":
            return f"-${digits[1:]}" if digits.startswith("-") else f"${digits}"
        case _:
            return f"{digits} {unit}".strip()


# ---- the same amount


def _as_it_is(case: Case) -> str:
    return case.gold.text


def _separators(case: Case) -> str | None:
    gold = case.gold
    return written(gold.number, gold.unit, separators=True) if abs(gold.number) >= 1000 else None


def _currency(case: Case) -> str | None:
    gold = case.gold
    if gold.exponent is None:
        return None
    amount = written(gold.number, "dollars", separators=case.rng.random() < 0.5)
    return f"{amount} {gold.unit}"


def _unit_in_other_words(case: Case) -> str | None:
    gold = case.gold
    forms = {
        "percent": ("{} percent", "{} per cent"),
        "million": ("{}M", "{} mn", "{} (in millions)", "{} million dollars"),
        "thousand": ("{}K", "{} (in thousands)", "{} thousand dollars"),
        "billion": ("{}B", "{} bn", "{} billion dollars"),
        "dollars": ("{} dollars", "{} USD"),
    }.get(gold.unit)
    return case.rng.choice(forms).format(f"{gold.number:f}") if forms else None


def _other_scale(case: Case) -> str | None:
    """Converted without loss."""
    gold = case.gold
    if gold.exponent is None:
        return None
    unit = case.rng.choice([u for u in EXPONENTS if u != gold.unit])
    return written(gold.number.scaleb(gold.exponent - EXPONENTS[unit]), unit, separators=True)


def _full_amount(case: Case) -> str | None:
    gold = case.gold
    if gold.exponent is None:
        return None
    number = Decimal(f"{gold.number.scaleb(gold.exponent):f}")
    return written(number, case.rng.choice(("dollars", "")), separators=True)


def _unit_left_out(case: Case) -> str | None:
    gold = case.gold
    text = f"{gold.number:f}"
    return text if gold.unit and not re.fullmatch(r"(?:19|20)[0-9]{2}", text) else None


def _sentence(case: Case) -> str:
    return case.rng.choice(_SENTENCES).format(gold=case.gold.text)


def _working(case: Case) -> str | None:
    if len(case.others) < 2:
        return None
    first, second = (written(figure, case.gold.unit) for figure in case.others[:2])
    return f"The report shows {first} and {second}, which makes the answer {case.gold.text}."


def _negative_in_other_form(case: Case) -> str | None:
    gold = case.gold
    if gold.number >= 0:
        return None
    amount = written(abs(gold.number), gold.unit)
    return case.rng.choice((f"({amount})", f"\u2212{amount}", f"It decreased by {amount}."))


# ---- nearly


def _half_a_thousandth(case: Case) -> str:
    return _off_by(case, "0.0005")


def _fewer_decimals(case: Case) -> str | None:
    """Two digits are kept at least."""
    gold = case.gold
    rounded = [n for places in range(gold.decimals) if (n := _rounded(gold.number, places)) is not None]
    return written(case.rng.choice(rounded), gold.unit) if rounded else None


def _rounded_in_larger_unit(case: Case) -> str | None:
    gold = case.gold
    if gold.exponent is None or gold.unit == "billion":
        return None
    unit = next(u for u, exponent in EXPONENTS.items() if exponent == gold.exponent + 3)
    number = _rounded(gold.number.scaleb(-3), case.rng.choice((1, 2)))
    return None if number is None else written(number, unit)


def _rounded(number: Decimal, places: int) -> Decimal | None:
    """None where nothing is lost, or fewer than two digits are left."""
    out = number.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return None if out == number or len(out.as_tuple().digits) < 2 else out


# ---- something else


def _off_by(case: Case, share: str) -> str:
    """To six digits, so that rounding does not hide how far it is off."""
    number = case.gold.number * (1 + Decimal(share) * case.rng.choice((-1, 1)))
    number = number.quantize(Decimal(1).scaleb(number.adjusted() - 5), ROUND_HALF_UP)
    plain = f"{number:f}"
    return written(Decimal(plain.rstrip("0").rstrip(".") if "." in plain else plain), case.gold.unit)


def _wrong_sign(case: Case) -> str:
    return written(-case.gold.number, case.gold.unit)


def _wrong_scale(case: Case) -> str | None:
    """A thousand times too much or too little."""
    gold = case.gold
    if gold.exponent is None:
        return None
    units = [unit for unit, exponent in EXPONENTS.items() if abs(exponent - gold.exponent) == 3]
    return written(gold.number, case.rng.choice(units))


def _wrong_kind_of_unit(case: Case) -> str | None:
    """Per cent for an amount of money, and the other way round."""
    gold = case.gold
    if gold.unit not in ("percent", "dollars", *EXPONENTS):
        return None
    return written(gold.number, case.rng.choice(("million", "dollars")) if gold.unit == "percent" else "percent")


def _other_figure(case: Case) -> str | None:
    return written(case.others[0], case.gold.unit) if case.others else None


def _named_but_not_answered(case: Case) -> str | None:
    if not case.others:
        return None
    return f"The report shows {case.gold.text}, but the answer is {written(case.others[0], case.gold.unit)}."


def _several(case: Case) -> str | None:
    if len(case.others) < 4:
        return None
    amounts = [written(figure, case.gold.unit) for figure in case.others[:4]]
    amounts.insert(case.rng.randrange(5), case.gold.text)
    return f"It is {', '.join(amounts[:-1])} or {amounts[-1]}."


def _no_number(case: Case) -> str:
    return case.rng.choice(_NO_NUMBER)


RULES: Mapping[str, tuple[float, Callable[[Case], str | None]]] = {
    "the gold as it is": (1.0, _as_it_is),
    "thousands separators": (1.0, _separators),
    "currency sign": (1.0, _currency),
    "unit in other words": (1.0, _unit_in_other_words),
    "converted to another scale": (1.0, _other_scale),
    "the full amount": (1.0, _full_amount),
    "unit left out": (1.0, _unit_left_out),
    "in a sentence": (1.0, _sentence),
    "working, then the gold": (1.0, _working),
    "negative in another form": (1.0, _negative_in_other_form),
    "off by 0.05 %": (0.5, _half_a_thousandth),
    "fewer decimals": (0.5, _fewer_decimals),
    "rounded in a larger unit": (0.5, _rounded_in_larger_unit),
    "off by 0.2 %": (0.0, lambda case: _off_by(case, "0.002")),
    "off by 1 %": (0.0, lambda case: _off_by(case, "0.01")),
    "off by 5 %": (0.0, lambda case: _off_by(case, "0.05")),
    "wrong sign": (0.0, _wrong_sign),
    "wrong scale": (0.0, _wrong_scale),
    "unit of another kind": (0.0, _wrong_kind_of_unit),
    "another figure of the report": (0.0, _other_figure),
    "gold named, another answered": (0.0, _named_but_not_answered),
    "several candidates": (0.0, _several),
    "no number": (0.0, _no_number),
}
"""By name: the label, and the rule, which gives None for a gold answer that it can't be applied to."""
