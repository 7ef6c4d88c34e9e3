"""The trained policy for others: `python scripts/export.py runs/quickstart --form merged`.

`adapter` is PEFT's format, for vLLM, SGLang and transformers; `merged` is the whole model as safetensors; `gguf` is for
llama.cpp. Each comes with tokenizer, chat template, generation config and a model card, in a folder beside the run's
or `--to` another. `--step` takes a checkpoint's policy instead of the final one. `--push OWNER/NAME` uploads it to the
Hugging Face hub.

`--deploy http://127.0.0.1:8000` puts the adapter into a vLLM server that runs, and proves that it answers as the
trained policy; a server that has the name already is only proved. Exit codes: 0 done, 2 something in the input is
wrong, there is no room, or a server is not what it should be, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from program import UserError, run, say

from envs.reading.variables import key_of

if TYPE_CHECKING:
    from trainer.exports.trained import Trained


def main() -> int:
    arguments = _parser().parse_args()
    # vLLM warns while it is imported.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # Only now: --help and a misspelt option answer at once.
    from trainer.exports.trained import find_trained

    try:
        _check_options(arguments)
        trained = find_trained(arguments.run, arguments.step)
        if arguments.deploy is not None:
            _deploy(trained, arguments)
        else:
            _export(trained, arguments)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's policy of this step")
    parser.add_argument("--form", choices=("adapter", "merged", "gguf"), help="default: adapter")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the run's own")
    parser.add_argument("--quantise", metavar="NAME", help="of a GGUF file, by llama.cpp's name: q8_0, q4_k_m, ...")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: beside the run folder, named after it")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="llama.cpp's source, for --form gguf")
    parser.add_argument("--push", metavar="ID", help="a repository of the hub to upload it to; private where it is new")
    server = parser.add_argument_group("into a server")
    server.add_argument("--deploy", metavar="URL", help="of a vLLM server that runs")
    server.add_argument("--name", help="of the model there (default: policy)")
    server.add_argument("--as-path", metavar="FOLDER", help="the adapter's folder as the server sees it")
    server.add_argument("--api-key-env", metavar="NAME", help="the variable that holds the server's key")
    return parser


def _check_options(arguments: argparse.Namespace) -> None:
    of_others = (
        ("form", "dtype", "quantise", "llama_cpp", "push") if arguments.deploy else ("name", "as_path", "api_key_env")
    )
    for name in of_others:
        if getattr(arguments, name) is not None:
            only = "not with --deploy, which takes the adapter" if arguments.deploy else "only with --deploy"
            raise UserError(f"--{name.replace('_', '-')}: {only}")


def _export(trained: Trained, arguments: argparse.Namespace) -> None:
    from trainer.exports.artefact import Artefact, export

    form: Any = arguments.form or "adapter"
    wanted = Artefact(
        form=form,
        dtype=arguments.dtype,
        quantise=arguments.quantise,
        to=arguments.to,
        llama_cpp=arguments.llama_cpp,
    )
    from trainer.exports.hub import claim, push

    repo_id = None if arguments.push is None else claim(arguments.push)
    folder = export(trained, wanted)
    say(f"{form:<10}{folder}")
    if repo_id is not None:
        say(f"{'pushed':<10}{push(folder, repo_id)}")


def _deploy(trained: Trained, arguments: argparse.Namespace) -> None:
    from envs.clients.urls import check_url
    from trainer.exports.artefact import servable
    from trainer.exports.commands import SERVED_NAME
    from trainer.exports.deploy import deploy

    check_url("--deploy", arguments.deploy)
    key = None
    if arguments.api_key_env is not None and not (key := key_of(arguments.api_key_env, "--api-key-env")):
        raise UserError(f"--api-key-env {arguments.api_key_env}: this variable is not set")
    folder = arguments.as_path or str(servable(trained, arguments.to))
    name = arguments.name or SERVED_NAME
    say(f"asking {arguments.deploy} for the canary's log-probabilities, of its base and of {name}", file=sys.stderr)
    proof = deploy(trained, arguments.deploy, folder, name=name, api_key=key)
    say(
        f"{name} on {arguments.deploy} answers as {arguments.run} after step {proof.step}: on {proof.num_tokens} tokens"
    )
    say(
        f"of the canary it differs from the trainer by {proof.mismatch:.3f} nats a token, and shows "
        f"{proof.share_of_base:.0%} of the trainer's change from the base model"
    )
    if proof.alike:
        say(f"the canary does not tell it from: step {', '.join(map(str, proof.alike))}")


if __name__ == "__main__":
    run(main)
