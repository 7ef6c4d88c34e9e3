"""A world of this project behind the hosted protocols: tools and grader over HTTP, tasks and demonstrations as JSONL.

    python scripts/examples/finance_server.py --config configs/quickstart.yaml --write data/
    python scripts/examples/finance_server.py --config configs/quickstart.yaml --port 8001

The first writes train.jsonl, eval.jsonl (hosted rows) and conversations.jsonl (demonstrations for a warm start), the
second serves the tools (/call) and an endpoint grader (/grade). With both, and `configs/hosted.yaml`, the quickstart
runs over the network as a user's own world would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld, task_row
from envs.tools import call_tool
from envs.types import Task, ToolCall
from graders.hosted.reader import episode_from_sample
from graders.rules.numeric import NumericConfig, NumericGrader
from trainer.config import load_config

NUM_DEMONSTRATIONS = 128


def make_app(world: FinanceWorld) -> FastAPI:
    app = FastAPI()
    grader = NumericGrader(NumericConfig(type="numeric"))

    @app.post("/call")
    async def call(request: dict[str, Any]) -> dict[str, str]:
        arguments = request["arguments"]
        asked = ToolCall(
            call_id=request["call_id"],
            name=request["name"],
            arguments=arguments if isinstance(arguments, str) else json.dumps(arguments),
        )
        result = await call_tool(world.tools, asked, timeout_s=60)
        return {
            "type": "function_call_output",
            "id": request["id"],
            "call_id": request["call_id"],
            "output": result.output,
        }

    @app.post("/grade")
    async def grade(request: dict[str, Any]) -> dict[str, float]:
        item = request["item"]
        episode = episode_from_sample(request["sample"], rollout_id=request["trace_id"])
        task = Task(task_id=str(item.get("task_id", "")), messages=(), item=item)
        return {"score": (await grader.grade(task, episode)).reward}

    return app


def write_rows(world: FinanceWorld, folder: Path) -> None:
    """The tasks of both splits, and expert episodes of training tasks, as files of the hosted formats."""
    from trainer.tasks.expert import play_expert

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        _write(folder / f"{split}.jsonl", [task_row(task, world.tools) for task in world.tasks(split)])
    rows = []
    tasks = world.tasks("train")
    for seed in range(NUM_DEMONSTRATIONS):
        task = tasks[seed % len(tasks)]
        played = asyncio.run(play_expert(task, world.expert_episode(task, seed), world=world))
        rows.append({"messages": [m.to_openai() for m in played.messages], "tools": list(played.tools)})
    _write(folder / "conversations.jsonl", rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="its world is served")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--write", type=Path, help="write the rows into this folder and end")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if not isinstance(config.world, FinanceConfig):
        parser.error(f"--config {arguments.config}: its world is {config.world.type!r}; expected finance")
    world = FinanceWorld(config.world)
    if arguments.write:
        write_rows(world, arguments.write)
    else:
        uvicorn.run(make_app(world), host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
