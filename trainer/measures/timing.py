"""Where the wall-clock time of a step goes."""

from __future__ import annotations

import time
from enum import StrEnum

from trainer.types import Metrics


class Lap(StrEnum):
    """A part of a step, by which `metrics.jsonl` names its time: `time/rollouts_s`."""

    ROLLOUTS = "rollouts"
    TRAINING = "training"
    PUBLISH = "publish"
    CHECKPOINT = "checkpoint"


class Stopwatch:
    """Splits a step's wall-clock time into laps."""

    def __init__(self) -> None:
        self._start = self._lap_start = time.perf_counter()
        self._laps_s: dict[Lap, float] = {}

    def lap(self, name: Lap) -> None:
        """What has passed since the last lap belongs to `name`."""
        now = time.perf_counter()
        self._laps_s[name] = now - self._lap_start
        self._lap_start = now

    def metrics(self, *, num_sampled_tokens: int, num_trained_tokens: int, overlaps: bool = False) -> Metrics:
        """`time/…_s` of each lap and of the step, the share outside rollouts and training, tokens a second.

        `overlaps`: rollouts go on during all of a step, so that all of it is their time.
        """
        step_s = time.perf_counter() - self._start
        work_s = self._laps_s[Lap.ROLLOUTS] + self._laps_s[Lap.TRAINING]
        return {f"time/{name}_s": seconds for name, seconds in self._laps_s.items()} | {
            "time/step_s": step_s,
            "time/other_share": 1 - work_s / step_s,
            "throughput/sampled_tokens_per_s": num_sampled_tokens
            / (step_s if overlaps else self._laps_s[Lap.ROLLOUTS]),
            "throughput/trained_tokens_per_s": num_trained_tokens / self._laps_s[Lap.TRAINING],
        }
