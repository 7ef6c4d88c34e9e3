"""The finance world: corpus, tools, tasks and expert episodes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from envs.arithmetic import calculate, format_number
from envs.errors import ToolError, UserError
from envs.finance.brief.reports import TABLE_METRICS, Corpus, generate_corpus
from envs.finance.config import FinanceConfig
from envs.finance.expert import MAX_CALLS
from envs.finance.world import FinanceWorld, task_row
from envs.types import ToolErrorKind
from graders.build import build_grader
from graders.penalties import PenaltiesConfig
from tests.support.finance_play import GRADER, NUMERIC, all_tasks, num_calls, replay, score, use
from trainer.tasks.expert import parts_of

ALL_KINDS = {"value": 1.0, "change": 1.0, "percentage": 1.0, "comparison": 1.0}


@pytest.fixture(scope="module")
def world() -> FinanceWorld:
    return FinanceWorld(FinanceConfig())


@pytest.fixture(scope="module")
def corpus(world: FinanceWorld) -> Corpus:
    return generate_corpus(world.config)


@pytest.mark.parametrize("split", ["train", "eval"])
async def test_the_grader_proves_every_gold_answer_and_rejects_junk(world: FinanceWorld, split: str) -> None:
    tasks = world.tasks(split)
    build_grader(NUMERIC, PenaltiesConfig(), tasks=tasks)
    for task in tasks:
        gold = task.item["answer"]
        assert await score(task, gold) == 1.0, task
        question = task.messages[-1].content
        everything = " ".join(world.texts[path] for path in task.item["paths"])
        wrong_unit = gold.replace("million", "billion").replace("thousand", "million")
        junk = ["", "I don't know.", question, everything, f"9{gold.lstrip('-')}", f"-{gold}"]
        junk += [wrong_unit] if wrong_unit != gold else []
        for answer in junk:
            # `--7` is no number of either sign, and the gold of a question is never 0.
            assert await score(task, answer.replace("--", "")) == 0.0, (task, answer)


@pytest.mark.parametrize("with_calculate", [True, False])
async def test_expert_episodes_find_their_facts_and_end_with_the_right_answer(with_calculate: bool) -> None:
    world = FinanceWorld(FinanceConfig(calculate=with_calculate, question_mix=ALL_KINDS))
    for seed, task in itertools.product((0, 1), all_tasks(world)):
        episode = await replay(world, task, world.expert_episode(task, seed))
        assert (await GRADER.grade(task, episode)).reward == 1.0
        results = [r for t in episode.turns for r in t.results]
        assert all(r.error is None for r in results)
        read = [r.output for r in results if r.name == "cat"]
        assert {world.texts[path] for path in task.item["paths"]} <= set(read)
        for path, fact in zip(itertools.cycle(task.item["paths"]), task.item["facts"], strict=False):
            assert fact in world.texts[path].replace("\n", " ").split()
        computed = [r.output for r in results if r.name == "calculate"]
        if computed:
            assert task.item["answer"].startswith(computed[-1])
        assert bool(computed) == (with_calculate and task.item["kind"] != "value")


async def test_nearly_every_path_that_the_expert_reads_was_found_by_its_searches_or_listings() -> None:
    """The expert knows the paths; a policy that imitates it must be able to see them."""
    world = FinanceWorld(FinanceConfig(question_mix=ALL_KINDS, detour_calls=0))
    seen = 0
    for task in all_tasks(world):
        episode = await replay(world, task, world.expert_episode(task, 0))
        hits = "\n".join(r.output for t in episode.turns for r in t.results if r.name == "search").split("\n")
        seen += set(task.item["paths"]) <= set(hits)
    assert seen / len(all_tasks(world)) == 1.0


def test_expert_episodes_are_a_pure_function_of_task_and_seed(world: FinanceWorld) -> None:
    again = FinanceWorld(FinanceConfig())
    task = world.tasks("train")[0]
    assert [world.expert_episode(task, s) for s in range(20)] == [again.expert_episode(task, s) for s in range(20)]
    assert len({str(world.expert_episode(task, s)) for s in range(20)}) > 5


def test_without_detours_the_expert_takes_two_calls_for_each_report_and_one_for_the_sum() -> None:
    world = FinanceWorld(FinanceConfig(question_mix=ALL_KINDS, detour_calls=0))
    calls = {t.item["kind"]: num_calls(world.expert_episode(t, 0)) for t in all_tasks(world)}
    assert calls == {"value": 2, "change": 3, "percentage": 3, "comparison": 5}


def test_detours_add_about_their_mean_and_never_pass_the_cap(world: FinanceWorld) -> None:
    values = [t for t in world.tasks("train") if t.item["kind"] == "value"]
    counts = [num_calls(world.expert_episode(t, s)) for t in values for s in range(5)]
    assert sum(counts) / len(counts) == pytest.approx(2 + world.config.detour_calls, abs=0.2)
    most = FinanceWorld(FinanceConfig(question_mix=ALL_KINDS, detour_calls=6))
    assert max(num_calls(most.expert_episode(t, 0)) for t in all_tasks(most)) == MAX_CALLS


def test_every_kind_of_detour_occurs(world: FinanceWorld) -> None:
    scripts = [world.expert_episode(t, s) for t in world.tasks("train") for s in range(3)]
    names = Counter(name for script in scripts for turn in script if not isinstance(turn, str) for name, _ in turn)
    assert set(names) == {"search", "list", "cat", "calculate"}
    wrong = [
        arguments["path"]
        for t, script in zip(world.tasks("train"), scripts[::3], strict=True)
        for turn in script
        if not isinstance(turn, str)
        for name, arguments in turn
        if name == "cat" and arguments["path"] not in t.item["paths"]
    ]
    assert len(wrong) > 20


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(world: FinanceWorld) -> None:
    again = FinanceWorld(FinanceConfig())
    assert json.dumps(dict(world.texts)).encode() == json.dumps(dict(again.texts)).encode()
    for split in ("train", "eval"):
        assert world.tasks(split) == again.tasks(split)
    other = FinanceWorld(FinanceConfig(seed=1))
    assert not set(world.texts.values()) & set(other.texts.values())


def test_a_company_keeps_its_figures_when_the_corpus_grows() -> None:
    small, large = (generate_corpus(FinanceConfig(num_companies=n)) for n in (20, 40))
    assert len(small.reports) < len(large.reports)
    assert all(large.reports[path].text() == report.text() for path, report in small.reports.items())


def test_no_company_nor_its_sister_is_asked_about_in_both_splits(world: FinanceWorld, corpus: Corpus) -> None:
    family = {c.name: c.family for c in corpus.companies}
    families = {
        split: {family[name] for task in world.tasks(split) for name in task.item["companies"]}
        for split in ("train", "eval")
    }
    assert families["train"]
    assert families["eval"]
    assert not families["train"] & families["eval"]


def test_tasks_are_all_different_and_of_the_configured_number_and_mix(world: FinanceWorld) -> None:
    tasks = all_tasks(world)
    assert len({t.task_id for t in tasks}) == len({t.messages[-1].content for t in tasks}) == len(tasks)
    assert (len(world.tasks("train")), len(world.tasks("eval"))) == (256, 64)
    kinds = Counter(t.item["kind"] for t in world.tasks("train"))
    assert kinds == {"value": 179, "change": 26, "percentage": 26, "comparison": 25}


def test_the_corpus_holds_distractors_of_every_kind(world: FinanceWorld, corpus: Corpus) -> None:
    companies, reports = corpus.companies, corpus.reports
    sisters = [c for c in companies if c.name != c.family]
    assert len(sisters) > 10
    assert all(c.family in {x.name for x in companies} for c in sisters)
    assert len({c.name for c in companies}) == len(companies) == 60
    assert min(Counter(c.unit for c in companies).values()) > 10
    restated = [r for r in reports.values() if r.restated]
    assert len(restated) > 20
    for report in restated:
        assert report.restated is not None
        first_reported = corpus.report(report.company, report.year - 1)
        for metric in TABLE_METRICS:
            differs = report.figures[metric][1] != first_reported.figures[metric][0]
            assert differs == (metric == report.restated)
        assert f"The {report.year - 1} {report.restated} is restated." in report.text()


def test_amounts_are_short_plausible_and_never_look_like_a_year(world: FinanceWorld, corpus: Corpus) -> None:
    for report in corpus.reports.values():
        for amount in itertools.chain(*report.figures.values()):
            assert len(str(amount).replace(".", "")) <= 4
            assert not 1900 <= amount < 2100
        for revenue, profit in zip(report.figures["revenue"], report.figures["profit"], strict=True):
            assert 0 < profit < revenue


def test_comparisons_may_need_a_conversion_of_units(world: FinanceWorld) -> None:
    comparisons = [t for t in all_tasks(world) if t.item["kind"] == "comparison"]
    mixed = [t for t in comparisons if "/ 1000" in t.item["program"]]
    assert 0 < len(mixed) < len(comparisons)
    for task in mixed:
        high, low = (Decimal(f) for f in task.item["facts"])
        assert task.item["answer"] == f"{format_number(high - low / 1000)} million"
        assert "millions of dollars" in world.texts[task.item["paths"][0]]
        assert "thousands of dollars" in world.texts[task.item["paths"][1]]


def test_2800_reports_are_a_matter_of_parameters() -> None:
    world = FinanceWorld(FinanceConfig(num_companies=400, num_years=7, num_train_tasks=1000, num_eval_tasks=100))
    assert len(world.texts) == len(set(world.texts.values())) == 2800
    assert (len(world.tasks("train")), len(world.tasks("eval"))) == (1000, 100)
    assert max(map(len, world.texts.values())) < 300


def test_the_largest_corpus_that_the_config_allows_has_names_enough() -> None:
    corpus = generate_corpus(FinanceConfig(num_companies=1000, num_years=2, sister_share=0))
    assert len({c.folder for c in corpus.companies}) == 1000


def test_prompts_tools_and_reports_are_short_enough_for_a_small_model(world: FinanceWorld) -> None:
    assert max(len(t) for t in world.texts.values()) < 300
    assert max(sum(len(m.content) for m in t.messages) for t in all_tasks(world)) < 330
    assert sum(len(t.description) for t in world.tools.values()) < 100


async def test_the_obvious_query_usually_finds_the_report_first_and_a_vague_one_often_does_not(
    world: FinanceWorld,
    corpus: Corpus,
) -> None:
    reports = list(corpus.reports.values())
    full, vague = 0, 0
    for report in reports:
        name = report.company.name
        full += (await use(world, "search", query=f"{name} {report.year} revenue")).output.startswith(report.path)
        vague += (await use(world, "search", query=f"{name} revenue")).output.startswith(report.path)
    assert 0.85 < full / len(reports) < 1
    assert vague / len(reports) < 0.5


async def test_search_gives_the_configured_number_of_paths_and_says_when_nothing_fits(world: FinanceWorld) -> None:
    assert (await use(world, "search", query="2014 debt")).output.count(".txt") == 3
    assert (await use(world, "search", query="2014 debt")).output == (
        await use(world, "search", query="DEBT, 2014!")
    ).output
    for query in ("", "?!", "xyzzy"):
        assert (await use(world, "search", query=query)).output == "no report found"
    many = FinanceWorld(FinanceConfig(search_hits=10))
    assert len((await use(many, "search", query="2014")).output.split("\n")) == 10


async def test_listing_shows_folders_and_files_and_a_cut_list_says_so(world: FinanceWorld, corpus: Corpus) -> None:
    company = corpus.companies[0].folder
    for path in (company, f"/{company}/", f" {company} "):
        assert (await use(world, "list", path=path)).output == "2012.txt 2013.txt 2014.txt 2015.txt"
    for path in ("", "/", "."):
        top = (await use(world, "list", path=path)).output
        assert top.endswith(" and 40 more")
        assert len(top.split()) == 23


async def test_reading_needs_the_exact_path(world: FinanceWorld) -> None:
    path, text = next(iter(world.texts.items()))
    assert (await use(world, "cat", path=path)).output == text
    assert (await use(world, "cat", path=f"/{path}")).output == text
    for wrong in (path.split("/")[0], path.upper(), f"../{path}", "/etc/passwd", "", "x" * 5000):
        for name in ("cat", "list"):
            if (wrong == path.split("/")[0] and name == "list") or (wrong == "" and name == "list"):
                continue
            result = await use(world, name, path=wrong)
            assert result.error is ToolErrorKind.REFUSED
            assert len(result.output) < 100


async def test_the_calculate_tool_can_be_left_out() -> None:
    without = FinanceWorld(FinanceConfig(calculate=False))
    assert list(without.make_env().tools) == ["search", "list", "cat"]
    assert (await use(without, "calculate", expression="1+1")).error is ToolErrorKind.UNKNOWN_TOOL


async def test_an_environment_serves_one_episode_only(world: FinanceWorld) -> None:
    env, task = world.make_env(), world.tasks("train")[0]
    await env.open(task, "r1")
    with pytest.raises(AssertionError, match="opened again"):
        await env.open(task, "r2")
    await env.close(None)


async def test_calls_made_at_the_same_time_answer_as_calls_made_one_by_one(world: FinanceWorld) -> None:
    paths = list(world.texts)[:50]
    together = await asyncio.gather(*(use(world, "cat", path=path) for path in paths))
    assert [r.output for r in together] == [world.texts[path] for path in paths]


def test_a_task_becomes_a_row_of_the_hosted_format(world: FinanceWorld) -> None:
    task = world.tasks("eval")[0]
    row = json.loads(json.dumps(task_row(task, world.tools)))
    assert [m["role"] for m in row["messages"]] == ["system", "user"]
    assert [t["function"]["name"] for t in row["tools"]] == ["search", "list", "cat", "calculate"]
    assert {key: row[key] for key in row if key not in ("messages", "tools", "task_id")} == dict(task.item)
    assert row["task_id"] == task.task_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_company": 9}, "Extra inputs"),
        ({"num_companies": 1}, "greater than or equal to 8"),
        ({"question_mix": {"valu": 1}}, "'value', 'change', 'percentage', 'comparison'"),
        ({"question_mix": {"value": 0}}, "at least one of them above 0"),
        ({"question_mix": {}}, "at least one of them above 0"),
        ({"question_mix": {"value": -1, "change": 2}}, "must not be negative"),
        ({"question_mix": {"value": float("inf")}}, "finite"),
        ({"question_mix": {"value": float("nan")}}, "finite"),
        ({"detour_calls": 7}, "less than or equal to 6"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused_with_the_reason(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinanceConfig.model_validate(settings)


def test_a_corpus_too_small_for_its_tasks_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"eval split needs \d+ questions of kind 'change'.*raise num_companies"):
        FinanceWorld(FinanceConfig(num_companies=8, num_train_tasks=9, num_eval_tasks=60, question_mix={"change": 1}))


@pytest.mark.parametrize("num_companies", [8, 9, 13, 60])
@pytest.mark.parametrize("share", [0.01, 0.99])
def test_either_split_has_companies_whatever_the_shares(num_companies: int, share: float) -> None:
    for sister_share in (0.0, 1.0):
        config = FinanceConfig(num_companies=num_companies, eval_share=share, sister_share=sister_share)
        corpus = generate_corpus(config)
        assert len(corpus.companies) == num_companies
        assert {corpus.split_of(c) for c in corpus.companies} == {"train", "eval"}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("412.5 - 398.1", "14.4"),
        ("1,234,567 + 1", "1234568"),
        ("(1,200 - 1,000) / 1,000 * 100", "20"),
        ("0.1 + 0.2", "0.3"),
        ("2 / 3", "0.6667"),
        ("-(3 - 5) * +2", "4"),
        ("14.4 / 398.1 * 100", "3.62"),
        (" 7 ", "7"),
        ("1 - 1.0", "0"),
        ("-0.0", "0"),
        ("1/300000", "0.000003333"),
        ("5 - 5.00000000000001", "0"),
        ("100 * 10", "1000"),
    ],
)
def test_calculate_computes_in_exact_decimals(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "()", "1 +", "1 2", "(1", "1)", "1,2", "1,23,456", "..", "1..2", "+", "012", "1(2)", "(1)(2)"),
        *("2 ** 9", "9**9**9**9", "7 // 2", "7 % 2", "1e5", "9e999", "0x10", "1_000", "1j", "True", "None", "'a'", "x"),
        *("__import__('os').system('id')", "().__class__", "[1]", "{1}", "1 if 1 else 2", "lambda: 1", "1 < 2", "~1"),
        *(
            "1; 2",
            "1\n+1",
            "\0",
            "1 and 2",
            "print(1)",
            "٣ + 1",
            "1 / 0",
            "1 / (2 - 2)",
            "0 / 0",
            "1" * 16,
            "9*" * 90 + "9",
        ),
        *("(" * 99 + "1" + ")" * 99 + "+1+", "-" * 199 + "x", "1" * 201, "9" * 199),
    ],
)
def test_calculate_refuses_all_that_is_not_small_plain_arithmetic(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


@given(text=st.text(alphabet="0123456789.,+-*/() ", max_size=220))
def test_calculate_answers_or_refuses_whatever_it_is_given(text: str) -> None:
    try:
        value = calculate(text)
    except ToolError:
        return
    assert abs(Decimal(value)) < 10**15
    assert len(value) < 32


@given(a=st.decimals(-(10**6), 10**6, places=2), b=st.decimals(-(10**6), 10**6, places=2))
def test_calculate_agrees_with_decimal_arithmetic(a: Decimal, b: Decimal) -> None:
    assert Decimal(calculate(f"({a}) - ({b})")) == a - b
    assert abs(Decimal(calculate(f"({a}) * ({b})")) - a * b) <= Decimal("0.005")


async def test_an_expert_that_thinks_acts_as_one_that_does_not() -> None:
    """Reasoning stands before the same acts, names what is looked for, and grows with its detours."""
    settings = {"detour_calls": 0.0, "question_mix": ALL_KINDS}
    lengths = []
    for detours in (0.0, 3.0):
        thinking, silent = (
            FinanceWorld(FinanceConfig.model_validate(settings | {"detour_thoughts": thoughts}))
            for thoughts in (detours, None)
        )
        tasks = thinking.tasks("eval")[:30]
        scripts = [thinking.expert_episode(task, 5) for task in tasks]
        assert [[parts_of(turn)[1] for turn in script] for script in scripts] == [
            list(silent.expert_episode(task, 5)) for task in tasks
        ]
        assert all(parts_of(turn)[0] for script in scripts for turn in script)
        episode = await replay(thinking, tasks[0], scripts[0])
        assert (await GRADER.grade(tasks[0], episode)).reward == 1.0
        assert tasks[0].item["metric"] in " ".join(turn.message.reasoning for turn in episode.turns)
        lengths.append(sum(len(parts_of(turn)[0]) for script in scripts for turn in script))
    assert lengths[1] > 2 * lengths[0]
