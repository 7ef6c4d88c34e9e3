"""Gradings a second of the sandboxed `python` grader with a trivial source, and what one costs in CPU time.

    python scripts/bench/sandbox_throughput.py [--gradings 400] [--workers N] [--repeats 3] [--json FILE]

All gradings are asked for at once; the workers (one for each usable core by default) are up before the clock starts.
CPU time is the trainer's and the workers' together, gradings included: on a machine that others use it says more than
the rate. The worker that is the first to start is timed alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import time
from pathlib import Path

from common import Figure, report, run_main

from graders.sandbox.isolation import choose
from graders.sandbox.pool import Pool
from graders.sandbox.protocol import Limits

_SOURCE = "def grade(sample, item):\n    return float(sample['output_text'] == item['answer'])\n"
_PAYLOAD = b'{"sample": {"output_text": "42"}, "item": {"answer": "42"}}'
_TARGET_PER_S = 200.0


async def measure(gradings: int, workers: int) -> tuple[float, float]:
    """Seconds to the first score, then gradings a second."""
    pool = Pool(_SOURCE, [], isolation=choose(), limits=Limits(), num_workers=workers)
    try:
        start = time.perf_counter()
        await pool.run(_PAYLOAD)
        first_s = time.perf_counter() - start
        await asyncio.gather(*(pool.run(_PAYLOAD) for _ in range(8 * workers)))
        start = time.perf_counter()
        outcomes = await asyncio.gather(*(pool.run(_PAYLOAD) for _ in range(gradings)))
        rate = gradings / (time.perf_counter() - start)
        assert all(outcome.result == '{"score": 1.0}' for outcome in outcomes)
    finally:
        await pool.aclose()
    return first_s, rate


def cpu_s() -> float:
    """This process's and that of all that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main(arguments: argparse.Namespace) -> None:
    rows = []
    for _ in range(arguments.repeats):
        # Workers count when they have ended: a short run's CPU time is what starting them costs.
        marks = [cpu_s()]
        for gradings in (1, arguments.gradings):
            measured = asyncio.run(measure(gradings, arguments.workers))
            marks.append(cpu_s())
        cost_ms = 1e3 * ((marks[2] - marks[1]) - (marks[1] - marks[0])) / (arguments.gradings - 1)
        rows.append((*measured, cost_ms))
    firsts, rates, costs = (list(column) for column in zip(*rows, strict=True))
    figures = [
        Figure(name="trivial gradings", unit="1/s", values=rates, target=_TARGET_PER_S),
        Figure(name="CPU time of a grading", unit="ms", values=costs),
        Figure(name="first score, worker's start included", unit="s", values=firsts),
    ]
    about = {"isolation": str(choose()), "workers": arguments.workers, "gradings": arguments.gradings}
    report("The sandboxed python grader", figures, about=about, json_path=arguments.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradings", type=int, default=400)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    sys.exit(run_main(lambda: main(parsed)))
