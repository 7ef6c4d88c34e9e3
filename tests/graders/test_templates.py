"""Templates of graders: what they fill in, what they refuse, and that nothing filled in is read again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.types import Message, Task
from graders.hosted import templates
from graders.hosted.templates import MissingVariable, Template
from graders.types import GraderErrorKind

ITEM: dict[str, Any] = {
    "answer": "14.4 million",
    "n": 3,
    "share": 0.25,
    "none": None,
    "flag": True,
    "a": {"b": [{"c d": "deep", "it's": "quoted"}, "second"]},
    "ref-answer": "dashed",
    "größe": "Umlaut",
    "brace}}d": "odd",
}
SAMPLE: dict[str, Any] = {
    "output_text": "14.4",
    "output_json": None,
    "output_tools": [{"id": "c0", "function": {"name": "search", "arguments": '{"q": "x"}'}}],
}


def render(text: str, item: dict[str, Any] | None = None, **sample: Any) -> str:
    return Template(text, where="grader.input").render(ITEM if item is None else item, SAMPLE | sample)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("", ""),
        ("no variable {at} all", "no variable {at} all"),
        ("{{item.answer}}", "14.4 million"),
        ("{{  item.answer  }}", "14.4 million"),
        ("<{{ item.answer }}|{{ sample.output_text }}>", "<14.4 million|14.4>"),
        ("{{ item.n }} {{ item.share }} {{ item.none }} {{ item.flag }}", "3 0.25 null true"),
        ("{{ item.a.b[0]['c d'] }}", "deep"),
        ('{{ item["a"]["b"][0]["c d"] }}', "deep"),
        ('{{ item.a.b[0]["it\'s"] }}', "quoted"),
        ("{{ item.a.b[1] }} {{ item.a.b[-1] }}", "second second"),
        ("{{ item.ref-answer }} {{ item.größe }}", "dashed Umlaut"),
        ("{{ item['brace}}d'] }}", "odd"),
        ("{{ sample.output_tools[0].function.name }}", "search"),
        ("{{ sample.output_tools[0].function.arguments }}", '{"q": "x"}'),
        ('Answer as {"steps": {"n": 1}}', 'Answer as {"steps": {"n": 1}}'),
        ('{"given": {{ item.n }}}', '{"given": 3}'),
    ],
)
def test_a_template_is_filled_in(text, filled):
    assert render(text) == filled


def test_values_that_are_no_text_appear_as_json():
    assert json.loads(render("{{ item.a }}")) == ITEM["a"]
    assert render("{{ item.x }}", {"x": ["é", 1.0, False]}) == '["é", 1.0, false]'


@pytest.mark.parametrize(
    "text",
    [
        "{{ }}",
        "{{}}",
        "{{ item }}",
        "{{ sample }}",
        "{{ item. }}",
        "{{ item.1a }}",
        "{{ item[0] }}",
        "{{ item.answer",
        "{{ item.answer }",
        "{{ item.answer {{ item.n }}",
        "{{{{ item.answer }}}}",
        "{{ task.answer }}",
        "{{ items.answer }}",
        "{{ self.__class__ }}",
        "{{ 7 * 7 }}",
        "{{ item.n + 1 }}",
        "{{ item.answer | upper }}",
        "{{ item.answer.upper() }}",
        "{{ item['a' }}",
        "{{ item[a] }}",
        "{{ item.a b }}",
        "{{ 'item.answer' }}",
    ],
)
def test_what_is_no_path_is_refused_with_its_place_and_what_is_allowed(text):
    with pytest.raises(UserError, match=r"^grader\.input: .*\{\{ item\.KEY \}\} and \{\{ sample\.KEY \}\}"):
        Template(text, where="grader.input")


def test_an_unknown_key_of_the_sample_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"^grader\.input: sample\.output_txt does not exist; a sample has output_text,"
    ):
        Template("{{ sample.output_txt }}", where="grader.input")


@pytest.mark.parametrize(
    "text",
    [
        "item.missing",
        "item.a.missing",
        "item.a.b[2]",
        "item.a.b[-3]",
        "item.a[0]",
        "item.answer.x",
        "item.answer[0]",
        "item.a.b.c",
        "item.none.x",
        "sample.output_tools[1].function.name",
    ],
)
def test_a_path_that_leads_nowhere_is_missing_under_its_name(text):
    with pytest.raises(MissingVariable) as caught:
        render(f"{{{{ {text} }}}}")
    assert (caught.value.path, caught.value.kind) == (text, GraderErrorKind.INVALID_VARIABLE)


def test_json_of_an_answer_that_is_none_is_told_from_a_missing_key():
    for text in ("{{ sample.output_json }}", "{{ sample.output_json.value }}"):
        with pytest.raises(MissingVariable) as caught:
            render(text)
        assert caught.value.kind is GraderErrorKind.SAMPLE_PARSE
    with pytest.raises(MissingVariable) as caught:
        render("{{ sample.output_json.value }}", output_json={"other": 1})
    assert caught.value.kind is GraderErrorKind.INVALID_VARIABLE
    assert render("{{ sample.output_json.value }}", output_json={"value": 1}) == "1"


@given(st.sampled_from(["{{ item.answer }}", "{{ sample.output_text }}", "{{", "}}", "x"]) | st.text())
def test_what_is_filled_in_is_never_expanded(answer):
    shown = answer.encode("utf-8", "replace").decode()
    assert render("[{{ sample.output_text }}]", output_text=answer) == f"[{shown}]"


def test_a_model_can_not_ask_for_the_gold_answer():
    answer = "{{ item.answer }}"
    assert render("{{ sample.output_text }} / {{ item.n }}", output_text=answer) == "{{ item.answer }} / 3"


def test_lone_surrogates_do_not_reach_a_server():
    assert render("{{ item.x }}", {"x": "a\ud800b"}).encode() == b"a?b"


def test_a_task_without_the_variable_is_named_with_its_keys():
    task = Task(task_id="row-7", messages=(Message(role="user", content="?"),), item=ITEM)
    Template("{{ item.a.b[0]['c d'] }} {{ sample.output_json.x }}", where="grader.input").check(task)
    with pytest.raises(
        UserError, match=r"^grader\.input: task row-7 has no \{\{ item\.gold \}\}; .*keys are: a, answer, .*messages"
    ):
        Template("{{ item.gold }}", where="grader.input").check(task)
    bare = Task(task_id="row-8", messages=(Message(role="user", content="?"),))
    with pytest.raises(UserError, match=r"keys are: messages$"):
        Template("{{ item.gold }}", where="grader.input").check(bare)


@given(st.text(alphabet="{}item.sample[]'\" x0", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        template = Template(text, where="w")
    except UserError:
        assert "{{" in text
    else:
        assert template.variables or "{{" not in text


def test_the_item_is_made_once_however_many_variables_a_template_has(monkeypatch):
    made: list[Task] = []
    monkeypatch.setattr(templates, "item_of", lambda task: made.append(task) or dict(task.item))
    task = Task(task_id="t", messages=(), item={"a": 1, "b": 2})
    Template("{{item.a}} {{item.b}} {{item.a}}", where="grader.input").check(task)
    Template("{{sample.output_text}}", where="grader.input").check(task)
    assert made == [task]
