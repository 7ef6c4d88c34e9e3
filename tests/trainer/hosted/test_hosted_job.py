"""A job of the hosted service as a config: what is taken over, what is said, what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from envs.remote.config import RemoteConfig
from tests.support import ROOT
from tests.support.configs import scripted_config
from tests.support.scripted_engine import call, engine_starter
from tests.support.scripts import run_script
from tests.support.servers import running
from trainer.config import load_config
from trainer.hosted.job import TakenJob, take_job
from trainer.train import train

ROW = {"messages": [{"role": "user", "content": "How much?"}], "answer": "1 million"}
GRADER = {
    "type": "string_check",
    "name": "same",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}
JUDGE = {"type": "score_model", "name": "judge", "model": "gpt-4.1", "input": [{"role": "user", "content": "Rate."}]}
TOOLS = [
    {"name": "search", "server_url": "https://tools.example.com/call", "headers": {"Authorization": "Bearer ${KEY}"}},
    {"name": "cat", "server_url": "https://tools.example.com/call"},
]
HYPER = {
    "batch_size": 16,
    "n_epochs": 3,
    "learning_rate_multiplier": 0.5,
    "compute_multiplier": 2,
    "eval_interval": 5,
    "eval_samples": 2,
    "reasoning_effort": "medium",
}
MODEL = "model.name=org/open-model"
Write = Callable[..., Path]


def job_of(**reinforcement: Any) -> dict[str, Any]:
    """A small job, with more in its `method.reinforcement`."""
    return {
        "model": "o4-mini-2025-04-16",
        "training_file": "train.jsonl",
        "validation_file": "valid.jsonl",
        "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "tools": TOOLS} | reinforcement},
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a job beside 40 training rows and 10 held-out ones."""
    for name, number in (("train.jsonl", 40), ("valid.jsonl", 10)):
        (tmp_path / name).write_text("".join(json.dumps(ROW) + "\n" for _ in range(number)))

    def write(job: Any, name: str = "job.json") -> Path:
        path = tmp_path / name
        path.write_text(job if isinstance(job, str) else json.dumps(job))
        return path

    return write


def taken(write: Write, job: dict[str, Any], *overrides: str, config: Path | None = None) -> TakenJob:
    return take_job(write(job), config=config, overrides=[MODEL, *overrides])


def said(job: TakenJob, key: str) -> str:
    """The one remark on a key."""
    (remark,) = [remark for remark in job.remarks if remark.startswith(f"{key}: ")]
    return remark.removeprefix(f"{key}: ")


def refusal(write: Write, job: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        take_job(write(job), overrides=[MODEL, *overrides])
    return str(caught.value)


# ---- taken over


def test_an_agent_job_is_taken_over_key_by_key(write, tmp_path):
    job = job_of(tools=TOOLS, max_episode_steps=10, hyperparameters=HYPER) | {"suffix": "my shop", "seed": 42}
    assert taken(write, job).sections == {
        "output_dir": "runs/my-shop",
        "seed": 42,
        "model": {"name": "org/open-model"},
        "world": {"type": "remote", "tools": TOOLS},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "valid.jsonl")},
        "grader": GRADER,
        "rollout": {"tasks_per_step": 16, "group_size": 16, "max_tool_calls": 10, "max_turns": 12},
        "optim": {"num_steps": 8, "learning_rate": 1e-4},
        "eval": {"num_tasks": 10, "every_steps": 5, "samples_per_task": 2},
    }


@pytest.mark.parametrize(
    ("hyperparameters", "overrides", "num_steps"),
    [
        ({}, [], 5),
        ({"n_epochs": "auto"}, [], 5),
        ({"n_epochs": 2}, [], 10),
        ({"n_epochs": 2, "batch_size": 32}, [], 3),
        ({"n_epochs": 2, "batch_size": 32}, ["rollout.tasks_per_step=4"], 20),
        ({"batch_size": 256}, [], 1),
    ],
)
def test_epochs_become_steps_over_the_rows(write, hyperparameters, overrides, num_steps):
    job = taken(write, job_of(hyperparameters=hyperparameters), *overrides)
    assert job.config.optim.num_steps == num_steps
    assert f"optim.num_steps {num_steps}" in said(job, "method.reinforcement.hyperparameters.n_epochs")


@pytest.mark.parametrize(("multiplier", "size"), [(0.00001, 2), (0.5, 4), (1, 8), (1.2, 10), (10, 80)])
def test_compute_becomes_rollouts_of_a_task(write, multiplier, size):
    job = taken(write, job_of(hyperparameters={"compute_multiplier": multiplier}))
    assert job.config.rollout.group_size == size


def test_every_hyperparameter_may_be_auto(write):
    job = taken(write, job_of(hyperparameters=dict.fromkeys(HYPER, "auto")))
    plain = taken(write, job_of())
    assert job.config == plain.config
    for key in set(HYPER) - {"n_epochs", "reasoning_effort"}:
        assert said(job, f"method.reinforcement.hyperparameters.{key}").startswith("auto: ")


def test_the_job_object_as_the_api_gives_it_back_is_the_same_run(write):
    """Nulls for what was not given, and what became of the job."""
    created = job_of(hyperparameters={"batch_size": 4}) | {"suffix": "x"}
    reinforcement = created["method"]["reinforcement"]
    given_back = created | {
        "object": "fine_tuning.job",
        "id": "ftjob-1",
        "status": "succeeded",
        "created_at": 1754000000,
        "finished_at": None,
        "fine_tuned_model": None,
        "error": None,
        "organization_id": "org-1",
        "result_files": ["file-r"],
        "trained_tokens": 5,
        "seed": None,
        "integrations": [],
        "metadata": None,
        "hyperparameters": {"n_epochs": None, "batch_size": None, "learning_rate_multiplier": None},
        "suffix": None,
        "user_provided_suffix": "x",
        "method": {
            "type": "reinforcement",
            "supervised": None,
            "dpo": None,
            "reinforcement": reinforcement
            | {
                "grader": GRADER,
                "response_format": None,
                "hyperparameters": {"batch_size": 4, "n_epochs": None, "reasoning_effort": None},
            },
        },
    }
    job = taken(write, given_back)
    assert job.config == taken(write, created).config
    told = "object, id, status, created_at, organization_id, result_files, trained_tokens"
    assert "no settings, not used" in said(job, told)


def test_older_top_level_hyperparameters_count_where_the_method_says_nothing(write):
    job = job_of(hyperparameters={"batch_size": 4}) | {"hyperparameters": {"batch_size": 2, "n_epochs": 2, "lr": 1}}
    made = taken(write, job)
    assert made.config.rollout.tasks_per_step == 4 and made.config.optim.num_steps == 20
    assert said(made, "hyperparameters.batch_size").startswith("2 not taken over")
    assert said(made, "hyperparameters.lr") == "unknown key; not taken over"


def test_a_job_without_tools_gets_an_empty_world_never_a_demo_s(write):
    made = taken(write, job_of(tools=[]))
    assert made.sections["world"] == {"type": "remote", "tools": []}
    assert made.config.world == RemoteConfig() and made.config.rollout.answer == "text"


def test_rows_with_tools_that_no_server_has_are_graded_by_their_calls(write, tmp_path):
    lookup = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"tools": [lookup]}) + "\n")
    made = taken(write, job_of(tools=[]))
    assert made.config.rollout.answer == "tool_calls"
    assert "rollout.answer tool_calls" in said(made, "method.reinforcement.tools")
    served = taken(write, job_of(tools=[]), "world={type: custom, target: 'tools.py:Env'}")
    assert served.config.rollout.answer == "text"


FORM = {
    "type": "json_schema",
    "json_schema": {"name": "a", "description": None, "schema": {"enum": ["yes", None]}, "strict": True},
}


def test_the_form_of_answers_is_taken_over_where_no_tools_are_offered(write):
    made = taken(write, job_of(tools=[], response_format=FORM))
    assert made.sections["rollout"]["response_format"] == FORM, "a null of a schema means something"
    assert made.config.rollout.response_format is not None
    with_tools = taken(write, job_of(response_format=FORM))
    assert with_tools.config.rollout.response_format is None
    assert said(with_tools, "method.reinforcement.response_format").startswith("not taken over: answers have a form")
    free = taken(write, job_of(response_format={"type": "text"}))
    assert free.config.rollout.response_format is not None
    off = taken(write, job_of(tools=[], response_format=FORM), "rollout.response_format=null")
    assert off.config.rollout.response_format is None


def test_a_graders_source_of_several_lines_reads_in_the_yaml_as_it_was_written(write):
    source = "def grade(sample, item):\n    return float(sample['output_text'] == item['answer'])\n"
    grader = {"type": "python", "name": "mine", "source": source, "image_tag": "2025-05-08"}
    job = taken(write, job_of(grader=grader))
    assert "  source: |\n    def grade(sample, item):\n" in job.to_yaml()
    assert "ignored" in said(job, "method.reinforcement.grader.image_tag")


# ---- given beside the job


def test_what_is_given_goes_before_the_job_and_is_said(write, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"seed": 7, "eval": {"every_steps": 2}, "optim": {"num_steps": 9}}))
    job = job_of(hyperparameters=HYPER) | {"seed": 42}
    made = taken(write, job, "rollout.tasks_per_step=2", config=base)
    assert (made.config.seed, made.config.eval.every_steps, made.config.optim.num_steps) == (7, 2, 9)
    assert made.config.rollout.tasks_per_step == 2 and made.config.eval.samples_per_task == 2
    assert said(made, "seed") == "42 not taken over: seed is given as 7"
    hyper = "method.reinforcement.hyperparameters"
    assert said(made, f"{hyper}.eval_interval") == "5 not taken over: eval.every_steps is given as 2"
    assert said(made, f"{hyper}.n_epochs") == '"3 epochs" not taken over: optim.num_steps is given as 9'


def test_settings_are_added_to_the_jobs_grader_and_tools(write):
    made = taken(
        write,
        job_of(grader=JUDGE, tools=TOOLS),
        "grader.pass_threshold=0.5",
        "world.open_url=https://tools.example.com/rollouts",
    )
    assert made.config.grader.pass_threshold == 0.5 and made.config.grader.model == "gpt-4.1"
    assert len(made.config.world.tools) == 2 and made.config.world.open_url


def test_another_grader_or_world_takes_the_jobs_place(write):
    made = taken(write, job_of(tools=TOOLS), "grader={type: numeric}", "world={type: custom, target: 'a.py:A'}")
    assert made.config.grader.type == "numeric" and made.config.world.type == "custom"
    assert "not taken over: grader is given" in said(made, "method.reinforcement.grader")
    assert "not taken over: world is given" in said(made, "method.reinforcement.tools")


def test_a_null_that_is_given_counts_as_given(write):
    job = taken(write, job_of() | {"seed": 1}, "warmstart=null", "loss.tis_cap=null")
    assert job.config.loss.tis_cap is None and job.config.warmstart is None


# ---- files


def test_a_file_id_is_looked_for_beside_the_job_under_its_own_name(write, tmp_path):
    (tmp_path / "train.jsonl").rename(tmp_path / "file-AbC123.jsonl")
    job = taken(write, job_of() | {"training_file": "file-AbC123"})
    assert job.config.data.train == tmp_path / "file-AbC123.jsonl"


def test_files_are_named_beside_the_job(write, tmp_path):
    job = job_of() | {"training_file": "file-1", "validation_file": "file-2"}
    path = write(job)
    odd = tmp_path / "my räume 😀: no. 1.jsonl"
    (tmp_path / "train.jsonl").rename(odd)
    made = take_job(path, overrides=[MODEL], training_file=odd, validation_file=tmp_path / "valid.jsonl")
    assert made.config.data.train == odd and made.config.optim.num_steps == 5
    by_key = take_job(path, overrides=[MODEL, f"data={{train: '{odd}', eval: '{odd}'}}"])
    assert by_key.config.data.train == odd and by_key.config.eval.num_tasks == 40


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training_file": "file-1"}, "training_file: 'file-1' is the id of a file of the hosted service; download it"),
        ({"training_file": "rows.jsonl"}, "no file 'rows.jsonl' next to the job; name it with --training-file PATH"),
        ({"validation_file": "file-1"}, "put it next to the job as file-1.jsonl"),
        ({"validation_file": None}, "validation_file: not given; name the held-out rows with --validation-file or"),
    ],
)
def test_files_that_are_not_there_are_told_how_to_bring(write, changes, expected):
    message = refusal(write, job_of() | changes)
    assert "job.json: " in message and expected in message


def test_a_broken_row_is_named_by_its_line(write, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{\n')
    assert "train.jsonl, line 2: not valid JSON" in refusal(write, job_of())


# ---- said


def test_what_is_said_reads_as_it_was_written_and_acts_on_no_terminal(write):
    assert said(taken(write, job_of() | {"metadata": {"team": "Räume 😀"}}), "metadata").endswith(
        '{"team": "Räume 😀"}'
    )
    assert "R\\u00e4ume\\u0085" in said(taken(write, job_of() | {"metadata": {"team": "Räume\x85"}}), "metadata")
    made = taken(write, job_of() | {"suffix": "Räume"}, "output_dir=runs/größe")
    assert said(made, "suffix") == '"runs/Räume" not taken over: output_dir is given as "runs/größe"'


def test_what_has_no_place_is_said_line_by_line_and_stands_in_the_yaml(write, tmp_path):
    job = job_of(tools=[TOOLS[0] | {"kind": "x"}], zz=1, hyperparameters=HYPER) | {
        "metadata": {"team": "Räume 😀\n\x85b"},
        "trainingType": "global",
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "group": "g"}}],
    }
    made = taken(write, job)
    for key in (
        "model",
        "trainingType",
        "metadata",
        "integrations[0].wandb",
        "integrations[0].wandb.group",
        "method.reinforcement.zz",
        "method.reinforcement.tools[0].kind",
        "method.reinforcement.hyperparameters.reasoning_effort",
        "model.tool_parser",
        "rollout.max_episode_tokens",
    ):
        assert said(made, key)
    text = made.to_yaml()
    assert all(f"# {remark}\n" in text for remark in made.remarks)
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml") == made.config


def test_a_jobs_secrets_are_used_said_and_left_out_of_what_is_written(write, tmp_path, monkeypatch):
    held = {"X-Odd": "s3cret", "Authorization": "Bearer ${KEY}"}
    endpoint = {"type": "endpoint", "name": "own", "url": "https://h/grade?token=s3cret", "headers": held}
    multi = {"type": "multi", "name": "m", "graders": {"a": endpoint}, "calculate_output": "a"}
    tools = [TOOLS[0] | {"server_url": "https://bob:s3cret@h/call", "headers": held}]
    for grader, at in ((endpoint, "grader"), (multi, "grader.graders.a")):
        made = taken(write, job_of(grader=grader, tools=tools) | {"metadata": {"api_key": "s3cret"}})
        assert made.config.world.tools[0].headers == held
        for key, variables in {
            f"{at}.url": "${TOKEN}",
            f"{at}.headers.X-Odd": "${X_ODD}",
            "tools[0].server_url": "${URL_USER}, ${URL_PASSWORD}",
            "tools[0].headers.X-Odd": "${X_ODD}",
        }.items():
            told = said(made, f"method.reinforcement.{key}")
            assert f"environment variable that stands there, {variables}, to the whole of what it replaces;" in told
        assert not any("Authorization: holds" in remark for remark in made.remarks)
        text = made.to_yaml()
        assert "s3cret" not in text and "Bearer ${KEY}" in text
        (tmp_path / "run.yaml").write_text(text)
        written = load_config(tmp_path / "run.yaml").world
        assert isinstance(written, RemoteConfig) and written.tools[0].headers == held | {"X-Odd": "${X_ODD}"}


def test_a_setting_that_is_not_taken_over_is_said_without_its_secrets(write):
    job = job_of(tools=[TOOLS[0] | {"headers": {"X-Odd": "s3cret"}}])
    made = taken(write, job, "world={type: remote, tools: [{name: search, server_url: 'https://bob:s4cret@h'}]}")
    assert "tools" in str(made.remarks) and "s3cret" not in str(made.remarks) and "s4cret" not in str(made.remarks)


def test_a_job_that_is_taken_over_whole_has_little_said_of_it(write):
    job = job_of(grader=GRADER) | {"model": "smollm2-135m-instruct"}
    limits = ["rollout.max_turn_tokens=512", "rollout.max_episode_tokens=4096", "optim.num_steps=3"]
    assert take_job(write(job), overrides=limits).remarks == ()


def test_the_judges_of_a_multi_are_said_to_be_asked_where_they_are(write):
    grader = {"type": "multi", "name": "m", "graders": {"a": JUDGE, "b": GRADER}, "calculate_output": "a + b"}
    key = "method.reinforcement.grader.graders.a.model"
    assert "https://api.openai.com/v1" in said(taken(write, job_of(grader=grader)), key)
    served = taken(write, job_of(grader=grader), "judge.base_url=http://localhost:8000/v1")
    assert not any(remark.startswith(key) for remark in served.remarks)


# ---- refused


@pytest.mark.parametrize("model", ["o4-mini-2025-04-16", "gpt-4.1-nano", "ft:gpt-4o-mini:org/a::1", "gpt-oss-20b-11"])
def test_a_hosted_model_needs_an_open_one_in_its_place(write, model):
    with pytest.raises(UserError, match=r"job\.json: model: '.*' runs at the hosted service only; name an open model"):
        take_job(write(job_of() | {"model": model}))


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "smollm2-135m-instruct"])
def test_an_open_model_in_the_job_is_taken(write, model):
    assert take_job(write(job_of() | {"model": model})).config.model.name == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 257),
        ("batch_size", "many"),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("n_epochs", 51),
        ("learning_rate_multiplier", 0),
        ("learning_rate_multiplier", "0.5"),
        ("compute_multiplier", 11),
        ("eval_interval", 0),
        ("eval_samples", 11),
        ("reasoning_effort", "huge"),
    ],
)
def test_a_wrong_hyperparameter_is_named_by_its_key_in_the_job(write, key, value):
    message = refusal(write, job_of(hyperparameters={key: value}))
    assert f"job.json: 1 problem\n  method.reinforcement.hyperparameters.{key}: " in message and str(value) in message
    assert f"hyperparameters: 1 problem\n  {key}: " in refusal(write, job_of() | {"hyperparameters": {key: value}})


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("[]", "expected one job as a JSON object, got a list"),
        ({"object": "list", "data": []}, "expected one job as a JSON object, got a list of jobs"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested more than 200 deep"),
        ({"model": "m", "training_file": "train.jsonl"}, "method: required, with type reinforcement"),
        (job_of() | {"method": {"type": "supervised", "supervised": {}}}, "method: supervised: not done here"),
        (job_of() | {"method": {"type": "dpo"}}, "method: dpo: not done here; expected type reinforcement"),
        (job_of() | {"method": {"type": "reinforcement"}}, "method: reinforcement: required, but not given"),
        (job_of() | {"method": {"type": "ppo", "reinforcement": {"grader": GRADER}}}, "method.type: Input should be"),
        (job_of() | {"method": []}, "method: Input should be a valid dictionary"),
        (job_of() | {"method": "reinforcement"}, "method: Input should be a valid dictionary"),
        (job_of() | {"suffix": "x" * 65}, "suffix: String should have at most 64 characters"),
        (job_of() | {"seed": "1"}, "seed: Input should be a valid integer"),
        (job_of() | {"integrations": [{"type": "mlflow"}]}, "integrations.0.type: Input should be 'wandb'"),
        (job_of(max_episode_steps=0), "method.reinforcement.max_episode_steps: Input should be greater than or"),
        (job_of(tools=[{"name": "a", "server_url": "ftp://a"}]), "reinforcement.tools.0.server_url: expected a URL"),
        (job_of(tools=[{"server_url": "http://a"}]), "method.reinforcement.tools.0.name: required, but not given"),
        (job_of(grader=GRADER | {"operation": "x"}), "method.reinforcement.grader.operation: Input should be 'eq'"),
        (job_of(grader=GRADER | {"refrence": "x"}), "method.reinforcement.grader.refrence: unknown key; did you mean"),
        (job_of(grader=GRADER | {"type": "x"}), "method.reinforcement.grader"),
        (job_of(tools=[TOOLS[0], TOOLS[0]]), "two tools are named 'search'"),
        (job_of(tools=[], response_format={"type": "xml"}), "rollout.response_format.type: expected one of 'json_"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_job_is_named(write, job, expected):
    message = refusal(write, job)
    assert "job.json" in message and expected in message and len(message.splitlines()) < 10


# ---- the script


def test_the_script_writes_the_config_and_says_what_it_left_out(write, tmp_path):
    path, out = write(job_of() | {"metadata": {"a": "b"}}), tmp_path / "run.yaml"
    done = run_script("train", "--hosted-job", path, "--write-config", out, MODEL)
    assert done.returncode == 0, done.stderr
    assert 'job.json: metadata: no place for it; not taken over: {"a": "b"}\n' in done.stdout
    assert load_config(out) == take_job(path, overrides=[MODEL]).config
    assert not (ROOT / "runs" / "job").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config: required, but for --hosted-job"),
        (["--config", "configs/quickstart.yaml", "--training-file", "a"], "--training-file: only with --hosted-job"),
        (["--config", "configs/quickstart.yaml", "--write-config", "a"], "--write-config: only with --hosted-job"),
        (["--hosted-job", "/no/such.json"], "hosted job /no/such.json: No such file or directory"),
    ],
)
def test_the_script_refuses_what_does_not_go_together(arguments, expected):
    done = run_script("train", *arguments)
    assert done.returncode == 2 and done.stderr.strip() == f"error: {expected}"


# ---- a run


def shop_script(prompt: str, seed: int) -> str:
    """Puts the right pens into the cart, or too many; the rows ask for three blue ones first."""
    pieces = 3 if seed % 2 else 4
    return (
        "360"
        if "</tool_call>" in prompt.rpartition("<|im_start|>user")[2]
        else call("add_to_cart", sku="P-10", pieces=pieces)
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_job_runs_from_its_json_to_an_adapter_with_tools_and_grader_over_http(tmp_path, tiny_model, monkeypatch):
    examples = ROOT / "scripts" / "examples"
    first = (examples / "shop.jsonl").read_text().splitlines()[0]
    (tmp_path / "file-Shop1.jsonl").write_text(first + "\n")
    plain = scripted_config(tmp_path / "run", tiny_model)
    base = {key: plain[key] for key in ("output_dir", "model")}
    base |= {"rollout": {"max_turn_tokens": 96, "max_episode_tokens": 1000}, "optim": {"learning_rate": 1e-2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    tools_command = [sys.executable, str(examples / "tool_server.py")]
    with running(tools_command, tmp_path / "tools.log", ready="/docs") as tools:
        grader_command = [sys.executable, str(examples / "endpoint_grader.py"), "--tools", tools]
        with running(grader_command, tmp_path / "grader.log", ready="/docs") as grader:
            job = job_of(
                grader=json.loads((examples / "grader.json").read_text()) | {"url": f"{grader}/grade"},
                tools=[
                    {"name": name, "server_url": f"{tools}/tools", "headers": {"X-Odd": "s3cret"}}
                    for name in ("search", "add_to_cart", "view_cart")
                ],
                max_episode_steps=3,
                hyperparameters={"batch_size": 1, "n_epochs": 2, "compute_multiplier": 0.5, "eval_samples": 1},
            )
            job |= {"training_file": "file-Shop1", "validation_file": "file-Shop1", "suffix": "shop"}
            (tmp_path / "job.json").write_text(json.dumps(job))
            made = take_job(tmp_path / "job.json", config=tmp_path / "base.yaml")
            monkeypatch.syspath_prepend(ROOT / "scripts")
            script = importlib.import_module("train")
            starter = engine_starter(shop_script)
            monkeypatch.setattr(
                script, "_train", lambda config, beside: train(config, start_engine=starter, beside=beside)
            )
            folder = script._train_job(made, is_main=True)
    records = [json.loads(line) for p in folder.glob("rollouts/*.jsonl") for line in p.read_text().splitlines()]
    assert folder == tmp_path / "run" and len(records) == 2 * 4
    assert {record["grade"]["reward"] for record in records} == {0.0, 1.0}
    results = [r for record in records for turn in record["episode"]["turns"] for r in turn["results"]]
    assert len(results) == 8 and all("blue pen" in r["output"] for r in results)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    # The config with what is said of it, which runs again once the variable is set.
    written = (folder / "hosted_job.yaml").read_text()
    assert all(f"# {remark}\n" in written for remark in made.remarks) and "${X_ODD}" in str(made.remarks)
    assert load_config(folder / "hosted_job.yaml") == load_config(folder / "config.yaml")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(b"s3cret" in path.read_bytes() for path in files)
