"""The engine of docs/adding.md, as it is written there: a client of `vllm serve`, trained over and found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.errors import PublishError
from tests.support.configs import scripted_config
from tests.support.recipes import recipe
from tests.support.servers import VLLM, running_vllm
from trainer.config import RunConfig
from trainer.runs.files import read_lines
from trainer.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.usefixtures("one_thread")]

FORGETFUL = """

class Forgetful(ServedEngine):
    "The server loads each adapter, and is asked for the base model all the same."
    async def publish(self, weights, version):
        await super().publish(weights, version)
        self._name = self._base
"""


@pytest.fixture(scope="module")
def adapted(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server that takes adapters while it runs."""
    command = [*VLLM, "--model", str(taught_model), "--dtype", "float32", "--enable-lora", "--max-lora-rank", "8"]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--max-num-seqs", "8"]
    # On the CPU a seeded request that is prefilled in chunks crashes vLLM 0.31.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
        with running_vllm(command, tmp_path_factory.mktemp("adapted") / "log") as address:
            yield address


def config(folder: Path, model: Path, url: str, name: str) -> RunConfig:
    [(file, _, text)] = recipe("An engine of your own")
    (folder / file).write_text(text + FORGETFUL)
    engine = {"type": "custom", "target": f"{folder / file}:{name}", "kwargs": {"url": url}}
    settings = {"optim": {"num_steps": 2, "learning_rate": 1e-2}, "eval": {"num_tasks": 1, "samples_per_task": 1}}
    # The model is seldom right: what it is paid for is brevity.
    settings |= {"penalties": {"tool_calls": {"free": 0, "slope": 0.1, "floor": -0.4}}, "engine": engine}
    return RunConfig.model_validate(scripted_config(folder / "run", model, **settings))


def test_a_run_over_a_server_is_proved_and_trains(adapted: str, taught_model: Path, tmp_path: Path) -> None:
    folder = train(config(tmp_path, taught_model, adapted, "ServedEngine"))
    steps = [line for line in read_lines(folder / "metrics.jsonl") if "canary/mismatch" in line]
    assert len(steps) == 2 and all(step["canary/mismatch"] < 0.01 for step in steps)
    assert steps[-1]["canary/applied_since_model"] > 0.9 and steps[-1]["loss/mismatch_abs"] < 0.01
    assert {v for row in read_lines(folder / "rollouts" / "step-000002.jsonl") for v in _versions(row)} == {1}


def _versions(row: dict[str, list[dict[str, list[list[int]]]]]) -> Iterator[int]:
    for ledger in row["ledgers"]:
        yield from (version for _, _, version in ledger["sampled"])


def test_a_client_that_asks_the_server_for_another_model_is_found_out(
    adapted: str, taught_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PublishError, match="still answers as the base model"):
        train(config(tmp_path, taught_model, adapted, "Forgetful"))
