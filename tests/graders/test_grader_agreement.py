"""The benchmark of graders on answers whose right score is known: the answers, the figures, one run with a judge."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.contents import Contents, load_contents
from envs.types import Task
from graders.judges.model_graders import ScoreModelConfig
from tests.support import ROOT
from tests.support.servers import completion, scripted_judge

BENCH = ROOT / "scripts" / "bench"
PER_RULE = 30


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("labelled_answers")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("grader_agreement")


def contents_of(seed: int) -> Contents:
    return load_contents(
        FinanceConfig(style="full", seed=seed, num_companies=40, num_years=5, num_train_tasks=40 * PER_RULE)
    )


@pytest.fixture(scope="module")
def contents() -> Contents:
    return contents_of(0)


# ---- the answers


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_the_numeric_grader_gives_every_labelled_answer_its_label(answers: Any, bench: Any, seed: int) -> None:
    rows = answers.labelled_answers(contents_of(seed), per_rule=PER_RULE, seed=seed)
    scored = await bench.score(rows, None)
    wrong = [bench.as_json(s) for s in scored if s.numeric.reward != s.row.label]
    assert wrong == []


def test_every_rule_has_as_many_answers_each_to_another_question(answers: Any, contents: Contents) -> None:
    rows = answers.labelled_answers(contents, per_rule=PER_RULE, seed=0)
    assert Counter(row.rule for row in rows) == dict.fromkeys(answers.RULES, PER_RULE)
    assert len({(row.rule, row.task.task_id) for row in rows}) == len(rows)
    assert {row.label for row in rows} == {1.0, 0.5, 0.0}
    assert not any(row.task.item["kind"] == "greater" for row in rows)


def test_the_answers_depend_on_the_seed_alone(answers: Any, contents: Contents) -> None:
    def made(seed: int) -> list[tuple[str, str]]:
        return [(r.task.task_id, r.answer) for r in answers.labelled_answers(contents, per_rule=3, seed=seed)]

    assert made(0) == made(0)
    assert made(0) != made(1)


def case(answers: Any, gold: str, others: tuple[str, ...] = ("7,000.5", "31.2", "512.4", "98.7")) -> Any:
    task = Task(task_id="t", messages=(), item={"answer": gold, "kind": "sum"})

    class First:
        """Always draws the first."""

        def choice(self, options: Any) -> Any:
            return options[0]

        def random(self) -> float:
            return 0.0

        def randrange(self, stop: int) -> int:
            return 0

    return answers.Case(gold=answers.gold_of(task), others=others, rng=First())


@pytest.mark.parametrize(
    ("rule", "gold", "answer"),
    [
        ("the gold as it is", "-$1.5", "-$1.5"),
        ("thousands separators", "1015.2 million", "1,015.2 million"),
        ("thousands separators", "15.2 million", None),
        ("currency sign", "-1015.2 million", "-$1,015.2 million"),
        ("currency sign", "3.6%", None),
        ("unit in other words", "3.6%", "3.6 percent"),
        ("unit in other words", "1.14", None),
        ("converted to another scale", "1015.2 million", "1,015,200 thousand"),
        ("converted to another scale", "24435 thousand", "24.435 million"),
        ("the full amount", "1015.2 million", "$1,015,200,000"),
        ("unit left out", "1015.2 million", "1015.2"),
        ("unit left out", "2015 million", None),
        ("unit left out", "1.14", None),
        ("in a sentence", "3.6%", "The answer is 3.6%."),
        ("working, then the gold", "3.6%", "The report shows 7,000.5% and 31.2%, which makes the answer 3.6%."),
        ("negative in another form", "-322.6 million", "(322.6 million)"),
        ("negative in another form", "322.6 million", None),
        ("off by 0.05 %", "1000 million", "999.5 million"),
        ("fewer decimals", "43.75%", "44%"),
        ("fewer decimals", "4.75%", "4.8%"),
        ("fewer decimals", "4.5%", None),
        ("rounded in a larger unit", "1565844 thousand", "1565.8 million"),
        ("rounded in a larger unit", "1.5 million", None),
        ("off by 0.2 %", "-4", "-3.992"),
        ("off by 1 %", "1000 million", "990 million"),
        ("off by 5 %", "$10", "$9.5"),
        ("wrong sign", "-$10", "$10"),
        ("wrong scale", "12 thousand", "12 million"),
        ("wrong scale", "$12", None),
        ("unit of another kind", "12%", "12 million"),
        ("unit of another kind", "$12", "12%"),
        ("unit of another kind", "12", None),
        ("another figure of the report", "12%", "7,000.5%"),
        ("gold named, another answered", "12%", "The report shows 12%, but the answer is 7,000.5%."),
        ("several candidates", "12", "It is 12, 7,000.5, 31.2, 512.4 or 98.7."),
        ("no number", "12", "I could not find it in the reports."),
    ],
)
def test_a_rule_writes_what_its_name_says(answers: Any, rule: str, gold: str, answer: str | None) -> None:
    assert answers.RULES[rule][1](case(answers, gold)) == answer


@pytest.mark.parametrize(("text", "kind"), [("1", "greater"), ("2015", "value"), ("about 5", "value")])
def test_gold_answers_without_a_size_are_left_out(answers: Any, text: str, kind: str) -> None:
    assert answers.gold_of(Task(task_id="t", messages=(), item={"answer": text, "kind": kind})) is None


def test_other_figures_stand_in_the_report_and_are_far_from_the_gold(answers: Any, contents: Contents) -> None:
    rng = answers.random.Random(0)
    for task in contents.tasks["eval"]:
        gold = answers.gold_of(task)
        if gold is None:
            continue
        text = contents.texts[task.item["paths"][0]]
        others = answers.other_figures(text, gold, rng)
        assert len(others) == 5 and all(figure in text for figure in others)
        for figure in others:
            number = Decimal(figure.replace(",", ""))
            assert abs(number - abs(gold.number)) > Decimal("0.1") * abs(gold.number)


# ---- the figures


def test_kappa_and_confusion_are_those_of_an_example_by_hand(bench: Any) -> None:
    # Observed 3/5; chance (2*3 + 1*1 + 2*1) / 25 = 0.36; kappa 0.24 / 0.64.
    pairs = [(1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.0, 0.5), (0.0, 0.0)]
    found = bench.agreement(pairs)
    assert found["share"] == pytest.approx(0.6)
    assert found["kappa"] == pytest.approx(0.375)
    assert bench.confusion(pairs) == [[2, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert bench.agreement([(1.0, 1.0)]) == {"n": 1, "share": 1.0, "kappa": None}
    assert bench.agreement([]) == {"n": 0, "share": None, "kappa": None}


def test_a_judges_number_counts_as_the_nearest_class_and_the_lower_of_two(bench: Any) -> None:
    assert [bench.class_of(x) for x in (0.0, 0.2, 0.25, 0.3, 0.6, 0.75, 0.8, 1.0)] == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1]


# ---- a run


def judged(text: str) -> str | None:
    """What the scripted judge says to a prompt: 1 for the reference as it is, else nothing that can be read, or 0."""
    gold, answer = text.removeprefix("Reference: ").split("\nAnswer: ")
    if answer == gold:
        return json.dumps({"steps": [], "result": 1})
    return "I would rather not." if answer.endswith("%") else json.dumps({"steps": [], "result": 0})


@pytest.fixture
def judge() -> Iterator[str]:
    """A server that says what `judged` says."""

    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        prompt = asked["messages"][-1]["content"]
        if not any(c.isdigit() for c in prompt.partition("Answer: ")[2]):
            return web.json_response({"error": {"message": "prompt is too long"}}, status=413)
        return completion(asked["model"], judged(prompt))

    with scripted_judge(answer) as url:
        yield url


@pytest.fixture
def shell(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["grader_agreement.py", *words])
        monkeypatch.setenv("COLUMNS", "120")
        bench.main()

    return run


def test_a_run_with_a_judge_tells_the_figures_of_both_graders(
    shell: Callable[..., None], judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "agreement.json"
    shell("--per-rule", "2", "--base-url", judge, "--model", "wise", "--errors", "1", "--json", str(out))
    figures = json.loads(out.read_text())
    assert {"hardware", "commit", "command", "seed"} <= figures.keys()
    assert figures["labels"] == {"1": 20, "0.5": 6, "0": 20} and len(figures["rows"]) == figures["answers"] == 46

    by_rule = {row["rule"]: row for row in figures["rules"]}
    assert by_rule["the gold as it is"]["judge"] == {"mean": 1.0, "right": 1.0}
    assert by_rule["in a sentence"]["judge"] == {"mean": 0.0, "right": 0.0}
    assert by_rule["wrong sign"]["judge"] == {"mean": 0.0, "right": 1.0}
    assert all(row["numeric"]["right"] == 1.0 for row in figures["rules"])

    faults = figures["judge"]["errors"]["model_grader_server"]
    unread = figures["judge"]["errors"]["model_grader_parse"]
    pairs = figures["agreement"]
    assert faults == by_rule["no number"]["n"] and unread > 0
    assert by_rule["no number"]["judge"] == {"mean": None, "right": None}
    assert pairs["label / numeric"] == {"n": 46, "share": 1.0, "kappa": 1.0}
    assert pairs["label / judge"]["n"] == pairs["numeric / judge"]["n"] == 46 - faults
    assert pairs["label / judge, where read"]["n"] == 46 - faults - unread
    ones, halves, zeros = figures["confusion"]["label / judge"]
    # It says 1 to the gold as it is, and to no other answer.
    assert ones == [2, 0, 18] and halves == [0, 0, 6] and zeros == [0, 0, 20 - faults]
    assert figures["judge"]["tokens"] == 42 * (46 - faults)

    told = capsys.readouterr().out
    for text in ("the gold as it is", "label / judge, where read", "too long for the judge", "scored otherwise"):
        assert text in told


def test_without_a_judge_the_numeric_grader_is_measured_alone(
    shell: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shell("--per-rule", "1", "--seed", "4")
    told = capsys.readouterr().out
    assert "label / numeric" in told and "judge" not in told


def test_questions_of_real_reports_give_answers_too(shell: Callable[..., None], tmp_path: Path) -> None:
    def context(name: str, words: str, answer: str) -> dict[str, Any]:
        return {
            "table": {"uid": name, "table": [["", "2019"], [words, answer], ["Other", "7,123.5"]]},
            "paragraphs": [{"order": 1, "text": f"The {words} is discussed here."}],
            "questions": [
                {
                    "uid": f"{name}-q",
                    "question": f"What is the {words}?",
                    "answer": answer,
                    "answer_type": "span",
                    "scale": "thousand",
                }
            ],
        }

    path, out = tmp_path / "real.json", tmp_path / "out.json"
    subjects = ("goodwill impairment", "dividend payment", "lease liability", "pension deficit")
    path.write_text(json.dumps([context(str(i), words, f"1,{i}45.5") for i, words in enumerate(subjects)]))
    shell("--per-rule", "2", "--tatqa", str(path), "--json", str(out))
    figures = json.loads(out.read_text())
    assert figures["questions"] == "TAT-QA"
    assert {row["gold"] for row in figures["rows"]} <= {f"1{i}45.5 thousand" for i in range(4)}
    assert figures["agreement"]["label / numeric"]["share"] == 1.0
    # No gold number is negative, and the reports hold too few figures to name several.
    absent = {"negative in another form", "several candidates", "working, then the gold"}
    assert absent.isdisjoint(row["rule"] for row in figures["rules"])


def test_the_shipped_judge_holds_the_rule_and_sees_gold_and_answer(bench: Any) -> None:
    config = bench.read_grader(ROOT / "configs" / "finance_judge.json")
    assert isinstance(config, ScoreModelConfig)
    text = "\n".join(message.text for message in config.input)
    for part in ("0.1 %", "0.5", "rounding", "{{item.answer}}", "{{sample.output_text}}"):
        assert part in text


def test_a_file_that_is_no_model_grader_is_named(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "grader.json"
    path.write_text('{"type": "numeric"}')
    with pytest.raises(UserError, match=r"grader\.json.*problem"):
        bench.read_grader(path)
    with pytest.raises(UserError, match=r"nope\.json"):
        bench.read_grader(tmp_path / "nope.json")
