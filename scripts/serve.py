"""vLLM with the trained policy: `python scripts/serve.py runs/quickstart -- --port 8001`.

It is the run's own command: base, adapter, chat template and parsers of the training. The model is called `policy`, the
base goes by its own name. `--step` serves a checkpoint's policy, of which it leaves an export beside the run folder.
What stands behind `--` goes to vLLM. Exit code 2: something in the input is wrong, or the port is taken.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from program import UserError, run, say


def main() -> int:
    usage = "serve.py [-h] [--step N] run [-- VLLM ARGUMENTS]"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's policy of this step")
    given = sys.argv[1:]
    place = given.index("--") if "--" in given else len(given)
    arguments, unknown = parser.parse_known_args(given[:place])
    if unknown:
        parser.error(f"{' '.join(unknown)}: what is for vLLM stands behind --: RUN -- {' '.join(unknown)}")
    # vLLM warns while it is imported.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # Only now: --help and a misspelt option answer at once.
    from trainer.exports.serving import check_address, serve
    from trainer.exports.trained import find_trained

    more = given[place + 1 :]
    try:
        check_address(more)
        serve(find_trained(arguments.run, arguments.step), more)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    run(main)
