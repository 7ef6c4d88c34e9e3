"""The keys of metrics.jsonl under the names that Prometheus gives things: `agent_rft_…`, with units and labels. Pure.

A key of rollouts, `train/…` or `eval/…`, has the label `rollouts`. What stands in capitals in docs/metrics.md is a
label of that name: `train/tool/search/calls` is `agent_rft_tool_calls{rollouts="train",name="search"}`. Seconds and
shares have the unit that Prometheus writes: `time/step_s` is `agent_rft_time_seconds{lap="step"}`, `groups/tied_share`
`agent_rft_groups_tied_ratio`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.measures.catalogue import CATALOGUE, COUNTS
from trainer.measures.reference import OTHERS

PREFIX = "agent_rft_"
OWN = f"{PREFIX}own"
"""What a reward function logs under a name of its own: the label `key`."""
_PLACE = re.compile(r"[A-Z]{2,}")
_SIDE = re.compile(r"(train|eval)/(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A name with its help; its figures differ in labels."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    family: Family


def family_of(key: str) -> tuple[Family, tuple[str, ...]]:
    """The family of a key of metrics.jsonl, and the values of its labels."""
    side = _SIDE.fullmatch(key)
    name, values = (side[2], (side[1],)) if side else (key, ())
    for rule in _rules():
        if (found := rule.pattern.fullmatch(name)) and ("rollouts" in rule.family.labels) == bool(side):
            return rule.family, (*values, *found.groups())
    return Family(name=OWN, help="what a reward function logs, by the key of metrics.jsonl", labels=("key",)), (key,)


def families() -> list[Family]:
    """Each that a run may have."""
    return list({rule.family.name: rule.family for rule in _rules()}.values())


def finite(record: Mapping[str, object]) -> dict[str, float]:
    """The figures of a line of metrics.jsonl; what is no finite number is left out, as if it were not there."""
    return {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step" and math.isfinite(v)}


LIVE = {
    family.name: family
    for family in (
        Family(name=f"{PREFIX}run_info", help="The run, always 1", labels=("run_id", "model", "version")),
        Family(name=f"{PREFIX}phase_info", help="What the run is at, always 1", labels=("phase",)),
        Family(name=f"{PREFIX}step", help="The last step that is done"),
        Family(name=f"{PREFIX}steps_planned", help="Steps that the config asks for"),
        Family(name=f"{PREFIX}last_step_timestamp_seconds", help="When the last step was done"),
        Family(name=f"{PREFIX}policy_version", help="Updates that the weights have seen which the engine serves"),
        Family(name=f"{PREFIX}rollouts_asked", help="Rollouts asked for that are not done, those ahead included"),
        Family(name=f"{PREFIX}rollouts_in_flight", help="Episodes that have begun and are not over"),
        Family(name=f"{PREFIX}rollouts_waiting", help="Episodes that wait for a place at the engine"),
        Family(name=f"{PREFIX}turns_in_flight", help="Turns that the engine is asked for"),
        Family(name=f"{PREFIX}turns_held", help="Turns that wait while new weights are loaded and proved"),
        Family(name=f"{PREFIX}gpu_memory_used_bytes", help="Of this process's GPU, the engine's part included"),
        Family(name=f"{PREFIX}gpu_memory_total_bytes", help="Of this process's GPU"),
        Family(name=f"{PREFIX}rollouts_done_total", help="Rollouts that came to their end", labels=("rollouts",)),
        Family(name=f"{PREFIX}sampled_tokens_total", help="Tokens that they generated", labels=("rollouts",)),
        Family(name=f"{PREFIX}turns_total", help="Turns of them", labels=("rollouts",)),
        Family(
            name=f"{PREFIX}calls_total",
            help="Their tool calls by outcome: ok, malformed, or what was wrong with the call",
            labels=("rollouts", "outcome"),
        ),
        Family(
            name=f"{PREFIX}faults_total",
            help="Rollouts without a grade by what failed, never the model's doing",
            labels=("rollouts", "kind"),
        ),
        Family(name=f"{PREFIX}retries_total", help="Further attempts at episodes and gradings", labels=("rollouts",)),
    )
}
"""What is told at the moment of asking, of the process that is asked; of the others nothing. Counters, by their ending,
count from the process's start."""


@functools.cache
def _rules() -> list[_Rule]:
    """What is written out before what has places in it, which might take the former for one."""
    rules = [
        _rule(
            m.key, f"{m.meaning or m.label}, mean over graded rollouts", of="rollout_", rollouts=True, share=m.is_share
        )
        for m in CATALOGUE
        if m.is_logged
    ]
    rules += [_rule(count.key, f"rollouts {count.meaning}", rollouts=True) for count in COUNTS]
    for heading, rows in OTHERS.items():
        of_rollouts = heading.startswith("of the rollouts")
        rules += [_rule(key, meaning, rollouts=of_rollouts, share=meaning.startswith("share")) for key, meaning in rows]
    return sorted(rules, key=lambda rule: rule.pattern.groups)


def _rule(key: str, meaning: str, *, of: str = "", rollouts: bool = False, share: bool = False) -> _Rule:
    places = [place.lower() for place in _PLACE.findall(key)]
    bare = "_".join(filter(None, re.split(r"[/_]+", _PLACE.sub("", key))))
    if bare.endswith("_per_s"):
        bare = f"{bare[:-2]}_per_second".replace("_per_per_", "_per_")
    elif bare == "s" or bare.endswith("_s"):
        bare = f"{bare[:-1]}seconds"
    elif bare.endswith("_share"):
        bare = f"{bare[:-6]}_ratio"
    elif share:
        bare = f"{bare}_ratio"
    text = meaning.replace("`", "")
    labels = ("rollouts", *places) if rollouts else tuple(places)
    pattern = re.compile("(.+)".join(re.escape(part) for part in _PLACE.split(key)))
    return _Rule(pattern, Family(name=f"{PREFIX}{of}{bare}", help=f"{text[:1].upper()}{text[1:]}", labels=labels))
