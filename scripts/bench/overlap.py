"""What a step takes where rollouts run ahead of the training, against the slower of the two sides.

    python scripts/bench/overlap.py [KEY=VALUE ...] [--rollouts-s 4] [--training-s 4] [--steps 8] [--ahead 0 1 2]

Whole runs over an engine and a loss of stated speeds: every token takes as long, turns of one step differ in length by
a factor of three, and the longest takes ROLLOUTS-S; an update takes TRAINING-S on top of its own time. Both only wait,
so that they do not share this machine's cores. Sides are those of the run without overlap: its rollouts, and the rest
of its step (training, publishing, proof, checkpoint). First and last steps are left out: nothing runs beside them, or
too much has run ahead.

*Not covered*: engine and trainer on the same cores or card, where the sum of the work is what it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import Figure, parser, report, run_main
from random_model import write_random_model

from envs.errors import UserError
from trainer.config import load_config
from trainer.engines.engine import Completion, EngineStart, Sampling

_TOKENS = (16, 48)
_CONFIG = """
engine: {{type: custom, target: "{here}:Sleeper", kwargs: {{token_s: {token_s}}}}}
loss: {{type: custom, target: "{here}:SlowLoss", kwargs: {{seconds: {training_s}}}}}
model: {{name: "{model}", dtype: float32, lora: {{r: 4, alpha: 8}}}}
data: {{train: "{rows}", eval: "{rows}"}}
grader: {{type: string_check, name: g, operation: ilike, input: "{{{{sample.output_text}}}}", reference: "yes"}}
rollout: {{tasks_per_step: 4, group_size: 4, max_turns: 1, max_turn_tokens: 64, max_episode_tokens: 256}}
eval: {{num_tasks: 1, samples_per_task: 1}}
trackers: []
"""


class Sleeper:
    """An engine that answers yes or no after so long a token as it was told. Exact in what it says of the canary."""

    runs_here = True
    publishes_merged = False
    keeps_versions = False

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._version = 0
        self._adapted: Any = None

    async def start(self, given: EngineStart) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.model_path)
        self._words = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no", " so")]
        self._stop = given.stop_token_ids[0]
        self._base = AutoModelForCausalLM.from_pretrained(given.model_path, dtype=torch.float32).eval()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        rng, version = random.Random(sampling.seed), self._version
        answer, filler = self._words[rng.random() < 0.5], self._words[2]
        num_tokens = rng.randint(*_TOKENS)
        token_ids = [*(answer + filler * num_tokens)[: num_tokens - 1], self._stop]
        await asyncio.sleep(num_tokens * self._token_s)
        return Completion(token_ids=token_ids, logprobs=[-1.0] * num_tokens, finished=True, policy_version=version)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        import torch

        ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            logprobs = (self._adapted or self._base)(ids).logits[0, :-1].float().log_softmax(-1)
        scores: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return scores

    async def publish(self, weights: Path, version: int) -> None:
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(self._base, weights)
        set_peft_model_state_dict(self._adapted, load_file(weights / "adapter_model.safetensors"))
        self._version = version

    def shutdown(self) -> None: ...


class SlowLoss:
    """The plain policy gradient, that long after it was asked."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, inputs: Any) -> tuple[Any, dict[str, Any]]:
        # Not when it is tried on a few tokens, before the run.
        if len(inputs.logprobs_N) > _TOKENS[1]:
            time.sleep(self._seconds)
        return -(inputs.logprobs_N * inputs.advantages_N * inputs.weights_N).sum(), {}


def steps_of(folder: Path, ahead: int) -> list[Mapping[str, float]]:
    """The metrics of the steps beside which something ran."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step_s" in row]
    return steps[1 + ahead : len(steps) - ahead]


def figures_of(steps: Mapping[int, Sequence[Mapping[str, float]]]) -> list[Figure]:
    """Of each number of steps ahead, 0 among them: how long a step takes, and who waits."""
    rollouts = [row["time/rollouts_s"] for row in steps[0]]
    rest = [row["time/step_s"] - row["time/rollouts_s"] for row in steps[0]]
    slower_s = max(median(rollouts), median(rest))
    out = [Figure(name="rollouts alone", unit="s", values=rollouts), Figure(name="the rest", unit="s", values=rest)]
    for ahead, rows in steps.items():
        times = [row["time/step_s"] for row in rows]
        out.append(Figure(name=f"step, {ahead} ahead", unit="s", values=times))
        shares = [s / slower_s for s in times]
        target = 1.1 if ahead else None
        out.append(
            Figure(
                name=f"of the slower side, {ahead} ahead",
                unit="ratio",
                values=shares,
                target=target,
                target_is_ceiling=True,
            )
        )
        for key, what in (
            ("time/waiting_for_rollouts_s", "trainer waits"),
            ("time/waiting_for_trainer_s", "engine waits"),
            ("staleness/mean", "staleness"),
        ):
            if all(key in row for row in rows):
                unit = "updates" if what == "staleness" else "s"
                out.append(Figure(name=f"{what}, {ahead} ahead", unit=unit, values=[row[key] for row in rows]))
    return out


def main() -> None:
    out = parser(__doc__)
    out.add_argument("--rollouts-s", type=float, default=4.0, help="the longest turn, seconds (default 4)")
    out.add_argument("--training-s", type=float, default=4.0, help="an update, seconds (default 4)")
    out.add_argument("--steps", type=int, default=8, help="of each run (default 8)")
    out.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2], help="values of overlap.max_staleness")
    arguments = out.parse_args()
    if arguments.run or arguments.config:
        raise UserError("--run and --config: have no effect here; the run is made of stated speeds")
    from trainer.train import train

    steps: dict[int, list[Mapping[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="agent-rft-bench-") as temporary:
        folder = Path(temporary)
        write_random_model(folder / "model", on_cpu=True)
        row = {"messages": [{"role": "user", "content": "Is it so?"}]}
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
        (folder / "config.yaml").write_text(
            _CONFIG.format(
                here=Path(__file__).resolve(),
                token_s=arguments.rollouts_s / _TOKENS[1],
                training_s=arguments.training_s,
                model=folder / "model",
                rows=folder / "rows.jsonl",
            )
        )
        for ahead in sorted({0, *arguments.ahead}):
            run = folder / f"ahead-{ahead}"
            own = [f"output_dir={run}", f"optim.num_steps={arguments.steps}", f"overlap.max_staleness={ahead}"]
            train(load_config(folder / "config.yaml", [*arguments.overrides, *own]))
            steps[ahead] = steps_of(run, ahead)
    about = {"rollouts": f"{arguments.rollouts_s:g} s", "training": f"{arguments.training_s:g} s"}
    report("A step where rollouts run ahead of the training", figures_of(steps), about=about, json_path=arguments.json)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
