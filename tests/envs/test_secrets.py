"""Secrets that stand in settings or texts: what is written down and said holds none of them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.clients.http import HttpCaller, HttpLimits, resolve_headers
from envs.errors import ToolError, UserError, WorldError
from envs.reading.variables import expand
from envs.remote.config import RemoteConfig
from envs.remote.world import RemoteWorld
from envs.secrets import hidden_in, without_secrets
from envs.users import UrlUserConfig, UrlUsers
from graders.judges.base import JudgeConfig, JudgeSampling
from graders.judges.openai_judge import OpenAIJudge
from graders.user.endpoint import EndpointConfig, EndpointGrader
from tests.support import ROOT
from trainer.config import load_config, validate_config
from trainer.runs.folder import RunFolder
from trainer.runs.log_file import LogFile

LONG = "Q7xk29ZbTm4pLw8RvN3c"
"""In the form of a key."""
SERVED: dict[str, Any] = {"name": "a", "command": "npx"}


def config_of(folder: Path, **sections: Any) -> dict[str, Any]:
    rows: dict[str, Any] = {"data": {"train": "t", "eval": "e"}, "grader": {"type": "exact"}}
    return rows | {"output_dir": str(folder / "run")} | sections


def world_of(**settings: Any) -> dict[str, Any]:
    return {"world": {"type": "remote"} | settings}


def mcp_of(**settings: Any) -> dict[str, Any]:
    return world_of(mcp=[SERVED | settings])


def user_of(**settings: Any) -> dict[str, Any]:
    return world_of(user=settings)


def endpoint_of(**settings: Any) -> dict[str, Any]:
    return {"grader": {"type": "endpoint", "url": "http://h/grade"} | settings}


def judge_of(**settings: Any) -> dict[str, Any]:
    return {"judge": settings}


HELD: list[dict[str, Any]] = [
    endpoint_of(url="https://bob:s3cret@h/grade"),
    endpoint_of(url="https://s3cret@h/grade"),
    endpoint_of(url="https://h/grade?a=1&api_key=s3cret"),
    endpoint_of(url="https://h/grade?code=s3cret#x"),
    endpoint_of(url="https://h/grade#access_token=s3cret"),
    endpoint_of(url="https://h/grade?API%5FKEY=s3cret"),
    endpoint_of(url="${WHERE:-https://bob:s3cret@h/grade}"),
    endpoint_of(headers={"X-Odd": "s3cret", "Ocp-Apim-Subscription-Key": "s3cret"}),
    endpoint_of(headers={"Authorization": "Bearer ${TOKEN:-s3cret}"}),
    endpoint_of(headers={"X-Team": "a", "Cookie": "id=s3cret; theme=dark"}),
    {"watch_grader": endpoint_of(headers={"Auth": "s3cret"})["grader"]},
    {
        "grader": {
            "type": "multi",
            "calculate_output": "a",
            "graders": {"a": endpoint_of(headers={"Z": "s3cret"})["grader"]},
        }
    },
    {"grader": {"type": "custom", "target": "m:G", "kwargs": {"client": {"api_key": "s3cret"}}}},
    {"grader": {"type": "custom", "targets": [{"target": "m:G", "kwargs": {"hubToken": "s3cret"}}]}},
    judge_of(base_url="https://h/v1?key=s3cret"),
    endpoint_of(url=f"https://h/grade?{LONG}s3"),
    endpoint_of(headers={"X-Odd": "${A-s3cret}", "Content-Secret": "s3cret"}),
    mcp_of(args=["--proxy", "bob:s3cret@proxy:80"], env={"HEADER": "Bearer s3cret"}),
    {"grader": {"type": "custom", "target": "m:G", "kwargs": {"credentials": {"a": "s3cret", "b": ["s3cret"]}}}},
    judge_of(base_url="https://bob:s3/cret@h/v1"),
    user_of(type="url", url="https://h/user?sig=s3cret"),
    user_of(type="url", url="https://h", headers={"X-Pass": "s3cret"}),
    user_of(type="model", base_url="https://bob:s3cret@h/v1", model="m", prompt="p"),
    world_of(tools=[{"name": "f", "server_url": "https://bob:s3cret@h", "headers": {"X-Odd": "s3cret"}}]),
    world_of(open_url="https://h?token=s3cret", close_url="https://h?token=s3cret", hook_headers={"Q": "s3cret"}),
    mcp_of(args=["-y", "server", "--api-key", "s3cret"]),
    mcp_of(args=["--token=s3cret", "-e", "GITHUB_TOKEN=s3cret"]),
    mcp_of(args=["mcp-remote", "https://h/mcp?apikey=s3cret", "--header", "Authorization: Bearer s3cret"]),
    mcp_of(args=["--header", "X-Odd:s3cret", "-H", "Authorization:s3cret"]),
    mcp_of(args=["--config", json.dumps({"apiKey": "s3cret"}), "postgresql://bob:s3cret@h:5432/db"]),
    mcp_of(args=["-c", "DB_PASSWORD=s3cret exec server --client-secret 's3cret' --port 1"], command="sh"),
    mcp_of(env={"PASSWORD": "s3cret", "STRIPE_KEY": "s3cret", "DB": "Server=h;Pwd=s3cret;", "U": "redis://:s3cret@h"}),
    mcp_of(bind={"access_token": "s3cret"}, open_call={"tool": "login", "arguments": {"password": "s3cret"}}),
    {"world": {"type": "custom", "target": "m:W", "kwargs": {"password": "s3cret", "nested": [{"auth": "s3cret"}]}}},
    mcp_of(env={"API_KEY_PROD": "s3cret", "OPENAI_API_KEY_2": "s3cret", "CREDS": "s3cret", "DB_PW": "s3cret"}),
    mcp_of(env={"API_TOKENS": "s3cret,s3cret", "PASSCODE": "s3cret", "MNEMONIC": "s3cret s3cret"}),
    mcp_of(env={"CERT": "-----BEGIN RSA PRIVATE KEY-----\ns3/cret+\ns3=\n-----END RSA PRIVATE KEY-----"}),
    mcp_of(args=["curl", "-u", "bob:s3cret", "--proxy-user", "bob:s3cret", "--api-key:s3cret"]),
    {"grader": {"type": "custom", "target": "m:G", "kwargs": {"headers": [["X-Odd", "s3cret"], ["Auth", "s3cret"]]}}},
    {"grader": {"type": "custom", "target": "m:G", "kwargs": {"send": [{"name": "X-Api-Key", "value": "s3cret"}]}}},
    {"grader": {"type": "custom", "target": "m:G", "kwargs": {"names": {"https://bob:s3cret@h": 1}}}},
    endpoint_of(url="https://h/grade;jsessionid=s3cret?pw=s3cret&api_key_prod=s3cret"),
]


@pytest.mark.parametrize("sections", HELD, ids=range(len(HELD)))
def test_a_secret_in_a_config_is_not_in_the_run_folder_and_the_config_there_is_one(tmp_path, sections):
    config = validate_config(config_of(tmp_path, **sections), source="test")
    assert "s3" in str(config.model_dump(mode="json"))
    RunFolder.create(config)
    RunFolder.check(config)
    texts = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert texts and not any("s3" in text for text in texts)
    load_config(tmp_path / "run" / "config.yaml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_config_without_secrets_is_written_down_as_it_is(path):
    plain = load_config(path).model_dump(mode="json")
    assert without_secrets(plain) == plain


def test_no_setting_of_ours_is_taken_for_a_secret(tmp_path):
    harmless = config_of(
        tmp_path,
        grader={
            "type": "custom",
            "target": "m:G",
            "kwargs": {"answer_key": "answer", "author": "Bob", "eos_token": "<s>"},
        },
        judge={"base_url": "http://localhost:8000/v1", "api_key_env": "MY_KEY"},
        **mcp_of(
            args=[
                *("server.py", "--max-tokens", "256", "--auth", "none", "--no-auth", "x", "--token-file", "/a/b"),
                *("--port=80", "org/image@sha256:" + "0a" * 32, "qwen2.5-coder-32b-instruct-2024-07-18"),
                *("--sort-key", "name", "https://h/@scope/x?page=2&sort=key", '{"a":1}'),
            ],
            env={"DEBUG": "1", "PATH": "/usr/bin:/bin", "TOKEN_FILE": "/run/token", "KEY": "${K}", "AUTH": "basic"},
            bind={"user": "{{item.user}}", "token": "{{item.token}}"},
        ),
    )
    plain = validate_config(harmless, source="test").model_dump(mode="json")
    assert without_secrets(plain) == plain


def test_a_secret_becomes_the_variable_that_may_stand_there(monkeypatch):
    headers = {"Authorization": "Bearer abc", "X-Api-Key": "abc", "Accept": "text/html", "X-Trace": "sk-abc"}
    env = {"GITHUB_TOKEN": "abc", "DEBUG": "1", "DB": "${ROLLOUT_DIR}/db", "PASSWORD": "${PW}"}
    plain = without_secrets({"world": {"tools": [{"headers": headers}], "mcp": [{"env": env}]}, "seed": 1})
    assert plain["world"]["tools"][0]["headers"] == {
        "Authorization": "${AUTHORIZATION}",
        "X-Api-Key": "${X_API_KEY}",
        "Accept": "text/html",
        "X-Trace": "${X_TRACE}",
    }
    assert plain["world"]["mcp"][0]["env"] == {**env, "GITHUB_TOKEN": "${GITHUB_TOKEN}"}
    assert plain["seed"] == 1
    written = without_secrets("https://bob:s3cret@h:80/a?api_key=abc&b=2")
    for name, value in (("URL_USER", "bob"), ("URL_PASSWORD", "s3cret"), ("API_KEY", "abc")):
        monkeypatch.setenv(name, value)
    assert expand(written, "here") == "https://bob:s3cret@h:80/a?api_key=abc&b=2"


@pytest.mark.parametrize(
    "text", [f"https://h/s/{LONG}/mcp", f"K = 'sk-proj-{LONG}'", f"ghp_{LONG}", f"a eyJ{LONG}.x.y"]
)
def test_what_has_the_form_of_a_key_is_left_out_of_every_text(text):
    assert LONG not in without_secrets({"source": text})["source"] and LONG not in hidden_in(text)
    assert without_secrets({"args": [LONG, LONG[:12]], "env": {"A": LONG}}) == {
        "args": ["${SECRET}", LONG[:12]],
        "env": {"A": "${SECRET}"},
    }


@given(
    user=st.from_regex(r"\A[a-z]{1,8}\Z"),
    password=st.from_regex(r"\A[a-zA-Z0-9!*+~.-]{6,20}\Z"),
    name=st.sampled_from(["token", "api_key", "apikey", "X-Amz-Signature", "secret", "password", "access-token"]),
    around=st.sampled_from(["{}", "'{}'", "failed at {}: gone", "<{}>", "url={}"]),
)
def test_no_url_shows_its_password_in_an_error_or_in_a_config(user, password, name, around):
    url = f"https://{user}:{password}Zz9@host/a?b=1&{name}={password}Zz9&c=2"
    for text in (str(WorldError(around.format(url))), without_secrets(around.format(url))):
        assert f"{password}Zz9" not in text and "host/a?b=1&" in text and text.rstrip("'>: gone").endswith("&c=2")


@pytest.mark.parametrize(
    "text",
    [
        "data.train https:/bob:s3cret@h/rows.jsonl: No such file or directory",
        "HTTP 401 for url 'https://h/mcp?token=s3cret'",
        "refused: Authorization: Bearer s3cret",
        "{'Authorization': 'Bearer s3cret'}",
        "it said: server --api-key s3cret --port 1",
        "override 'judge.api_key=s3cret'",
        "Cannot connect to bob:s3cret@h:80",
        "started with API_KEY=s3cret",
        "HTTP 400: {'headers': {'X-Api-Key': 's3cret'}}",
        'echo: {"client_secret": "s3cret", "a": 1}',
        "authorization: bearer s3cret",
        "Authorization: ApiKey s3cret",
        "login failed, password: s3cret",
        "-----BEGIN PRIVATE KEY-----\ns3cret\n-----END PRIVATE KEY-----",
    ],
)
def test_errors_of_users_and_of_the_world_say_no_secrets(text):
    assert "s3cret" not in str(UserError(text)) and "s3cret" not in str(WorldError(text))
    assert str(ToolError(text)) == text, "the model reads what it will read when it is served"


@pytest.mark.parametrize(
    "text",
    [
        "world.tools.0.headers: header 'Authorization': expected a name and a value on one line",
        "override 'x': expected KEY=VALUE, for example optim.learning_rate=2e-5",
        "rollout.max_turn_tokens must be smaller than rollout.max_episode_tokens",
        "tool 'f': token: Input should be a string",
        "--judge-key-env KEY: expected --api-key or --token",
        "judge.api_key_env: the environment has no OPENAI_API_KEY; see https://h/docs/keys?page=2#token",
        "a basic 3-step plan, auth: HTTP 401, num_tokens: 120, author: B2, {'eos_token_id': 2}",
    ],
)
def test_what_an_error_explains_stays_as_it_is(text):
    assert str(UserError(text)) == text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (endpoint_of(headers={"X-Odd": 73311}), "grader.headers.X-Odd: Input should be a valid string"),
        (endpoint_of(headers="Bearer s3cret"), "grader.headers: Input should be a valid dictionary"),
        (endpoint_of(url="bob:s3cret@h"), "grader.url: expected a URL that begins with http:// or https://"),
        (mcp_of(args="--api-key s3cret"), "args: Input should be a valid list"),
        (judge_of(api_key_env="sk-s3cret"), "judge.api_key_env: expected the name of an environment variable"),
        (judge_of(api_key_env="s3cret s3cret"), "judge.api_key_env: expected the name of an environment variable"),
        (mcp_of(env={"PIN": 1, "PASSWORD": 73311}), "world.mcp.0.env.PASSWORD: Input should be a valid string"),
    ],
)
def test_a_config_that_is_refused_shows_no_secret(tmp_path, sections, said):
    with pytest.raises(UserError) as caught:
        validate_config(config_of(tmp_path, **sections), source="test")
    assert said in str(caught.value) and "s3cret" not in str(caught.value) and "73311" not in str(caught.value)


def test_what_is_logged_during_a_run_holds_no_secrets(tmp_path):
    log = LogFile(tmp_path / "run.log")
    make_record = logging.getLogRecordFactory()
    log.open()
    try:
        log.note("asking https://bob:s3cret@h")
        logging.getLogger("lib").warning("%s answered %d", "https://h/?token=s3cret", 500)
        try:
            raise ValueError("https://bob:s3cret@h")
        except ValueError:
            logging.getLogger("lib").exception("failed")
    finally:
        log.close()
    text = (tmp_path / "run.log").read_text()
    assert "asking https://${URL_USER}:${URL_PASSWORD}@h" in text
    assert logging.getLogRecordFactory() is make_record


def test_an_address_that_is_none_is_the_users_to_mend_and_shows_no_password():
    with pytest.raises(UserError, match=r"https://\$\{URL_USER\}:\$\{URL_PASSWORD\}@h:port: not a URL") as caught:
        HttpCaller(url="https://bob:s3cret@h:port", headers={}, limits=HttpLimits())
    assert "s3cret" not in str(caught.value)


NO_URLS = {"http://": "expected http://HOST:PORT", "https:///x": "expected http://HOST:PORT", "http://[::1": "IPv6"}
NO_URLS |= {"http://h:99999": "Port out of range", "http://a b": "expected http://HOST:PORT"}


@pytest.mark.parametrize("url", NO_URLS)
def test_what_no_server_could_be_asked_at_is_told_with_its_key_wherever_a_url_stands(url):
    def remote(**settings: Any) -> RemoteWorld:
        return RemoteWorld(RemoteConfig.model_validate({"type": "remote"} | settings))

    places: dict[str, Callable[[], Any]] = {
        "world.tools.0.server_url": lambda: remote(tools=[{"name": "a", "server_url": url}]),
        "world.open_url": lambda: remote(open_url=url),
        "world.user.url": lambda: UrlUsers(UrlUserConfig(type="url", url=url)),
        "grader 'e': url": lambda: EndpointGrader(EndpointConfig(type="endpoint", name="e", url=url)),
        "judge.base_url": lambda: OpenAIJudge(JudgeConfig.model_construct(base_url=url)).check(JudgeSampling()),
    }
    for key, make in places.items():
        with pytest.raises(UserError, match=f"^{re.escape(f'{key} {url}')}: not the URL of a server: .*{NO_URLS[url]}"):
            make()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "part", ["-", "sk-", "--a.", "a@", "a:b", 'token="', "--token ", "Authorization:", "https://a?b="]
)
def test_a_long_answer_of_a_server_is_searched_in_time_that_grows_with_its_length(part):
    text = part * (100_000 // len(part))
    assert len(hidden_in(text)) > 0 and len(str(without_secrets({"args": [text]}))) > 0


def test_the_value_that_a_variable_stood_for_is_said_nowhere(monkeypatch):
    monkeypatch.setenv("SHOP_API_KEY", "correct horse/battery")
    monkeypatch.setenv("SHOP_REGION", "north of the wall")
    monkeypatch.setenv("PLAIN_WORDS", "swordfish swordfish")
    resolve_headers({"X-Odd": "${PLAIN_WORDS}", "Accept": "application/vnd.shop"}, "here")
    resolve_headers({"X-Rollout": "${TRACE_ID}"}, "here", {"TRACE_ID": "rollout-of-its-own"})
    assert expand("${SHOP_API_KEY} ${SHOP_REGION}", "here") == "correct horse/battery north of the wall"
    for echoed in ("correct horse/battery", "correct%20horse%2Fbattery", "swordfish swordfish"):
        assert echoed not in str(WorldError(f"HTTP 400: you sent {echoed}!")), echoed
    for harmless in ("north of the wall", "application/vnd.shop", "rollout-of-its-own"):
        assert harmless in str(WorldError(f"HTTP 400: you sent {harmless}!"))
