"""Talk to a run's agent, with its tools: `python scripts/chat.py runs/quickstart`.

Loads the run's newest adapter (`--step`: a checkpoint's) into an engine of its own, or asks the server of `--url` that
serves it (`vllm serve`, as the run's serve command starts it). The run folder is only read. Every turn, call and result
is shown, as the rollouts of training run them. `--task N` gives it the N-th of the run's tasks, `--grade` grades a
task's conversation when it ends. KEY=VALUE are values of the run's config. Exit codes: 0 done, 2 something in the input
is wrong, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from program import UserError, run, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example rollout.max_episode_tokens=8192")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's policy after so many steps")
    parser.add_argument("--url", help="of a server that serves the policy; no engine is started")
    parser.add_argument("--model", metavar="NAME", help="what the server calls it (default: policy, or its only one)")
    parser.add_argument("--api-key-env", default="VLLM_API_KEY", metavar="NAME", help="variable of the server's key")
    parser.add_argument("--task", type=int, metavar="N", help="begin with this task of the run's; /tasks lists them")
    parser.add_argument("--grade", action="store_true", help="grade a conversation when it ends, as the run does")
    parser.add_argument("--temperature", type=float, help="of the sampling (default: that of the run's evaluations)")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another each time)")
    arguments = parser.parse_intermixed_args()
    try:
        _chat(arguments)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _chat(arguments: argparse.Namespace) -> None:
    say(f"getting {arguments.run} ready, which takes half a minute or more", file=sys.stderr)
    # Only now: --help and a misspelt option answer at once.
    import secrets

    from trainer.talk.agent import Options, open_agent
    from trainer.talk.terminal import talk

    # vLLM warns while it is imported, before there is a log to write to.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    options = Options(
        run=arguments.run,
        step=arguments.step,
        url=arguments.url,
        model=arguments.model,
        api_key_env=arguments.api_key_env,
        overrides=arguments.overrides,
        temperature=arguments.temperature,
        seed=secrets.randbelow(2**31) if arguments.seed is None else arguments.seed,
        grades=arguments.grade,
        task=arguments.task,
    )
    with open_agent(options) as agent:
        talk(agent)


if __name__ == "__main__":
    run(main)
elif __name__ == "__mp_main__":
    # In a process of the engine: a terminal's Ctrl-C ends a turn, and is not for it to hear.
    os.setpgrp()
