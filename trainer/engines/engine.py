"""What samples: token ids in, token ids and log-probabilities out, new weights in between.

`trainer.engines.local` is vLLM in the run's own processes; `trainer.engines.custom` the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol, runtime_checkable

from trainer.config import ENGINES, EngineSettings, ModelConfig, RunConfig

PROBE_VERSION = -1
"""The version of the weights that prove, before the first policy is published, that the engine takes all of them."""


def version_name(version: int) -> str:
    """The name of a policy version, unique in a run: the key of vLLM's caches, and of folders of weights."""
    return "probe" if version == PROBE_VERSION else f"policy-v{version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine sampled for one turn."""

    token_ids: list[int]
    """Exactly as sampled, the stop token included."""
    logprobs: list[float]
    """Of each sampled token under the sampling distribution (after temperature), nats."""
    finished: bool
    """False when the turn was cut off at `max_tokens`."""
    policy_version: int
    """Updates that the weights had seen."""
    constrained_from: int | None = None
    """The first token that was sampled under the grammar of `Sampling.schema`; None where there is no schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one turn is sampled."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    version: int | None = None
    """The policy version to sample under, asked of an engine that `KeepsVersions`; None: the newest."""
    schema: str | None = None
    """A JSON schema that the text after the reasoning fits: all other tokens are masked before the softmax, in
    sampling and in the log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStart:
    """What an engine is told when it starts."""

    model_path: Path
    """The folder of the base model."""
    model: ModelConfig
    max_model_len: int
    """Tokens of the longest sequence, prompt and completion together."""
    stop_token_ids: Sequence[int]
    """Each ends a turn."""
    device: str
    """Where the trainer computes: cpu or cuda."""
    rank: int = 0
    """Of this process in the run; each has an engine of its own."""
    local_rank: int = 0
    """Of this process on its machine."""
    seed: int = 0
    """For draws that no request's seed decides: another for each process and each time that a run goes on."""
    num_versions: int = 1
    """How many policy versions turns are sampled under at once: the newest, and those before that are still asked for
    where rollouts run ahead of the training. Of account to an engine that `KeepsVersions`."""


class Sampler(Protocol):
    """What rollouts ask of an engine."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Sample one turn; any number at once. Raises `WorldError` when the request fails but the engine lives."""
        ...


class Engine(Sampler, Protocol):
    """Serves one policy version at a time to any number of concurrent requests.

    Made before the run, where that costs nothing, and started when the policy is loaded. What it may have besides
    stands below (`Sleeps`, `KeepsVersions`, `KeepsBase`, `ChecksRun`, `ChecksModel`) and in `envs.base` (`Counts`,
    `Closes`).
    """

    @property
    def runs_here(self) -> bool:
        """Whether it takes memory and processors of the trainer's machine. Known before the start."""
        ...

    @property
    def publishes_merged(self) -> bool:
        """Whether it is given the base's weights with the adapter merged into them. Known before the start.

        Else it is given the adapter alone, as PEFT writes it, which it applies to the base.
        """
        ...

    async def start(self, given: EngineStart) -> None:
        """Load the base model, which it serves until the first publish."""
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first given those before it, at temperature 1; length T - 1."""
        ...

    async def publish(self, weights: Path, version: int) -> None:
        """Serve the weights in this folder from now on; it is deleted once a later version is served.

        No request is running, unless it `KeepsVersions`: rollouts that run ahead wait between two turns. The first is
        `PROBE_VERSION`, which no turn is sampled with. Raises `PublishError`.
        """
        ...

    def shutdown(self) -> None:
        """Release what `start` took, also where that failed. May be called twice."""
        ...


@runtime_checkable
class Sleeps(Protocol):
    """An engine that can leave memory of the machine to the trainer."""

    async def sleep(self) -> None:
        """Called between a step's rollouts and its update. No request is running."""
        ...

    async def wake_up(self) -> None:
        """Called after the update, before anything else is asked."""
        ...


@runtime_checkable
class KeepsVersions(Protocol):
    """An engine that may go on serving the versions before the newest."""

    @property
    def keeps_versions(self) -> bool:
        """Whether it does. Known before the start.

        It is then given new weights while turns are sampled, each of which ends under the version with which it began,
        and serves the `EngineStart.num_versions` newest, which `Sampling.version` may name.
        """
        ...


def keeps_versions(engine: object) -> bool:
    """Whether an engine, or what stands before it, serves former versions beside the newest."""
    return isinstance(engine, KeepsVersions) and engine.keeps_versions


@runtime_checkable
class KeepsBase(Protocol):
    """An engine that can still be asked for what the base model says, whatever it serves."""

    async def generate_base(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        schema: Mapping[str, Any] | None,
    ) -> list[int]:
        """Tokens whose text fits the JSON schema, if any, the stop token included; cut off after `max_tokens`.

        Raises `WorldError` when the request fails but the engine lives, a prompt too long for it included.
        """
        ...


@runtime_checkable
class ChecksRun(Protocol):
    """An engine that can tell at once what of a run it can't serve."""

    def check_run(self, config: RunConfig) -> None:
        """Raises `UserError`; called before anything else of the run is looked at."""
        ...


@runtime_checkable
class ChecksModel(Protocol):
    """An engine that can tell before any weight is read whether it can serve the model."""

    def check_model(self, config: RunConfig, folder: Path, *, trains: bool) -> None:
        """Raises `UserError`. `folder` holds the model's config.json, its weights may be missing.

        `trains` is False where the run is only looked at, for another machine maybe.
        """
        ...


def make_engine(config: EngineSettings) -> Engine:
    """The engine that a config names, not started. Raises `UserError` for one that can't be had."""
    make: Callable[[EngineSettings], Engine] = resolve_name(f"trainer.engines.{ENGINES[config.type].engine}")
    return make(config)
