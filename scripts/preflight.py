"""Is it worth training? `python scripts/preflight.py --config configs/quickstart.yaml --tasks 32`.

Rolls out some training tasks several times with the policy that training would start from (after the config's warm
start; `warmstart=null` measures the bare model, `--adapter` or `--run` a trained one), and says what that means:
rewards, variance, pass@k, calls, tokens, failures, time, memory and plain advice. Writes a page and a JSON file.

`--estimate-only --gpu H100 --gpus 8` runs nothing and needs no weights: it computes memory and time of the configured
run on such GPUs from the model's config.json and the data sheet. Exit codes as `scripts/train.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from program import UserError, console, run, say

if TYPE_CHECKING:
    from trainer.config import RunConfig


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    # vLLM warns while it is imported, before there is a log to write to.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        config = _config(arguments)
        if arguments.estimate_only:
            _print_estimate(config, arguments)
        else:
            _refuse_estimate_options(arguments)
            _preflight(config, arguments)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; with --run it defaults to the run's own")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config, e.g. rollout.group_size=16")
    parser.add_argument("--tasks", type=int, default=32, metavar="N", help="training tasks, drawn by seed (default 32)")
    parser.add_argument("--held-out", action="store_true", help="measure on the evaluation's tasks instead")
    parser.add_argument("--samples", type=int, metavar="K", help="rollouts of each (default: rollout.group_size)")
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--adapter", type=Path, metavar="FOLDER", help="measure this adapter")
    policy.add_argument("--run", type=Path, help="measure this run's newest adapter")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the run folder's name with -preflight")
    parser.add_argument("--gpu-hour-price", type=float, metavar="PRICE", help="of one GPU; gives the run's cost")
    parser.add_argument("--gpus", type=int, default=1, help="that the run will have (default 1)")
    parser.add_argument("--estimate-only", action="store_true", help="compute memory and time; load and run nothing")
    only = parser.add_argument_group("for --estimate-only")
    only.add_argument(
        "--gpu", metavar="NAME", help="H200, H100, A100 or L40S, by its data sheet (default: this machine)"
    )
    only.add_argument("--gpu-memory-gib", type=float, metavar="GIB", help="of a GPU that is not in the table")
    only.add_argument("--gpu-tflops", type=float, metavar="TFLOPS", help="its dense bf16 TFLOP/s")
    only.add_argument("--gpu-bandwidth", type=float, metavar="GB/S", help="its memory bandwidth")
    only.add_argument("--episode-calls", type=float, metavar="N", help="assumed tool calls of a rollout (default 5.55)")
    only.add_argument("--episode-generated", type=float, metavar="N", help="assumed generated tokens (default 2000)")
    only.add_argument("--episode-row", type=float, metavar="N", help="assumed tokens with prompt and tool results")
    return parser


def _config(arguments: argparse.Namespace) -> RunConfig:
    from envs.errors import told_of
    from trainer.config import load_config
    from trainer.runs.about import check_run_folder

    run: Path | None = arguments.run
    if run is not None:
        with told_of("--run"):
            check_run_folder(run, "config.yaml")
    path: Path | None = arguments.config or (run and run / "config.yaml")
    if path is None:
        raise UserError("--config: required, but for --run")
    return load_config(path, arguments.overrides)


def _preflight(config: RunConfig, arguments: argparse.Namespace) -> None:
    from trainer.preflight.measured import Options, preflight
    from trainer.preflight.page import render_preflight, write_preflight_page
    from trainer.runs.manifest import adapter_of

    out = arguments.out or config.output_dir.with_name(f"{config.output_dir.name}-preflight")
    options = Options(
        out=out,
        num_tasks=arguments.tasks,
        held_out=arguments.held_out,
        samples=arguments.samples,
        adapter=adapter_of(arguments.run) if arguments.run else arguments.adapter,
        gpu_hour_price=arguments.gpu_hour_price,
        gpus=arguments.gpus,
    )
    found = preflight(config, options)
    page = write_preflight_page(found, out / "preflight.html")
    console().print(render_preflight(found))
    for name, path in (("page", page), ("figures", out / "preflight.json"), ("rollouts", out / "rollouts.jsonl")):
        say(f"{name:<10}{path}")


def _refuse_estimate_options(arguments: argparse.Namespace) -> None:
    """A preflight measures; what it would assume of another GPU it does not use."""
    for name in (
        "gpu",
        "gpu_memory_gib",
        "gpu_tflops",
        "gpu_bandwidth",
        "episode_calls",
        "episode_generated",
        "episode_row",
    ):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: only with --estimate-only")


def _print_estimate(config: RunConfig, arguments: argparse.Namespace) -> None:
    from trainer.models.machines import find_gpu
    from trainer.preflight.computed import Assumptions, estimate_only
    from trainer.preflight.page import render_estimate

    gpu = find_gpu(
        arguments.gpu,
        memory_gib=arguments.gpu_memory_gib,
        tflops=arguments.gpu_tflops,
        bandwidth_gb_per_s=arguments.gpu_bandwidth,
    )
    assumptions = Assumptions(
        gpu=gpu,
        gpus=arguments.gpus,
        gpu_hour_price=arguments.gpu_hour_price,
        tool_calls=arguments.episode_calls,
        generated_tokens=arguments.episode_generated,
        row_tokens=arguments.episode_row,
    )
    console().print(render_estimate(estimate_only(config, assumptions)))


if __name__ == "__main__":
    run(main)
