"""An example tool server: a small shop that keeps a cart for every rollout.

    python scripts/examples/tool_server.py --port 8001

It speaks the hosted service's protocol. Copy it and put your own tools in place of the three here.

POST /tools     one call: {"name", "arguments", "id", "trace_id", "item", ...} → {"output": "..."}
POST /rollouts  optional hooks (`open_url`, `close_url`): {"type": "rollout.open" | "rollout.close", "trace_id", ...}
GET  /state     ?trace_id=... → what the rollout did; `endpoint_grader.py` asks for it when it has the final answer

Three rules keep the rewards right:
- `trace_id` is one rollout. Everything a tool changes belongs to it, so that rollouts never see each other.
- A call may come twice with the same `id`: the first answer was lost on its way. It is carried out once.
- What the model should learn from is an `output` (or a 4xx). What is the server's own fault is a 5xx: the call is
  retried, and in the end the rollout is left out of the training; it is not taken for a bad one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException

CATALOGUE = {
    "P-10": ("blue pen", 120),
    "P-11": ("red pen", 135),
    "N-20": ("lined notebook", 340),
    "N-21": ("plain notebook", 310),
    "M-30": ("tea mug", 790),
    "L-40": ("desk lamp", 2450),
}
"""Name and price in cents by article number."""


@dataclass(slots=True)
class Rollout:
    """What one rollout has done so far."""

    cart: dict[str, int] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    """Outputs by the id of the call, for calls that come again."""


def search(rollout: Rollout, query: str) -> str:
    words = query.lower().split()
    hits = [f"{sku}: {name}, {cents} cents" for sku, (name, cents) in CATALOGUE.items() if set(words) & {*name.split()}]
    return "\n".join(hits) or f"nothing found for {query!r}"


def add_to_cart(rollout: Rollout, sku: str, pieces: int) -> str:
    if sku not in CATALOGUE:
        return f"error: no article {sku!r}"
    if pieces < 1:
        return "error: pieces must be at least 1"
    rollout.cart[sku] = rollout.cart.get(sku, 0) + pieces
    return view_cart(rollout)


def view_cart(rollout: Rollout) -> str:
    lines = [f"{pieces} x {CATALOGUE[sku][0]} at {CATALOGUE[sku][1]} cents" for sku, pieces in rollout.cart.items()]
    return "\n".join(lines) or "the cart is empty"


TOOLS: dict[str, Callable[..., str]] = {"search": search, "add_to_cart": add_to_cart, "view_cart": view_cart}


def make_app() -> FastAPI:
    app = FastAPI()
    rollouts: dict[str, Rollout] = {}

    @app.post("/tools")
    async def call(request: dict[str, Any]) -> dict[str, str]:
        if request["name"] not in TOOLS:
            raise HTTPException(404, f"no tool named {request['name']}")
        # Opened by its first call, where the hook is not used.
        rollout = rollouts.setdefault(request["trace_id"], Rollout())
        if request["id"] not in rollout.answered:
            arguments = request["arguments"]
            # The hosted service sends a string; a server may be written for an object too.
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            rollout.answered[request["id"]] = TOOLS[request["name"]](rollout, **arguments)
        return {
            "type": "function_call_output",
            "id": request["id"],
            "call_id": request["call_id"],
            "output": rollout.answered[request["id"]],
        }

    @app.post("/rollouts")
    async def hook(request: dict[str, Any]) -> dict[str, str]:
        # Both may come twice. A close may come for a rollout that never opened, or long after a run was killed.
        if request["type"] == "rollout.open":
            rollouts.setdefault(request["trace_id"], Rollout())
        else:
            rollouts.pop(request["trace_id"], None)
        return {}

    @app.get("/state")
    async def state(trace_id: str) -> dict[str, Any]:
        # A rollout that called no tool has an empty cart.
        cart = rollouts.get(trace_id, Rollout()).cart
        return {"cart": cart, "total_cents": sum(CATALOGUE[sku][1] * pieces for sku, pieces in cart.items())}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    given = parser.parse_args()
    uvicorn.run(make_app(), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
