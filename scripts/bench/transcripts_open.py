"""How long a person waits for the transcript viewer: a run of made-up rollouts, written and opened in a real browser.

    python scripts/bench/transcripts_open.py [--rollouts 5000] [--tokens 500] [--repeats 3] [--json FILE]

Opening is the time from the navigation's start until the list and the first transcript are on the screen, as the page
itself marks it, in a browser started anew each time. The other times are those from the key until the next screen:
another rollout out of another chunk, its tokens in colour, a filter over all rollouts. Last, the page is opened by a
link to the last rollout. The texts are random words and
the log-probabilities random numbers, which compress worse than a model's. Needs Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from browser import Browser, browser
from common import Figure, report, run_main

from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from graders.types import Grade
from trainer.learning.samples import rollout_samples
from trainer.reports.transcripts.write import write_token_figures, write_transcripts
from trainer.runs.files import append_line
from trainer.runs.records import rollout_to_json
from trainer.types import Ledger, Rollout

_VOCABULARY = 8000
_GROUP_SIZE, _TASKS_PER_STEP = 8, 8
_NUM_CALLS = 3
_TOOLS = ("search", "list", "cat")


def synthetic_run(folder: Path, *, num_rollouts: int, num_tokens: int) -> Path:
    """A run folder with so many rollouts of about so many tokens, with the figures of each update. Deterministic."""
    rng = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    (folder / "evals").mkdir()
    (folder / "run.json").write_text(json.dumps({"run_id": "synthetic"}))
    per_step = _GROUP_SIZE * _TASKS_PER_STEP
    for step, first in enumerate(range(0, num_rollouts, per_step)):
        # Every tenth step an evaluation, the first one included.
        kind = "evals" if step % 10 == 0 else "rollouts"
        made = list(_step(rng, step, min(per_step, num_rollouts - first), num_tokens))
        for rollout in made:
            append_line(folder / kind / f"step-{step:06d}.jsonl", rollout_to_json(rollout))
        if kind == "rollouts":
            samples = [
                s
                for r in made
                for s in rollout_samples(
                    r.ledgers, advantage=rng.gauss(0, 1), rollout_id=r.episode.rollout_id, task_id=r.task.task_id
                )
            ]
            trained = ([x for x, on in zip(s.logprobs, s.trainable, strict=True) if on] for s in samples)
            logprobs = [[min(0.0, x + rng.gauss(0, 0.04)) for x in of_row] for of_row in trained]
            write_token_figures(folder, step, samples, logprobs)
    return folder


def word(token_id: int) -> str:
    """The made-up text of a token."""
    letters = "etaoinshrdlucmfw"
    return " " + "".join(letters[(token_id >> shift) % 16] for shift in (0, 4, 8, 12))


def _step(rng: random.Random, step: int, count: int, num_tokens: int) -> Iterator[Rollout]:
    for i in range(count):
        if i % _GROUP_SIZE == 0:
            prompt = _words(rng, num_tokens // 4)
        task_id = f"task/{step}/{i // _GROUP_SIZE}"
        yield _rollout(rng, task_id, f"synthetic-step{step}-{i // _GROUP_SIZE}-{task_id}-{i}", prompt, num_tokens)


def _words(rng: random.Random, count: int) -> list[int]:
    return [int(rng.paretovariate(0.6)) % _VOCABULARY for _ in range(count)]


def _text(token_ids: Sequence[int]) -> str:
    return "".join(map(word, token_ids))


def _rollout(rng: random.Random, task_id: str, rollout_id: str, prompt: list[int], num_tokens: int) -> Rollout:
    messages = [Message(role="user", content=_text(prompt))]
    ledger, turns = Ledger(), list[Turn]()
    ledger.append_context(prompt)
    for k in range(_NUM_CALLS + 1):
        sampled = _words(rng, max(1, num_tokens // 10))
        # As a float32 comes out of the engine: mostly near certain, some far from it.
        ledger.append_sampled(sampled, [-(rng.random() ** 6) * 5 for _ in sampled], 0)
        call = ToolCall(call_id=f"c{k}", name=rng.choice(_TOOLS), arguments=json.dumps({"query": _text(sampled)}))
        is_call = k < _NUM_CALLS
        said = "" if is_call else _text(sampled)
        message = Message(role="assistant", content=said, tool_calls=(call,) if is_call else ())
        messages.append(message)
        results: tuple[ToolResult, ...] = ()
        if is_call:
            found = _words(rng, max(1, num_tokens // 9))
            ledger.append_context(found)
            results = (ToolResult(call_id=call.call_id, name=call.name, output=_text(found), latency_s=rng.random()),)
            messages.append(Message(role="tool", content=_text(found), call_id=call.call_id, name=call.name))
        turns.append(Turn(message=message, results=results, num_tokens=len(sampled), generation_s=rng.random()))
    episode = Episode(
        rollout_id=rollout_id,
        task_id=task_id,
        messages=tuple(messages),
        turns=tuple(turns),
        stop_reason=rng.choice((StopReason.ANSWERED, StopReason.MAX_TURNS)),
        latency_s=rng.random() * 20,
    )
    reward = rng.choice((0.0, 0.5, 1.0))
    grade = Grade(reward=reward, parts={"numeric": reward, "tool_calls": 0.0}, explanation="made up")
    return Rollout(episode=episode, task=Task(task_id=task_id, messages=(messages[0],)), ledgers=(ledger,), grade=grade)


def open_page(window: Browser, url: str) -> float:
    """Seconds until the list and the first transcript, or the one linked to, are on the screen."""
    window.open(url)
    window.wait("return document.documentElement.dataset.ready")
    return float(window.script("return performance.getEntriesByName('ready')[0].startTime")) / 1000


_TIMED = """
const done = arguments[arguments.length - 1];
(async () => {
  const start = performance.now(), detail = document.getElementById("detail");
  const changed = new Promise((then) => new MutationObserver((_, seen) => { seen.disconnect(); then(); })
    .observe(document.getElementById(arguments[0]), { childList: true, subtree: true, characterData: true }));
  document.getElementById(arguments[1]).dispatchEvent(arguments[2] === "input"
    ? new Event("input", { bubbles: true }) : new KeyboardEvent("keydown", { key: arguments[2], bubbles: true }));
  await changed;
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})();
"""


def timed(window: Browser, *, changes: str, target: str, key: str) -> float:
    """Seconds from the key on the element `target` until the element `changes` has changed and is painted."""
    return float(window.command("POST", "execute/async", {"script": _TIMED, "args": [changes, target, key]})) / 1000


def measure(page: Path) -> dict[str, float]:
    with browser() as window:
        times = {"opening": open_page(window, page.as_uri())}
        # The last rollout lies in another chunk than the first.
        times["another rollout"] = timed(window, changes="detail", target="list", key="End")
        times["its tokens"] = timed(window, changes="detail", target="list", key="t")
        window.script("document.getElementById('stop').value = 'answered'")
        link = str(window.script("return location.href"))
        times["a filter"] = timed(window, changes="count", target="filters", key="input")
        if errors := window.errors():
            raise RuntimeError(f"the page complains: {errors}")
    # The link's chunk stands at the end of the file: the browser must have read all of it.
    with browser() as window:
        times["opening by a link"] = open_page(window, link)
    return times


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rollouts", type=int, default=5000, help="how many (default 5000)")
    arguments.add_argument("--tokens", type=int, default=500, help="of each rollout, about (default 500)")
    arguments.add_argument("--repeats", type=int, default=3, help="measured after one warm-up (default 3)")
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="agent-rft-bench-") as name:
        folder = synthetic_run(Path(name) / "run", num_rollouts=given.rollouts, num_tokens=given.tokens)
        start = time.perf_counter()
        page = write_transcripts(folder, word)
        writing_s = time.perf_counter() - start
        measure(page)
        all_times = [measure(page) for _ in range(given.repeats)]
        size_mib = page.stat().st_size / 2**20
        version = window_version()
    figures = [
        Figure(
            name=name,
            unit="s",
            values=[times[name] for times in all_times],
            target=2 if name.startswith("opening") else None,
            target_is_ceiling=True,
        )
        for name in sorted(all_times[0], key=lambda name: not name.startswith("opening"))
    ]
    figures += [
        Figure(name="writing the page", unit="s", values=[writing_s]),
        Figure(name="the page", unit="MiB", values=[size_mib]),
    ]
    about = {"rollouts": given.rollouts, "tokens a rollout": given.tokens, "browser": version}
    report("Transcript viewer", figures, about=about, json_path=given.json)


def window_version() -> str:
    with browser() as window:
        return str(window.devtools("Browser.getVersion")["product"])


if __name__ == "__main__":
    sys.exit(run_main(main))
