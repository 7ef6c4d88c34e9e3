"""Run folders written by hand: rollouts of two turns, and what the trainer gave their tokens."""

from __future__ import annotations

import json
from pathlib import Path

from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.types import Grade
from trainer.learning.samples import rollout_samples
from trainer.reports.transcripts.write import write_token_figures
from trainer.runs.files import append_line
from trainer.runs.records import rollout_to_json
from trainer.types import Ledger, Rollout

HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\u2028\u2029\ud800 \x00 & \"'"
)

PARTS = [[10, 11, 12], [20, 21], [13, 42], [42, 22]]
"""Prompt, sampled, a tool's result, sampled."""

LOGPROBS = [[-1.25, -0.125], [-0.5, -0.0625]]

TRAINER = [-1.0, -0.125, -0.75, -0.0625]


def word(token_id: int) -> str:
    return f" w{token_id}"


def make_rollout(
    rollout_id: str,
    *,
    reward: float | None = 1.0,
    output: str = "Revenue 42",
    stop: StopReason = StopReason.ANSWERED,
    tool: str = "search",
    error: ToolErrorKind | None = None,
    malformed: bool = False,
) -> Rollout:
    """Two turns; one row of the tokens above."""
    prompt = (Message(role="system", content="be brief"), Message(role="user", content="how much?"))
    call = ToolCall(call_id="c0", name=tool, arguments='{"query": "revenue"}')
    looking = Message(role="assistant", reasoning="I look it up", tool_calls=(call,))
    last = Message(role="assistant", content="42")
    result = ToolResult(call_id="c0", name=tool, output=output, error=error, latency_s=0.25, num_tokens=2)
    ledger = Ledger()
    for i, ids in enumerate(PARTS):
        if i % 2:
            ledger.append_sampled(ids, LOGPROBS[i // 2], 3)
        else:
            ledger.append_context(ids)
    episode = Episode(
        rollout_id=rollout_id,
        task_id=f"task of {rollout_id}",
        messages=(*prompt, looking, Message(role="tool", content=output, call_id="c0", name=tool), last),
        turns=(
            Turn(message=looking, results=(result,), num_tokens=2, generation_s=1.5, malformed=malformed),
            Turn(message=last, num_tokens=2),
        ),
        stop_reason=stop,
        latency_s=2.5,
    )
    grade = None if reward is None else Grade(reward=reward, parts={"numeric": reward}, explanation="as it should be")
    return Rollout(
        episode=episode,
        task=Task(task_id=episode.task_id, messages=prompt, item={"answer": "42"}),
        ledgers=(ledger,),
        grade=grade,
    )


def write_run(folder: Path, rollouts: dict[str, list[Rollout]], *, advantage: float | None = 0.5) -> Path:
    """A run folder with files such as rollouts/step-000001.jsonl; with `advantage`, also the updates' figures."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"run_id": "run-1"}))
    for name, made in rollouts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        for rollout in made:
            append_line(path, rollout_to_json(rollout))
        if advantage is not None and path.parent.name == "rollouts":
            samples = [
                s
                for r in made
                for s in rollout_samples(r.ledgers, advantage=advantage, rollout_id=r.episode.rollout_id, task_id="")
            ]
            write_token_figures(folder, int(path.name[5:11]), samples, [TRAINER] * len(samples))
    return folder
