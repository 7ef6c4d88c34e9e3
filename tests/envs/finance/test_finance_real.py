"""Real reports in the JSON of TAT-QA and FinQA: our own samples, and TAT-QA's development split where it is at hand."""

from __future__ import annotations

import copy
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from envs.arithmetic import calculate
from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.full.questions import YES_NO_RULE
from envs.finance.program import execute, unnested
from envs.finance.world import FinanceWorld
from graders.build import build_grader
from graders.penalties import PenaltiesConfig
from tests.support import ROOT
from tests.support.finance_play import GRADER, NUMERIC, all_tasks, num_calls, replay, score

TATQA_DEV = ROOT.parent / "shared" / "data" / "tatqa" / "tatqa_dataset_dev.json"


def question(uid: str, text: str, answer: object, **more: str) -> dict[str, Any]:
    """A question in TAT-QA's format."""
    rest = {"derivation": "", "answer_type": "span", "answer_from": "table", "scale": "", "order": 1}
    return {"uid": uid, "question": text, "answer": answer, "req_comparison": False, **rest, **more}


TATQA: list[dict[str, Any]] = [
    {
        "table": {
            "uid": "t1",
            "table": [["", "2019", "2018"], ["Lighthouse fees", "$ 12.5", "10.0"], ["Other", "3", "3"]],
        },
        "paragraphs": [
            {"uid": "p2", "order": 2, "text": "Ferries carried 14 passengers each."},
            {"uid": "p1", "order": 1, "text": "Lighthouse fees rose because of storms."},
        ],
        "questions": [
            question("q1", "What were the lighthouse fees in 2019?", ["$ 12.5"], scale="million"),
            question(
                *("q2", "What is the percentage change of lighthouse fees from 2018 to 2019?", 25),
                **{"derivation": "(12.5-10.0)/10.0", "answer_type": "arithmetic", "scale": "percent"},
            ),
            question(
                *("q3", "What is the average of lighthouse fees?", 11.3),
                **{"derivation": "(12.5+10.0)/2", "answer_type": "arithmetic", "scale": "million"},
            ),
            question("no-number", "Why did lighthouse fees rise?", ["because of storms"]),
            question("two-numbers", "Which lighthouse fees are shown?", ["12.5", "10.0"], answer_type="multi-span"),
            question("year", "In which year were lighthouse fees higher?", ["2019"]),
            question(
                "zero", "What is the change of other lighthouse income?", 0, derivation="3-3", answer_type="arithmetic"
            ),
            question(
                "wrong-derivation",
                "What is the sum of lighthouse fees?",
                30,
                derivation="12.5+10",
                answer_type="arithmetic",
            ),
            question("no-report-named", "What is the total?", ["3"]),
            question("twice-1", "How many passengers did lighthouse ferries carry?", ["14"]),
            question("twice-2", "How many passengers did  lighthouse ferries carry?", ["14"]),
        ],
    },
    {
        "table": {"uid": "t2", "table": [["", "2019"], ["Orchard rent", "(1,234)"], ["Total", "3"]]},
        "paragraphs": [{"uid": "p3", "order": 1, "text": "Orchard rent is paid in apples."}],
        "questions": [question("q4", "What was the orchard rent in 2019?", ["(1,234)"], scale="thousand")],
    },
]


def finqa(page: str, text: str, program: str, exe_ans: object, answer: str) -> dict[str, Any]:
    """An entry in FinQA's format."""
    return {
        "id": f"{page}.pdf-{text}",
        "filename": f"{page}.pdf",
        "pre_text": ["harbour dues are in thousands .", "see the notes ."],
        "post_text": ["dues were paid in silver ."],
        "table": [["", "2008", "2007"], ["harbour dues", "$ 1,250", "$ 1,000"], ["loss", "-12.5 ( 12.5 )", "4.5"]],
        "qa": {"question": text, "program": program, "exe_ans": exe_ans, "answer": answer, "gold_inds": {}},
    }


FINQA: list[dict[str, Any]] = [
    finqa(
        "HBR/2008/page_3", "what was the growth of harbour dues?", "subtract(1250, 1000), divide(#0, 1000)", 0.25, "25%"
    ),
    finqa(
        "HBR/2008/page_3", "what were the average harbour dues?", "table_average(harbour dues, none)", 1125.0, "1125"
    ),
    finqa("HBR/2008/page_3", "did harbour dues rise?", "greater(1250, 1000)", "yes", "yes"),
    finqa("HBR/2008/page_3", "what was the largest loss?", "table_min(loss, none)", -12.5, "-12.5"),
    finqa(
        "HBR/2008/page_3", "what was the rate of harbour dues?", "divide(3, 4), multiply(#0, const_100)", 75.0, "75.0%"
    ),
    finqa("HBR/2008/page_3", "what is wrong here?", "add(1, 1)", 3.0, "3"),
    finqa("HBR/2008/page_3", "what can't be computed?", "divide(1, 0)", 0.0, "0"),
    finqa("MLL/2009/page_7", "what were total harbour dues?", "add(1250, 1000)", 2250.0, "2250"),
]


def world_of(folder: Path, source: str, data: object, **settings: object) -> FinanceWorld:
    path = folder / "data.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return FinanceWorld(FinanceConfig.model_validate({"source": source, "path": path, "eval_share": 0.5, **settings}))


def test_tatqa_contexts_become_documents_and_the_answerable_questions_tasks(tmp_path: Path) -> None:
    world = world_of(tmp_path, "tatqa", TATQA)
    assert world.texts["tatqa/t1.txt"] == (
        "Lighthouse fees rose because of storms.\n\nFerries carried 14 passengers each.\n\n"
        " | 2019 | 2018\nLighthouse fees | $ 12.5 | 10.0\nOther | 3 | 3"
    )
    answers = {t.task_id: t.item["answer"] for t in all_tasks(world)}
    # The gold of q3 is what its derivation gives, not what the file rounded it to.
    assert answers == {
        "tatqa/q1": "12.5 million",
        "tatqa/q2": "25%",
        "tatqa/q3": "11.25 million",
        "tatqa/q4": "-1234 thousand",
    }
    assert {t.item["paths"][0] for t in world.tasks("train")}.isdisjoint(
        t.item["paths"][0] for t in world.tasks("eval")
    )


def test_finqa_questions_begin_with_company_and_year_and_their_programs_give_the_answers(tmp_path: Path) -> None:
    world = world_of(tmp_path, "finqa", FINQA)
    assert world.texts["HBR/2008/page_3.txt"].startswith(
        "HBR 2008 annual report\n\nharbour dues are in thousands .\n\nsee"
    )
    tasks = {t.messages[-1].content: t for t in all_tasks(world)}
    assert {text: t.item["answer"] for text, t in tasks.items()} == {
        "In the 2008 annual report of HBR, what was the growth of harbour dues?": "25%",
        "In the 2008 annual report of HBR, what were the average harbour dues?": "1125",
        "In the 2008 annual report of HBR, what was the rate of harbour dues?": "75%",
        f"In the 2008 annual report of HBR, did harbour dues rise? {YES_NO_RULE}": "1",
        "In the 2008 annual report of HBR, what was the largest loss?": "-12.5",
        "In the 2009 annual report of MLL, what were total harbour dues?": "2250",
    }
    assert Counter(t.item["kind"] for t in tasks.values())["table_average"] == 1
    companies = [{t.item["companies"][0] for t in world.tasks(split)} for split in ("train", "eval")]
    assert companies[0].isdisjoint(companies[1])


@pytest.mark.usefixtures("offline_datasets")
def test_a_data_set_of_the_same_rows_gives_the_same_world(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for source, data in (("tatqa", TATQA), ("finqa", FINQA)):
        of_file = world_of(tmp_path / "data", source, data)
        # One JSON file in a folder is a data set to `datasets`.
        path = {"dataset": str(tmp_path / "data")}
        of_dataset = FinanceWorld(FinanceConfig.model_validate({"source": source, "path": path, "eval_share": 0.5}))
        assert of_dataset.texts == of_file.texts and all_tasks(of_dataset) == all_tasks(of_file)


NESTED = {
    "subtract(1250, 1000), divide(#0, 1000)": "divide(subtract(1250, 1000), 1000)",
    "divide(3, 4), multiply(#0, const_100)": "multiply(divide(3, 4), const_100)",
}


@pytest.mark.parametrize("nested", [True, False])
def test_finqas_flat_rows_are_read_as_its_file_is(tmp_path: Path, nested: bool) -> None:
    flat = [
        {key: entry[key] for key in ("id", "pre_text", "post_text", "table")}
        | {
            "question": entry["qa"]["question"],
            "answer": entry["qa"]["answer"] if nested else "",
            "final_result": entry["qa"]["answer"],
            "program_re": NESTED.get(entry["qa"]["program"], entry["qa"]["program"])
            if nested
            else entry["qa"]["program"],
            "gold_inds": [],
        }
        for entry in FINQA
    ]
    (tmp_path / "saved").mkdir()
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(flat)}).save_to_disk(tmp_path / "saved")
    path = {"dataset": str(tmp_path / "saved"), "split": "validation"}
    of_dataset = FinanceWorld(FinanceConfig.model_validate({"source": "finqa", "path": path, "eval_share": 0.5}))
    of_file = world_of(tmp_path, "finqa", FINQA)
    assert of_dataset.texts == of_file.texts and all_tasks(of_dataset) == all_tasks(of_file)


@pytest.mark.parametrize(
    ("program", "answer", "gold"),
    [
        ("divide(1, 61)", "1.6%", "1.64%"),
        ("divide(1, 61)", "0.0164", "0.01639"),
        ("divide(100, 61)", "164%", "163.93%"),
        ("divide(1, 61), multiply(#0, const_100)", "1.64%", "1.64%"),
        ("divide(1, 61)", "1.7%", None),
        ("divide(1, 61)", "1.6", None),
        ("divide(1, 61)", "about two", None),
    ],
)
def test_a_flat_rows_program_must_give_the_answer_as_it_is_written(
    tmp_path: Path, program: str, answer: str, gold: str | None
) -> None:
    kept = [
        {**e, "program_re": e["qa"]["program"], "question": e["qa"]["question"], "answer": e["qa"]["answer"]}
        for e in FINQA
    ]
    rows = [{**kept[0], "program_re": program, "answer": answer}, *kept[1:]]
    tasks = {t.task_id: t for t in all_tasks(world_of(tmp_path, "finqa", rows))}
    first = tasks.get(f"finqa/{FINQA[0]['id']}")
    assert (first and first.item["answer"]) == gold


@pytest.mark.parametrize(
    ("nested", "flat"),
    [
        *((nested, flat) for flat, nested in NESTED.items()),
        ("add(subtract(1, 2), multiply(3, const_m1))", "subtract(1, 2), multiply(3, const_m1), add(#0, #1)"),
        (
            "divide(table_max(total (net, of tax), none), 4)",
            "table_max(total (net, of tax), none), divide(#0, 4)",
        ),
        ("greater(1,250, 5.2%)", "greater(1,250, 5.2%)"),
        *((flat, flat) for flat in NESTED),
        ("add(1, 2", "add(1, 2"),
        ("", ""),
    ],
)
def test_a_nested_program_becomes_steps(nested: str, flat: str) -> None:
    assert unnested(nested) == flat


@pytest.mark.parametrize(("source", "data"), [("tatqa", TATQA), ("finqa", FINQA)])
async def test_the_expert_solves_every_sample_task(tmp_path: Path, source: str, data: object) -> None:
    world = world_of(tmp_path, source, data)
    for task in all_tasks(world):
        for seed in range(5):
            script = world.expert_episode(task, seed)
            episode = await replay(world, task, script)
            assert num_calls(script) <= 10
            assert (await GRADER.grade(task, episode)).reward == 1.0
            results = [r for t in episode.turns for r in t.results]
            assert all(r.error is None for r in results)


def test_the_number_of_tasks_is_a_limit_and_eval_companies_are_never_trained_on(tmp_path: Path) -> None:
    world = world_of(tmp_path, "finqa", FINQA, num_train_tasks=1, num_eval_tasks=1)
    assert [len(world.tasks(split)) for split in ("train", "eval")] == [1, 1]


def edited(data: list[dict[str, Any]], *keys: Any, value: object = None) -> list[dict[str, Any]]:
    """The data with the value at these keys set, or without it."""
    out = copy.deepcopy(data)
    inner: Any = out
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return out


@pytest.mark.parametrize(
    ("source", "data", "fault"),
    [
        ("tatqa", "{not json", "data.json: the file: Invalid JSON"),
        ("tatqa", "{}", "data.json: the file: Input should be a valid array"),
        ("tatqa", edited(TATQA, 1, "table", "uid"), r"data.json: \[1\].table.uid: Field required"),
        ("tatqa", edited(TATQA, 0, "questions", 2, "answer"), r"\[0\].questions\[2\].answer: Field required"),
        ("tatqa", edited(TATQA, 0, "table", "table", value="x"), r"\[0\].table.table: Input should be a valid array"),
        ("finqa", edited(FINQA, 3, "qa", "program"), r"\[3\].qa.program: Field required"),
        ("finqa", edited(FINQA, 3, "filename", value="x.pdf"), r"\[3\].filename: String should match"),
        ("finqa", TATQA, r"\[0\].id: Field required"),
        ("tatqa", [], "too few questions"),
        ("tatqa", TATQA[1:], "too few questions"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_key(tmp_path: Path, source: str, data: object, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as refusal:
        world_of(tmp_path, source, data)
    assert "data.json" in str(refusal.value)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"world.path: .*none.json: No such file"):
        FinanceWorld(FinanceConfig(source="tatqa", path=tmp_path / "none.json"))


@pytest.fixture(scope="module")
def dev() -> FinanceWorld:
    if not TATQA_DEV.is_file():
        pytest.skip("TAT-QA's development split is not beside this checkout")
    return FinanceWorld(FinanceConfig(source="tatqa", path=TATQA_DEV, num_train_tasks=1000, num_eval_tasks=200))


def test_tatqas_development_split_gives_278_documents_and_hundreds_of_tasks(dev: FinanceWorld) -> None:
    assert len(dev.texts) == 278
    assert len(dev.tasks("train")) > 200 and len(dev.tasks("eval")) > 50
    assert set(Counter(t.item["kind"] for t in all_tasks(dev))) == {"arithmetic", "span", "count"}
    paths = [{t.item["paths"][0] for t in dev.tasks(split)} for split in ("train", "eval")]
    assert paths[0].isdisjoint(paths[1])


async def test_every_tatqa_task_is_solved_by_its_expert_and_not_by_junk(dev: FinanceWorld) -> None:
    build_grader(NUMERIC, PenaltiesConfig(), tasks=all_tasks(dev))
    num_shown = num_computed = 0
    for task in all_tasks(dev):
        script = dev.expert_episode(task, 0)
        assert num_calls(script) <= 10
        episode = await replay(dev, task, script)
        assert (await GRADER.grade(task, episode)).reward == 1.0, task
        results = [r for t in episode.turns for r in t.results]
        assert all(r.error is None for r in results)
        num_shown += any(task.item["paths"][0] in r.output for r in results if r.name == "search")
        if task.item["expression"]:
            num_computed += 1
            assert task.item["answer"].startswith(calculate(task.item["expression"]))
        gold = task.item["answer"]
        for junk in (
            "",
            "I don't know.",
            dev.texts[task.item["paths"][0]],
            f"-{gold}".replace("--", ""),
            f"9{gold.lstrip('-')}",
        ):
            assert await score(task, junk) == 0.0, (task, junk[:80])
    assert num_shown == len(all_tasks(dev))
    assert num_computed > 150


def test_finqas_programs_are_executed_with_the_rows_of_their_table() -> None:
    assert execute("table_sum(harbour dues, none)", {"harbour dues": [Decimal(1250), Decimal(1000)]}) == 2250
