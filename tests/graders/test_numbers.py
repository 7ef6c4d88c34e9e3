"""Numbers as models write them: each form that `graders.rules.numbers` lists, and what must not be taken for one."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.types import Episode, Message, StopReason, Task, Turn
from graders.rules.numbers import find_numbers
from graders.rules.numeric import NumericConfig, NumericGrader


async def score(answer: str, gold: str) -> float:
    message = Message(role="assistant", content=answer)
    episode = Episode(
        rollout_id="r",
        task_id="t",
        messages=(message,),
        turns=(Turn(message=message),),
        stop_reason=StopReason.ANSWERED,
    )
    task = Task(task_id="t", messages=(Message(role="user", content="?"),), item={"answer": gold})
    return (await NumericGrader(NumericConfig(type="numeric")).grade(task, episode)).reward


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # signs
        ("-$5", -5),
        ("\u2212 5", -5),
        ("= －５", -5),
        ("minus 5", -5),
        ("a change of negative 5.5", "-5.5"),
        ("(12)", -12),
        ("ninety-nine (99)", 99),
        ("It is:\n- 42 million", "42e6"),
        ("It is:\n  * 42 million", "42e6"),
        # separators
        ("12,345.6", "12345.6"),
        ("12 345", 12345),
        ("12\u202f345\u202f678", 12345678),
        ("12\u00a0345,60", "12345.60"),
        ("12'345.5", "12345.5"),
        ("12’345", 12345),
        ("1.234.567", 1234567),
        ("1.234.567,8", "1234567.8"),
        ("1.234,56 €", "1234.56"),
        ("12,34,567", 1234567),
        ("1_234_567", 1234567),
        ("3,5", "3.5"),
        ("3,1416", "3.1416"),
        ("0,125", "0.125"),
        ("12.345", "12.345"),
        ("12,345", 12345),
        # scales
        ("3.2 billion", "3.2e9"),
        ("3.2bn", "3.2e9"),
        ("42mln", "42e6"),
        ("42 Mio. EUR", "42e6"),
        ("1.5mrd", "1.5e9"),
        ("5 crore", "5e7"),
        ("Rs.5 crore", "5e7"),
        ("$4.2T", "4.2e12"),
        ("USD1.5m", "1.5e6"),
        ("approx.42", 42),
        ("412.5 (in millions)", "412.5e6"),
        ("**42** million", "42e6"),
        ("1.2e6", "1.2e6"),
        ("1.2E+06", "1.2e6"),
        ("1.2 × 10^6", "1.2e6"),
        ("1.2×10⁶", "1.2e6"),
        ("1.2 x 10^{-3}", "1.2e-3"),
        ("1.2 * 10**6", "1.2e6"),
        (r"$1.2 \times 10^{6}$", "1.2e6"),
        (r"4\cdot10^3", "4e3"),
        ("10^6", "1e6"),
        ("10⁶", "1e6"),
        # per cent
        ("12.5 %", "12.5"),
        ("12.5pp", "12.5"),
        ("12.5 pct", "12.5"),
        ("5‰", "0.5"),
        ("25 bps", "0.25"),
        ("25 basis points", "0.25"),
        # units
        ("5kg", 5),
        ("5 kg", 5),
        ("30km/h", 30),
        ("7x", 7),
        ("20GB", 20),
        ("5 cm^2", 5),
        (r"$5\text{ cm}^{2}$", 5),
        (r"5\,\mathrm{km/s}^{-2}", 5),
        ("x_1 = 5", 5),
        ("R^2 = 0.5", "0.5"),
        ("90min", 90),
        ("5°C", 5),
        ("5€", 5),
        ("5EUR", 5),
        ("CHF 5", 5),
        ("US$5", 5),
        ("-€5", -5),
        ("5.2USD", "5.2"),
        # LaTeX
        (r"$5.2\%$", "5.2"),
        (r"$\$5.2$", "5.2"),
        (r"12{,}345", 12345),
        (r"12\,345", 12345),
        (r"12,\!345", 12345),
        (r"5\,\text{kg}", 5),
        (r"$42\text{ million}$", "42e6"),
        (r"\(42\)", 42),
        (r"\[ x = 42 \]", 42),
        (r"$$42$$", 42),
        (r"\boxed{42}", 42),
        (r"$\boxed{\text{42 million}}$", "42e6"),
        (r"\frac{1}{2}", "0.5"),
        (r"$\dfrac{-3}{4}$", "-0.75"),
        (r"\mathbf{42}", 42),
        (r"$\approx 42$", 42),
        # marks
        ("**42**", 42),
        ("***42***", 42),
        ("*42*", 42),
        ("_42_", 42),
        ("__42__ people", 42),
        ("`42`", 42),
        ("<b>42</b>", 42),
        ("42[1]", 42),
        ("42 million [1][2]", "42e6"),
        ("42 [3, 4].", 42),
        ("42[^1]", 42),
        ("42<sup>2</sup>", 42),
        ("42【4†source】", 42),
        ("42¹", 42),
        ("42 million²", "42e6"),
        ("42*", 42),
        ("42†", 42),
        ("The answer is [42].", 42),
        ("42 ± 0.5", 42),
        (r"42 \pm 0.5", 42),
        ("5½", "5.5"),
        ("¾", "0.75"),
        ("| Revenue | 42 |", 42),
        ("~42", 42),
        (">42", 42),
        ("42.", 42),
        ("４２", 42),
    ],
)
def test_a_number_is_read_as_models_write_it(text: str, value: object) -> None:
    (number,) = find_numbers(text)
    assert number.full == Decimal(str(value)), number


@pytest.mark.parametrize(
    "text",
    ["10-K", "Q3", "the 4th", "1.2.3", "the 1990s", "3D", "5G", "12ab34", "file_2015.txt", "a1", "0x1F", "v2"],
)
def test_what_is_no_number_is_read_as_none(text: str) -> None:
    assert find_numbers(text) == ()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("between $5 and $6", [5, 6]),
        ("$5-$6", [5, 6]),
        ("5–6%", [5, 6]),
        ("3 * 4 = 12", [3, 4, 12]),
        ("3*4 = 12", [3, 4, 12]),
        ("2 ** 3", [2, 3]),
        ("in 2015 345 were sold", [2015, 345]),
        ("1, 2, 3", [1, 2, 3]),
        ("rows [12] and [13]", [12, 13]),
        ("10 minus 4 is 6", [10, 4, 6]),
        ("| 2014 | 398.1 | 2015 | 412.5 |", [2014, "398.1", 2015, "412.5"]),
        ("1/2", [1, 2]),
    ],
)
def test_numbers_beside_each_other_stay_apart(text: str, values: list[object]) -> None:
    assert [number.full for number in find_numbers(text)] == [Decimal(str(v)) for v in values]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"So \boxed{412.5 \text{ million}}, up from 398.1 in 2014, 7 stores more.", "412.5 million"),
        (r"$398.1 + 14.4 = 412.5$, $1$, $2$, so $\boxed{412.5}$", "412.5"),
        (r"The margin is $\boxed{5.2\%}$.", "5.2%"),
        ("It grew by 520 bps", "5.2%"),
        ("52‰", "5.2%"),
        ("€5,2 Mio.", "5.2 million"),
        ("5.2e6 EUR", "$5.2 million"),
        # What marks the answer, behind the working.
        ("5 + 5 = 10\n10 * 2 = 20\n20 - 3 = 17\n#### 17", "17"),
        ("5 + 5 = 10, 10 * 2 = 20, 20 - 3 = 17\n<answer>17 apples</answer>", "17"),
        ("5 + 5 = 10, 10 * 2 = 20, 20 - 3 = 17\n\n**Final Answer:** 17", "17"),
        ("5 + 5 = 10, 10 * 2 = 20, 20 - 3 = 17\nAnswer:\n17", "17"),
        ("Answer: 10, no.\nAnswer: 17", "17"),
        ("Answer: as follows.\n20 - 3 = 17", "17"),
        # Numbers that refer, and are not the answer.
        ("412.5 [source: 10-K, p. 45]", "412.5"),
        ("It was 412.5. Source: page 45, table 3", "412.5"),
        ("Answer: 42\n\nConfidence: 95%", "42"),
        ("42.57, rounded to 2 decimal places.", "42.57"),
        ("page 45", "45"),
    ],
)
async def test_a_right_number_in_any_dress_scores_in_full(answer: str, gold: str) -> None:
    assert await score(answer, gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"It was 412.5 million, so \boxed{398.1}.", "412.5 million"),
        ("520 bps", "520%"),
        ("520 bps", "$5.2"),
        ("**42** million", "42 billion"),
        ("412.5 million [398]", "398"),
        ("#### 16\nor rather 17\n#### 16", "17"),
        ("<answer>16</answer> <answer>17</answer> <answer>18</answer>", "17"),
        ("Answer: 17\nAnswer: 18", "17"),
        ("Answer: 1, 2, 3, 4, 17", "17"),
    ],
)
async def test_a_wrong_number_in_the_same_dress_scores_nothing(answer: str, gold: str) -> None:
    assert await score(answer, gold) == 0.0


@settings(deadline=None)
@given(text=st.text(alphabet="0123456789.,'*_^{}[]()$%\\ \u00a0×⁶¹½–-exfracboxd", max_size=60))
def test_any_text_full_of_marks_can_be_searched(text: str) -> None:
    for number in find_numbers(text):
        assert number.value.is_finite()
