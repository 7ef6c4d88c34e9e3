"""The quickstart's world is the measured one: digests of all that its policy was trained on.

Covered: texts, tasks of both splits, tool schemas, what the tools answer, expert episodes, for the quickstart's config
and for the defaults. Not covered: the keys of the config itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import yaml

from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld, task_row
from envs.tools import call_tool
from envs.types import ToolCall
from tests.support import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CALLS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("search", {"query": q})
        for q in ("Maple Foods 2014 revenue", "2014 debt", "Asia", "steel employees", "xyzzy", "")
    ),
    *(("list", {"path": p}) for p in ("/", "", "nowhere", "a/b/c")),
    *(("cat", {"path": p}) for p in ("nowhere", "/etc/passwd", "x" * 99)),
    ("cat", {"path": "a", "page": 2}),
    *(("calculate", {"expression": e}) for e in ("1 + 1", "2 / 3", "1 / 0", "x", "1,234.5 * 2")),
]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


async def output(world: FinanceWorld, name: str, arguments: dict[str, Any]) -> str:
    call = ToolCall(call_id="c", name=name, arguments=json.dumps(arguments))
    return (await call_tool(world.make_env().tools, call, timeout_s=30)).output


async def digests(config: FinanceConfig) -> dict[str, str]:
    world = FinanceWorld(config)
    tasks = [*world.tasks("train"), *world.tasks("eval")]
    calls = [*CALLS]
    for path in world.texts:
        folder, _, name = path.partition("/")
        words = f"{folder.replace('-', ' ')} {name.removesuffix('.txt')}"
        calls += [("cat", {"path": path}), ("list", {"path": folder}), ("search", {"query": words})]
        calls += [("search", {"query": f"{words} debt"}), ("search", {"query": f"employees {name}"})]
    return {
        "texts": digest(dict(world.texts)),
        "tasks": digest([task_row(task, world.tools) for task in tasks]),
        "tools": digest([tool.schema() for tool in world.tools.values()]),
        "outputs": digest([await output(world, name, arguments) for name, arguments in calls]),
        "experts": digest([world.expert_episode(task, seed) for task in tasks for seed in range(5)]),
    }


MEASURED = {
    "quickstart": {
        "texts": "c41758d5937a64c5",
        "tasks": "95046cbbee69a4fe",
        "tools": "df187311e2a6719c",
        "outputs": "2bc802e1a7b31c4d",
        "experts": "eae899f2b2c8a7f1",
    },
    "defaults": {
        "texts": "c41758d5937a64c5",
        "tasks": "7c77630d2949a84e",
        "tools": "df187311e2a6719c",
        "outputs": "48358f10bea9305d",
        "experts": "72f38c07ef96bc49",
    },
}


@pytest.mark.parametrize("name", MEASURED)
async def test_the_quickstarts_world_is_the_measured_one(name: str) -> None:
    settings = yaml.safe_load(QUICKSTART.read_text())["world"] if name == "quickstart" else {}
    assert await digests(FinanceConfig.model_validate(settings)) == MEASURED[name]
