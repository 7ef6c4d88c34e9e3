"""A run's figures for Prometheus, under `/metrics`: those of metrics.jsonl as they were last, and how it is right now.

*Covered*: several processes, each with a port; figures that are no finite number (left out); counts of a world, which
are bounded by it. No task, no text of a model and no secret is a label. *Not covered*: who may ask; bind it to an
address that nobody else reaches, or put a proxy before it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from envs.clients.ports import FAULTS, check_free, refusal
from envs.errors import UserError
from envs.secrets import hidden_in
from trainer import processes
from trainer.config import RunConfig
from trainer.measures.exposition import LIVE, PREFIX, Family, families, family_of, finite
from trainer.measures.masked import masked_by
from trainer.models.machines import gpu_memory
from trainer.types import Kind, Rollout

_SIDES = {Kind.TRAIN: "train", Kind.EVAL: "eval"}
_KEY = "prometheus.port"
_MOST_OF_A_FAMILY = 500
"""A world of so many tools is told in part."""
Gauges = Callable[[], Mapping[str, float]]
"""Names of `LIVE` without their prefix, and what they are now; called in a thread of the server."""


class Exporter(Collector):
    """What is served. Told by the run; asked by any number of threads."""

    def __init__(self, *, run_id: str, model: str, num_steps: int, phase: Callable[[], str] = lambda: "") -> None:
        self._info = (run_id, hidden_in(model), importlib.metadata.version("agent-rft"))
        self._num_steps = num_steps
        self._phase = phase
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._step: int | None = None
        self._step_time: float | None = None
        self._counters: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._gauges: list[Gauges] = []

    def watch(self, *gauges: Gauges) -> None:
        """Ask these too from now on."""
        with self._lock:
            self._gauges += gauges

    def record(self, record: Mapping[str, Any], *, is_new: bool = True) -> None:
        """A line of metrics.jsonl; of a step that trained or of an evaluation, whose figures it takes the place of."""
        figures = finite(record)
        is_eval = any(key.startswith("eval/") for key in figures)
        with self._lock:
            self._records["eval" if is_eval else "train"] = figures
            if not is_eval:
                self._step = int(record["step"])
                self._step_time = time.time() if is_new else None

    def rollout(self, kind: Kind, rollout: Rollout) -> None:
        """One that came to its end."""
        side, episode = _SIDES[kind], rollout.episode
        outcomes = Counter(str(result.error or "ok") for turn in episode.turns for result in turn.results)
        outcomes["malformed"] += sum(turn.malformed for turn in episode.turns)
        masked = masked_by(rollout)
        with self._lock:
            self._counters["rollouts_done_total", (side,)] += 1
            self._counters["sampled_tokens_total", (side,)] += episode.num_tokens
            self._counters["turns_total", (side,)] += len(episode.turns)
            self._counters["retries_total", (side,)] += rollout.num_attempts - 1
            for outcome, n in outcomes.items():
                self._counters["calls_total", (side, outcome)] += n
            if masked is not None:
                self._counters["faults_total", (side, masked)] += 1

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """As prometheus_client asks for it."""
        known = {family.name: family for family in families()}
        told: dict[Family, list[tuple[tuple[str, ...], float]]] = {}
        with self._lock:
            records, counters, gauges = dict(self._records), dict(self._counters), list(self._gauges)
            now = self._now()
        for record in records.values():
            for key, value in record.items():
                family, labels = family_of(key)
                told.setdefault(known.get(family.name, family), []).append((labels, value))
        for ask in gauges:
            now |= {(name, ()): value for name, value in ask().items()}
        for (name, labels), value in (now | counters).items():
            told.setdefault(LIVE[f"{PREFIX}{name}"], []).append((labels, value))
        for family, samples in told.items():
            yield _metric(family, samples)

    def _now(self) -> dict[tuple[str, tuple[str, ...]], float]:
        now: dict[tuple[str, tuple[str, ...]], float] = {
            ("run_info", self._info): 1.0,
            ("steps_planned", ()): self._num_steps,
        }
        if phase := self._phase():
            now["phase_info", (phase,)] = 1.0
        if self._step is not None:
            now["step", ()] = self._step
        if self._step_time is not None:
            now["last_step_timestamp_seconds", ()] = self._step_time
        if (memory := gpu_memory()) is not None:
            now["gpu_memory_used_bytes", ()], now["gpu_memory_total_bytes", ()] = memory
        return now


def _metric(family: Family, samples: list[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily | CounterMetricFamily:
    kind = CounterMetricFamily if family.name.endswith("_total") else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, value in samples[:_MOST_OF_A_FAMILY]:
        metric.add_metric(labels, value)
    return metric


def check_port(config: RunConfig) -> None:
    """Raise `UserError` where a port of this machine's processes is taken, before anything is loaded.

    Of the processes that a launcher has started on it the first looks for all of them.
    """
    if config.prometheus is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for number in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        check_free(config.prometheus.host, config.prometheus.port + number, _KEY)


@contextlib.contextmanager
def exporting(
    config: RunConfig,
    *,
    run_id: str,
    records: Iterable[Mapping[str, Any]],
    phase: Callable[[], str],
) -> Iterator[Exporter | None]:
    """Serve until the end; None where the config asks for nothing. Every process of the run calls it.

    `records` are what metrics.jsonl holds already. Raises `UserError` on all of them where one can't serve.
    """
    if config.prometheus is None:
        yield None
        return
    exporter = Exporter(run_id=run_id, model=config.model.name, num_steps=config.optim.num_steps, phase=phase)
    for record in records:
        exporter.record(record, is_new=False)
    registry = CollectorRegistry()
    registry.register(exporter)
    ProcessCollector(registry=registry)
    port = config.prometheus.port + int(os.environ.get("LOCAL_RANK", "0"))
    faults: list[str] = []
    server = thread = None
    try:
        server, thread = start_http_server(port, config.prometheus.host, registry)
    except FAULTS as e:
        faults = [refusal(config.prometheus.host, port, _KEY, e)]
    try:
        if told := processes.gather(faults):
            raise UserError(told[0])
        yield exporter
    finally:
        if server is not None and thread is not None:
            server.shutdown()
            thread.join()
            server.server_close()
