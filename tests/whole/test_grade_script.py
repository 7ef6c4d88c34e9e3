"""scripts/grade.py: graders run and validated over samples from the shell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from openai.types.fine_tuning.alpha import GraderRunResponse
from pydantic import TypeAdapter

from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from envs.user_code import load_target
from tests.support import ROOT
from tests.support.servers import completion, scripted_judge

SCRIPT = ROOT / "scripts" / "grade.py"
EXACT = {
    "type": "string_check",
    "name": "same",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
JUDGED = {
    "type": "score_model",
    "name": "judged",
    "model": "wise",
    "input": [{"role": "user", "content": "Is {{sample.output_text}} the same as {{item.answer}}?"}],
}
SAMPLES = [
    {"item": {"answer": "gold"}, "model_sample": "gold"},
    {"item": {"answer": "gold"}, "sample": {"output_text": "lead [bold]"}},
    {"item": {"answer": "iron"}, "sample": {"output_text": "iron", "output_tools": [], "choices": []}},
]

Files = Callable[..., Path]
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes a file: JSON or YAML by its ending, JSONL of a list, text as it is."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if not isinstance(content, str):
            if path.suffix == ".jsonl":
                content = "".join(json.dumps(row) + "\n" for row in content)
            else:
                content = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs the script's main function: exit code, standard output, standard error."""

    def run(command: str, **options: object) -> tuple[int, str, str]:
        words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        monkeypatch.setattr(sys, "argv", ["grade.py", command, *words])
        monkeypatch.setenv("COLUMNS", "120")
        code: int = load_target(f"{SCRIPT}:main", key="script")()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def judge() -> Iterator[str]:
    """A server that always scores 0.25."""

    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        return completion(asked["model"], json.dumps({"steps": [], "result": 0.25}))

    with scripted_judge(answer) as url:
        yield url


def rollout(answer: str, *, stop: StopReason = StopReason.ANSWERED) -> dict[str, Any]:
    """A line of a run's rollouts file, without what grading does not need."""
    calls = Message(role="assistant", tool_calls=(ToolCall(call_id="c", name="look", arguments="{}"),))
    result = ToolResult(call_id="c", name="look", output="it shines")
    last = Message(role="assistant", content=answer)
    prompt = Message(role="user", content="What is it?")
    tool_message = Message(role="tool", content="it shines", call_id="c", name="look")
    episode = Episode(
        rollout_id="run-1-step1-0",
        task_id="t1",
        messages=(prompt, calls, tool_message, last),
        turns=(Turn(message=calls, results=(result,)), Turn(message=last)),
        stop_reason=stop,
        error="the store is down" if stop is StopReason.WORLD_FAULT else "",
    )
    task = Task(task_id="t1", messages=(prompt,), item={"answer": "gold"})
    return {
        "episode": TypeAdapter(Episode).dump_python(episode, mode="json"),
        "task": TypeAdapter(Task).dump_python(task, mode="json"),
        "grade": None,
        "ledgers": [],
    }


def test_a_hosted_grader_runs_over_samples_in_both_hosted_forms(files: Files, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "grades.jsonl"
    samples = files("samples.jsonl", SAMPLES)
    code, told, errors = shell("run", grader=files("grader.json", EXACT), samples=samples, json=out)
    assert (code, errors) == (0, "")
    reward = next(line for line in told.splitlines() if line.startswith("reward"))
    assert reward.split() == ["reward", "3", "0.667", "0.471", "0.000", "0.500", "1.000", "1.000", "1.000"]
    assert "passed 2 of 3 (66.7%)" in told
    worst = told[told.index("why") :].splitlines()[1]
    assert worst.split()[:2] == ["2", "0.000"]
    assert "lead [bold]" in worst, "brackets are no markup"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["line"], row["reward"], row["passed"]) for row in rows] == [
        (1, 1.0, True),
        (2, 0.0, False),
        (3, 1.0, True),
    ]
    for row in rows:
        response = GraderRunResponse.model_validate(row)
        assert (response.metadata.name, response.metadata.type) == ("same", "string_check")
        assert response.metadata.scores == {"same": row["reward"]}
        assert not response.metadata.errors.other_error


def test_sub_graders_and_penalties_have_their_own_lines(files: Files, shell: Shell, tmp_path: Path) -> None:
    similar = {**EXACT, "type": "text_similarity", "name": "near", "evaluation_metric": "fuzzy_match"}
    del similar["operation"]
    both = {"type": "multi", "name": "both", "graders": [EXACT, similar], "calculate_output": "(same + near) / 2"}
    grader = files("grader.json", {"grader": {**both, "pass_threshold": 1.0}})
    penalties = files("penalties.yaml", {"tool_calls": {"slope": 0.1, "floor": -0.3}})
    out = tmp_path / "grades.jsonl"
    samples = files("rollouts.jsonl", [rollout("lead"), rollout("gold")])
    code, told, _ = shell("run", grader=grader, samples=samples, penalties=penalties, json=out)
    assert code == 0
    means = {line.split()[0]: line.split()[2] for line in told.splitlines() if line.split()[1:2] == ["2"]}
    assert set(means) == {"reward", "both", "tool_calls", "same", "near"}
    assert means["same"] == "0.500"
    assert means["tool_calls"] == "-0.050", "a right answer is held at the threshold"
    first = json.loads(out.read_text().splitlines()[0])
    assert set(first["sub_rewards"]) == {"same", "near"}
    assert first["task_id"] == "t1"


def test_a_run_config_gives_grader_and_penalties_and_broken_rollouts_are_counted(files: Files, shell: Shell) -> None:
    config = files(
        "run.yaml",
        {
            "output_dir": "runs/x",
            "grader": str(files("grader.json", EXACT)),
            "penalties": {"tool_calls": {"slope": 0.1, "floor": -0.3}},
            "rollout": {"group_size": 4},
        },
    )
    rows = [rollout("gold"), rollout("", stop=StopReason.WORLD_FAULT)]
    code, told, _ = shell("run", grader=config, samples=files("rollouts.jsonl", rows))
    assert code == 0
    assert "0.900" in told
    assert "not graded 1 of 2: in training these rollouts are masked" in told
    assert re.search(r"the world broke it off +1 ", told)
    assert "the world broke it off: the store is down" in told


def test_a_judge_is_asked_at_the_url_and_its_tokens_are_counted(
    files: Files, shell: Shell, judge: str, tmp_path: Path
) -> None:
    out = tmp_path / "grades.jsonl"
    samples = files("samples.jsonl", SAMPLES[:2])
    code, told, _ = shell("run", grader=files("g.json", JUDGED), samples=samples, judge_url=judge, json=out)
    assert code == 0
    assert "wise" in told
    assert "84" in told
    row = json.loads(out.read_text().splitlines()[0])
    assert row["reward"] == 0.25
    assert row["metadata"]["token_usage"] == 42
    assert row["metadata"]["sampled_model_name"] == "wise"
    assert row["model_grader_token_usage_per_model"] == {"wise": 42}
    engine = files("run.yaml", {"grader": JUDGED, "judge": {"base_url": "engine"}})
    code, _, errors = shell("run", grader=engine, samples=samples)
    assert (code, "--judge-url" in errors) == (2, True)


def test_rows_are_graded_side_by_side_but_no_more_than_asked(files: Files, shell: Shell) -> None:
    files(
        "mine.py",
        "import asyncio\n"
        "running = most = 0\n"
        "async def reward(completions, **columns):\n"
        "    global running, most\n"
        "    running += 1\n"
        "    most = max(most, running)\n"
        "    await asyncio.sleep(0.05)\n"
        "    running -= 1\n"
        "    return [1.0]\n",
    )
    target = files("g.json", "").with_name("mine.py")
    grader = files("g.json", {"type": "custom", "target": f"{target}:reward"})
    code, _, _ = shell("run", grader=grader, samples=files("s.jsonl", SAMPLES * 5), concurrency=4)
    assert code == 0
    assert load_target(f"{target}:most", key="test") == 4


def test_what_a_custom_grader_raises_is_told_with_its_line_and_place(files: Files, shell: Shell) -> None:
    mine = files(
        "mine.py",
        "from envs.errors import WorldError\n"
        "def broken(answer, **columns):\n"
        "    return [float(answer[0] == 'gold') / (answer[0] != 'iron')]\n"
        "def away(**columns):\n"
        "    raise WorldError('nobody answers')\n"
        "def silent(**columns):\n"
        "    return [None]\n",
    )
    samples = files("s.jsonl", SAMPLES)
    broken = files("g.json", {"type": "custom", "target": f"{mine}:broken"})
    code, _, errors = shell("run", grader=broken, samples=samples)
    assert code == 2
    assert f"{samples}, line 3: the grader raised ZeroDivisionError: float division by zero" in errors
    assert f"({mine}, line 3)" in errors
    away = files("g.json", {"type": "custom", "target": f"{mine}:away"})
    code, told, _ = shell("run", grader=away, samples=samples, limit=2)
    assert code == 0
    assert "not graded 2 of 2" in told
    assert "other" in told
    assert "nobody answers" in told and re.search(r"its grading failed +2 ", told)
    silent = files("g.json", {"type": "custom", "target": f"{mine}:silent"})
    code, told, _ = shell("run", grader=silent, samples=samples, limit=2)
    assert code == 0 and re.search(r"every reward function gave None +2 ", told)
    assert "other" not in told, "no error of the grader's"


def test_validate_answers_with_the_grader_and_reads_no_sample(files: Files, shell: Shell) -> None:
    code, told, _ = shell("validate", grader=files("grader.json", EXACT))
    assert code == 0
    assert json.loads(told) == {"grader": EXACT}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("g.json", '{"type":\n "string_check",\n}', "g.json: not valid JSON: Expecting property name"),
        ("g.json", {**EXACT, "operation": "equal"}, "grader.operation: Input should be 'eq', 'ne', 'like' or 'ilike'"),
        ("g.json", {**EXACT, "inputs": 1}, "grader.inputs: unknown key"),
        ("g.json", {"type": "string_check"}, "grader.input: required, but not given"),
        (
            "g.json",
            {"type": "multi", "graders": {"a": {**EXACT, "operation": "x"}}, "calculate_output": "a"},
            "grader.graders.a.operation: Input should be",
        ),
        ("g.json", {"type": "multi", "graders": {"a": EXACT}, "calculate_output": "a + b"}, "b"),
        ("g.json", {**EXACT, "input": "{{sample.output}}"}, "sample.output"),
        ("g.json", {"type": "custom", "target": "no_such_module:f"}, "No module named 'no_such_module'"),
        ("g.json", {"type": "guess"}, "grader.type: expected one of 'exact', 'numeric', "),
        ("g.json", {"name": "same", "operation": "eq"}, "grader.type: required, one of 'exact', 'numeric', "),
        ("g.json", [], "problem"),
        ("g.yaml", {"output_dir": "x"}, "grader: required, but not given"),
        ("g.yaml", "a: [", "g.yaml: not valid YAML"),
        ("g.json", '{"type": "string_check",\n"type": "exact"}', "g.json: type: the key stands twice in one object"),
        ("g.json", '{\n"type":\n}', "g.json: not valid JSON: Expecting value at line 3, column 1"),
        ("g.txt", "a: [", "g.txt: not valid JSON or YAML"),
        ("g.yaml", "grader: gone.json", "grader: grader file gone.json: No such file"),
    ],
)
def test_a_grader_that_cannot_be_read_is_told_on_one_screen(
    files: Files, shell: Shell, name: str, content: Any, told: str
) -> None:
    code, out, errors = shell("validate", grader=files(name, content))
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert told in errors
    assert len(errors.splitlines()) <= 21


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"model_sample": "a", "item": {"answer": "b"}}\n\n{"model_sample": ', "s.jsonl, line 3: not valid JSON"),
        ('{"item": {"answer": "b"}}\n', "line 1: expected item and sample, item and model_sample (text), or task"),
        ('{"item": 3, "model_sample": "a"}\n', "line 1: item: expected an object, got a number"),
        (
            '{"item": {}, "model_sample": "a"}\n',
            "line 1: grader 'same': reference: task line-1 has no {{ item.answer }}",
        ),
        ('{"item": {}, "sample": {"output_text": 3}}\n', "line 1: sample.output_text: expected text"),
        ('{"task": {"task_id": "t"}, "episode": {}}\n', "line 1: 6 problems\n  task.messages: required"),
        ("[]\n", "line 1: a JSON list; expected JSONL"),
        ("\n", "no rows"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_by_file_and_line(
    files: Files, shell: Shell, content: str, told: str
) -> None:
    code, _, errors = shell("run", grader=files("g.json", EXACT), samples=files("s.jsonl", content))
    assert code == 2
    assert told in errors


def test_the_command_starts_without_the_training_stack(files: Files) -> None:
    code = (
        "import runpy, sys\n"
        "sys.path[0] = 'scripts'\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e:\n    assert e.code == 0, e.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'trl', 'datasets', 'trainer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    options = ["--grader", str(files("g.json", EXACT)), "--samples", str(files("s.jsonl", [rollout("gold")]))]
    wrapped = f"import sys; sys.argv = {[str(SCRIPT), 'run', *options]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    assert "passed 1 of 1" in done.stdout


def test_a_long_traceback_is_shown_with_what_it_ended_in(files: Files, shell: Shell) -> None:
    source = "import json\n\n\ndef grade(sample, item):\n    return json.loads('\\n' * 500 + 'the ' + 'end ' * 9)\n"
    grader = files("g.json", {"type": "python", "name": "own", "source": source})
    code, out, _ = shell("run", grader=grader, samples=files("s.jsonl", SAMPLES[:1]))
    words = " ".join(out.split())
    assert code == 0 and "own: Traceback" in words and "JSONDecodeError: Expecting value: line 501" in words


def test_validate_asks_nobody_and_needs_no_key(files: Files, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    labelled = {**JUDGED, "type": "label_model", "labels": ["yes", "no"], "passing_labels": ["yes"]}
    both = {"type": "multi", "graders": {"a": JUDGED, "b": labelled}, "calculate_output": "a * b"}
    rows = files("rows.jsonl", SAMPLES)
    for grader in (JUDGED, both, {"grader": JUDGED, "judge": {"base_url": "engine"}}):
        code, told, errors = shell("validate", grader=files("grader.json", grader), samples=rows)
        assert (code, errors) == (0, "") and json.loads(told)["grader"]
    code, _, errors = shell("run", grader=files("grader.json", JUDGED), samples=rows)
    assert code == 2 and "the environment has no OPENAI_API_KEY" in errors


def test_the_older_name_of_not_equal_is_taken(files: Files, shell: Shell) -> None:
    code, told, _ = shell("validate", grader=files("grader.json", EXACT | {"operation": "neq"}))
    assert code == 0 and json.loads(told)["grader"]["operation"] == "ne"


@pytest.mark.parametrize("kind", ["input_image", "input_audio", "image_url"])
def test_a_judge_who_should_see_a_picture_is_refused_with_the_reason(files: Files, shell: Shell, kind: str) -> None:
    content = [{"type": "input_text", "text": "?"}, {"type": kind, "image_url": "{{item.url}}"}]
    for given in (content, content[1]):
        grader = JUDGED | {"input": [{"role": "user", "content": given}]}
        code, _, errors = shell("validate", grader=files("grader.json", grader))
        assert code == 2 and errors.count("\n") == 2
        assert f"grader.input.0.content: a part of type {kind!r}: judges are shown text alone here" in errors


def test_a_package_that_is_not_installed_is_named_before_any_grading(files: Files, shell: Shell) -> None:
    source = (
        "import json, rdkit\nfrom skbio.util import x\ndef grade(sample, item):\n    import ast_grep_py\n    return 1"
    )
    code, _, errors = shell("validate", grader=files("grader.json", {"type": "python", "source": source}))
    assert code == 2
    assert "grader.source, line 1: imports what is not installed here: rdkit, skbio, ast_grep_py" in errors


def test_exported_samples_with_their_outputs_are_graded(files: Files, shell: Shell, tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "gold"}
    samples = [
        {"item": {"answer": "gold"}, "sample": {"outputs": [message]}},
        {"item": {"answer": "gold"}, "sample": {"outputs": [{"content": [{"type": "output_text", "text": "gold"}]}]}},
        {"datasource_item": {"answer": "gold"}, "sample": {"input": [], "output": [message], "finish_reason": "stop"}},
        {"item": {"answer": "gold"}, "sample": {"outputs": [{**message, "content": "lead"}], "output_text": None}},
    ]
    out = tmp_path / "grades.jsonl"
    shell("run", grader=files("grader.json", EXACT), samples=files("samples.jsonl", samples), json=out)
    assert [json.loads(line)["reward"] for line in out.read_text().splitlines()] == [1.0, 1.0, 1.0, 0.0]
    code, _, errors = shell(
        "run", grader=files("g.json", EXACT), samples=files("s.jsonl", [{"sample": {"outputs": []}}])
    )
    assert code == 2 and "line 1: sample.output_text: expected text" in errors


def test_a_grader_that_reads_the_rows_messages_is_checked_as_training_checks_it(files: Files, shell: Shell) -> None:
    grader = files("grader.json", JUDGED | {"input": [{"role": "user", "content": "{{ item.messages }}"}]})
    row = {"messages": [{"role": "user", "content": "What is it?"}], "answer": "gold"}
    code, _, errors = shell(
        "validate", grader=grader, samples=files("good.jsonl", [{"item": row, "model_sample": "gold"}])
    )
    assert (code, errors) == (0, "")
    code, _, errors = shell(
        "validate", grader=grader, samples=files("bad.jsonl", [{"item": {"answer": "x"}, "model_sample": "x"}])
    )
    assert code == 2 and "line 1: grader 'judged': input[0].content: task line-1 has no {{ item.messages }}" in errors
