"""The finance world at full size: the shipped config's corpus, tasks and expert episodes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from decimal import Decimal

import pytest
import yaml

from envs.arithmetic import calculate
from envs.errors import UserError
from envs.finance.config import KINDS, FinanceConfig
from envs.finance.full.books import RESTATABLE
from envs.finance.full.corpus import FullCorpus, generate_full
from envs.finance.full.facts import OpenReport
from envs.finance.full.questions import YES_NO_RULE
from envs.finance.full.tables import rows_of
from envs.finance.full.tasks import gold_text
from envs.finance.program import execute, expression, parse, read_number
from envs.finance.world import FinanceWorld
from envs.types import Task, ToolErrorKind
from graders.build import build_grader
from graders.penalties import PenaltiesConfig
from graders.rules.exact import ExactConfig
from tests.support import ROOT
from tests.support.finance_play import GRADER, NUMERIC, all_tasks, num_calls, replay, score, use

SHIPPED = yaml.safe_load((ROOT / "configs" / "finance.yaml").read_text())
MOST_CALLS = 10


def small(**settings: object) -> FinanceConfig:
    """A full corpus of a few companies."""
    few = {"style": "full", "num_companies": 24, "num_train_tasks": 60, "num_eval_tasks": 20}
    return FinanceConfig.model_validate({**few, **settings})


@pytest.fixture(scope="module")
def shipped() -> FinanceWorld:
    """The shipped world, but for its search mode: embeddings would have to be computed first."""
    return FinanceWorld(FinanceConfig.model_validate({**SHIPPED["world"], "search_mode": "lexical"}))


@pytest.fixture(scope="module")
def corpus(shipped: FinanceWorld) -> FullCorpus:
    return generate_full(shipped.config)


def result_of(task: Task) -> Decimal | bool:
    rows = {label: [Decimal(n) for n in numbers] for label, numbers in task.item["rows"].items()}
    return execute(task.item["program"], rows)


def test_the_shipped_corpus_has_2800_reports_of_several_hundred_companies_from_1999_to_2019(corpus: FullCorpus) -> None:
    assert (len(corpus.companies), len(corpus.reports)) == (400, 2800)
    years = {report.year for report in corpus.reports.values()}
    assert years == set(range(1999, 2020))
    assert all(re.fullmatch(r"[a-z-]+/[0-9]{4}/annual-report\.txt", path) for path in corpus.reports)
    assert len(set(corpus.texts.values())) == len(corpus.texts)


def test_the_corpus_holds_distractors_of_every_kind(corpus: FullCorpus) -> None:
    names = Counter(path.rpartition("/")[2] for path in corpus.texts)
    assert names["annual-report.txt"] == 2800
    assert 400 < names["press-release.txt"] < 720
    assert 400 < names["draft-annual-report.txt"] < 720
    assert sum(c.name != c.family for c in corpus.companies) > 80
    assert min(Counter(c.unit for c in corpus.companies).values()) > 80
    restated = [r for r in corpus.reports.values() if r.restated]
    assert len(restated) > 500
    for report in restated[:50]:
        first_reported = corpus.reports[f"{report.company.folder}/{report.year - 1}/annual-report.txt"]
        for label in RESTATABLE:
            differs = report.books[report.year - 1][label] != first_reported.books[report.year - 1][label]
            assert differs == (label == report.restated)
        assert (
            f"{report.restated} of {report.year - 1}, and all amounts that depend on it, are restated" in report.text()
        )


def test_a_drafts_figures_are_not_those_of_the_report(corpus: FullCorpus) -> None:
    drafts = [path for path in corpus.texts if "draft-" in path][:40]
    for path in drafts:
        draft, report = corpus.texts[path], corpus.texts[path.replace("draft-", "")]
        assert draft.startswith("DRAFT, not for publication")
        revenue = [re.search(r"^Revenue \| ([0-9.,]+) ", text, re.MULTILINE) for text in (draft, report)]
        assert revenue[0] is not None and revenue[1] is not None
        assert revenue[0][1] != revenue[1][1]


def test_statements_add_up(corpus: FullCorpus) -> None:
    for report in itertools.islice(corpus.reports.values(), 0, None, 40):
        opened = OpenReport(report)
        for column in (0, 1):

            def at(label: str, opened: OpenReport = opened, column: int = column) -> Decimal:
                return opened.fact(label, column).number

            assert at("Gross profit") == at("Revenue") - at("Cost of revenue")
            assert at("Operating income") == at("Gross profit") - at("Total operating expenses")
            assert at("Net income") == at("Income before income taxes") - at("Income tax expense")
            assert at("Total assets") == at("Total liabilities") + at("Total shareholders' equity")
            cash = ("operating", "investing", "financing")
            assert at("Net change in cash") == sum(at(f"Net cash from {x} activities") for x in cash)
        for section in opened.sections:
            for table in section.tables:
                if table.heading.startswith(("Revenue by", "Debt")):
                    columns = zip(*([read_number(c) or 0 for c in row.cells] for row in table.rows), strict=True)
                    assert all(sum(column[:-1]) == column[-1] for column in columns)


def test_a_restated_year_adds_up_too_and_the_same_label_never_shows_two_figures(corpus: FullCorpus) -> None:
    for report in itertools.islice((r for r in corpus.reports.values() if r.restated), 60):
        shown: dict[str, tuple[str, ...]] = {}
        for _, _, row in rows_of(report.sections()):
            cells = shown.setdefault(row.label, row.cells[:2])
            assert cells == row.cells[:2], (report.path, row.label)


def test_documents_are_of_realistic_length_and_long_ones_have_pages(corpus: FullCorpus, shipped: FinanceWorld) -> None:
    lengths = sorted(len(text) for text in corpus.texts.values())
    assert lengths[0] < 1500 < 8000 < lengths[len(lengths) // 2] < lengths[-1] < 20_000
    pages = Counter(len(shipped._documents.pages(path)) for path in itertools.islice(corpus.reports, 0, None, 20))
    assert set(pages) <= {2, 3, 4}
    assert pages[3] > 20


def test_the_corpus_is_a_pure_function_of_the_seed_and_a_company_keeps_its_figures_when_it_grows() -> None:
    first, again, other = (generate_full(small(seed=seed)) for seed in (0, 0, 1))
    assert list(first.texts.items()) == list(again.texts.items())
    assert not set(first.texts.values()) & set(other.texts.values())
    larger = generate_full(small(num_companies=30))
    assert all(larger.texts[path] == text for path, text in first.texts.items())


def test_tasks_are_all_different_and_of_every_kind(shipped: FinanceWorld) -> None:
    tasks = all_tasks(shipped)
    assert (len(shipped.tasks("train")), len(shipped.tasks("eval"))) == (1000, 100)
    assert len({t.task_id for t in tasks}) == len({t.messages[-1].content for t in tasks}) == len(tasks)
    for split, least in (("train", 58), ("eval", 5)):
        kinds = Counter(t.item["kind"] for t in shipped.tasks(split))
        assert set(kinds) == set(KINDS["full"])
        assert min(kinds.values()) >= least


def test_no_company_nor_its_sister_of_an_eval_task_stands_in_a_training_tasks_paths(
    shipped: FinanceWorld, corpus: FullCorpus
) -> None:
    family = {c.folder: c.family for c in corpus.companies}
    families = {
        split: {family[path.partition("/")[0]] for task in shipped.tasks(split) for path in task.item["paths"]}
        for split in ("train", "eval")
    }
    assert len(families["train"]) > 100 and len(families["eval"]) > 10
    assert not families["train"] & families["eval"]


def test_gold_programs_have_one_to_four_steps_use_every_operation_and_give_the_gold_answers(
    shipped: FinanceWorld,
) -> None:
    ops: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for task in all_tasks(shipped):
        steps = parse(task.item["program"])
        ops.update(step.op for step in steps)
        lengths[len(steps)] += 1
        assert gold_text(result_of(task), task.item["unit"]) == task.item["answer"]
        computed = task.item["expression"]
        if computed:
            number = task.item["answer"].replace("$", "").partition(" ")[0].rstrip("%")
            assert calculate(computed) == number, task
        else:
            assert steps[-1].op in ("greater", "table_max", "table_min")
    assert set(lengths) == {1, 2, 3, 4}
    assert set(ops) == {
        *("add", "subtract", "multiply", "divide", "exp", "greater"),
        *("table_max", "table_min", "table_sum", "table_average"),
    }


def test_facts_stand_in_the_documents_that_the_task_names_and_in_its_program(shipped: FinanceWorld) -> None:
    for task in all_tasks(shipped):
        for path, line in task.item["evidence"]:
            assert path in task.item["paths"]
            assert f"\n{line}\n" in f"{shipped.texts[path]}\n"
        assert {path for path, _ in task.item["evidence"]} == set(task.item["paths"])
        lines = " ".join(line for _, line in task.item["evidence"])
        for fact in task.item["facts"]:
            assert fact in lines
            # A row that a table operation reads is named, not spelled out.
            assert task.item["rows"] or f"{read_number(fact):f}" in task.item["program"]


async def test_every_expert_episode_is_right_within_ten_calls_and_reads_only_what_it_was_shown(
    shipped: FinanceWorld,
) -> None:
    num_shown = 0
    for task in all_tasks(shipped):
        script = shipped.expert_episode(task, 0)
        assert num_calls(script) <= MOST_CALLS
        episode = await replay(shipped, task, script)
        assert (await GRADER.grade(task, episode)).reward == 1.0, task
        results = [r for t in episode.turns for r in t.results]
        assert all(r.error is None for r in results)
        read = "\n".join(r.output for r in results if r.name == "cat")
        assert all(line in read for _, line in task.item["evidence"])
        found = "\n".join(r.output for r in results if r.name == "search")
        num_shown += all(path in found for path in task.item["paths"])
        computed = [r.output for r in results if r.name == "calculate"]
        assert bool(computed) == bool(task.item["expression"])
    assert num_shown / len(all_tasks(shipped)) > 0.98


async def test_junk_is_graded_0_on_every_task(shipped: FinanceWorld) -> None:
    build_grader(NUMERIC, PenaltiesConfig(), tasks=all_tasks(shipped))
    for i, task in enumerate(all_tasks(shipped)):
        gold = task.item["answer"]
        assert await score(task, gold) == 1.0
        text = shipped.texts[task.item["paths"][0]]
        # The hundreds of numbers of a whole report take most of the test's time.
        junk = ["", "I don't know.", task.messages[-1].content, "yes", "no", f"9{gold.lstrip('-$')}"]
        junk += [text, text[:4000]] if i % 20 == 0 else []
        if task.item["kind"] == "greater":
            junk.append({"0": "1", "1": "0"}[gold])
        else:
            junk += ["0", f"-{gold}".replace("--", "")]
        wrong_unit = gold.replace("million", "billion").replace("thousand", "million")
        junk += [wrong_unit] if wrong_unit != gold else []
        for answer in junk:
            assert await score(task, answer) == 0.0, (task, answer[:80])


async def test_the_exact_grader_takes_the_answers_to_questions_of_yes_or_no_too(shipped: FinanceWorld) -> None:
    grader = build_grader(ExactConfig(type="exact"), PenaltiesConfig())
    tasks = [t for t in all_tasks(shipped) if t.item["kind"] == "greater"]
    for task in tasks:
        assert YES_NO_RULE in task.messages[-1].content
        assert (await grader.grade(task, await replay(shipped, task, ["1"]))).reward == (task.item["answer"] == "1")
    assert 0.3 < sum(t.item["answer"] == "1" for t in tasks) / len(tasks) < 0.7


def test_questions_mix_units_restated_years_and_two_reports(shipped: FinanceWorld) -> None:
    tasks = all_tasks(shipped)
    assert Counter(t.item["unit"] for t in tasks).keys() == {"million", "thousand", "percent", "dollars", ""}
    assert sum("const_1000" in t.item["program"] for t in tasks) > 50
    assert sum(len(t.item["paths"]) == 2 for t in tasks) > 100
    assert sum(len(t.item["evidence"]) > len(t.item["paths"]) for t in tasks) > 100


def test_expert_episodes_are_a_pure_function_of_task_and_seed(shipped: FinanceWorld) -> None:
    task = shipped.tasks("train")[0]
    assert shipped.expert_episode(task, 3) == shipped.expert_episode(task, 3)
    assert len({str(shipped.expert_episode(task, s)) for s in range(20)}) > 5


async def test_listings_and_documents_are_read_page_by_page(shipped: FinanceWorld) -> None:
    top = (await use(shipped, "list", path="/")).output
    assert top.endswith("(page 1 of 8)")
    pages = [(await use(shipped, "list", path="/", page=n)).output.partition("\n")[0].split() for n in range(1, 9)]
    assert sorted(itertools.chain(*pages)) == sorted({path.partition("/")[0] for path in shipped.texts})
    path = next(path for path in shipped.texts if path.endswith("/annual-report.txt"))
    folder, year, name = path.split("/")
    assert year in (await use(shipped, "list", path=folder)).output.split()
    assert name in (await use(shipped, "list", path=f"{folder}/{year}/")).output.split()
    first = (await use(shipped, "cat", path=path)).output
    num_pages = int(first.rpartition(" of ")[2].rstrip(")"))
    assert first == (await use(shipped, "cat", path=path, page=1)).output
    read = [(await use(shipped, "cat", path=path, page=n)).output for n in range(1, num_pages + 1)]
    assert all(len(page) <= shipped.config.page_chars + 20 for page in read)
    assert "\n".join(page.rpartition("\n")[0] for page in read).split() == shipped.texts[path].split()
    for arguments in ({"page": 0}, {"page": num_pages + 1}):
        refused = await use(shipped, "cat", path=path, **arguments)
        assert refused.error is ToolErrorKind.REFUSED
        assert f"only 1 to {num_pages}" in refused.output
    assert (await use(shipped, "list", path="/", page=9)).error is ToolErrorKind.REFUSED


@pytest.mark.parametrize("shows", ["snippets", "document"])
async def test_search_shows_the_page_and_the_line_that_fit(shipped: FinanceWorld, shows: str) -> None:
    world = FinanceWorld(small(search_shows=shows, search_hits=2 if shows == "snippets" else 3))
    path = next(path for path in world.texts if path.endswith("/annual-report.txt"))
    folder, year, _ = path.split("/")
    found = (await use(world, "search", query=f"{folder} {year} capital expenditures")).output
    line = next(line for line in world.texts[path].split("\n") if line.startswith("Capital expenditures | "))
    number, total = world._documents.page_with(path, line), len(world._documents.pages(path))
    if shows == "snippets":
        assert len(found.split("\n")) == 2
        assert f"{path} (page {number} of {total}): {line}" in found
    else:
        assert found == f"{path} (page {number} of {total})\n{world._documents.pages(path)[number - 1]}"
    assert (await use(world, "search", query="xyzzy")).output == "no report found"


def test_a_corpus_too_small_for_its_tasks_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"train split needs 900 questions of kind 'product'.*raise num_companies"):
        FinanceWorld(small(num_companies=8, num_train_tasks=900, question_mix={"product": 1}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "full", "question_mix": {"value": 1}}, "style 'full' has no kind 'value'"),
        ({"question_mix": {"share": 1}}, "style 'brief' has no kind 'share'"),
        ({"last_year": 2019}, "last_year: has no effect"),
        ({"distractor_share": 0.5}, "distractor_share: has no effect"),
        ({"page_chars": 900}, "page_chars: has no effect"),
        ({"search_shows": "document", "search_hits": 2}, "search_hits: has no effect"),
        ({"style": "full", "last_year": 2012}, "last_year: 4 yearly reports from 2012 on do not end by then"),
        ({"path": "x.json"}, "path: the generated source reads no file"),
        ({"source": "tatqa"}, "path: source 'tatqa' needs the JSON file"),
        ({"source": "finqa", "path": "x", "num_companies": 9}, "num_companies: has no effect"),
        ({"source": "finqa", "path": "x", "question_mix": {"value": 1}}, "question_mix: has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinanceConfig.model_validate(settings)


@pytest.mark.parametrize("settings", [{}, SHIPPED["world"], {"source": "tatqa", "path": "x.json"}])
def test_a_resolved_config_loads_again(settings: dict[str, object]) -> None:
    config = FinanceConfig.model_validate(settings)
    assert FinanceConfig.model_validate(config.model_dump(mode="json")) == config


def test_expressions_stay_within_what_the_calculator_takes(shipped: FinanceWorld) -> None:
    assert max(len(t.item["expression"]) for t in all_tasks(shipped)) <= 200
    assert expression("add(1, 2)") == "1 + 2"
