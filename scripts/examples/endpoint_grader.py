"""An example endpoint grader: it joins what a rollout did at the tool server with its final answer.

    python scripts/examples/endpoint_grader.py --port 8002 --tools http://127.0.0.1:8001

POST /grade  {"sample", "item", "trace_id"} → {"score": number}

`sample.output_text` is the final answer, `item` the row of the data file, `trace_id` the rollout: the same that every
tool call carried. Here the score is 1 for the ordered cart with its total named, 0.5 for the cart alone, 0 otherwise.

A number is a judgement. When there can be none, because the tool server does not answer, say so with a 5xx: the request
is retried, and in the end the rollout is left out of the training, where a 0 would teach the model something false.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException

TIMEOUT_S = 10.0


def score(answer: str, item: dict[str, Any], state: dict[str, Any]) -> float:
    if state["cart"] != item["order"]:
        return 0.0
    numbers = re.findall(r"\d+", answer.replace(",", ""))
    # The only number of the answer: naming several to be on the safe side does not pay.
    return 1.0 if numbers == [str(state["total_cents"])] else 0.5


def make_app(tool_server: str) -> FastAPI:
    app = FastAPI()

    @app.post("/grade")
    async def grade(request: dict[str, Any]) -> dict[str, float]:
        try:
            async with httpx.AsyncClient(base_url=tool_server, timeout=TIMEOUT_S) as client:
                reply = await client.get("/state", params={"trace_id": request["trace_id"]})
                reply.raise_for_status()
        except httpx.HTTPError as e:
            raise HTTPException(503, f"the tool server does not answer: {e!r}") from e
        return {"score": score(request["sample"]["output_text"], request["item"], reply.json())}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8002)
    parser.add_argument("--tools", default="http://127.0.0.1:8001", metavar="URL", help="of the tool server")
    given = parser.parse_args()
    uvicorn.run(make_app(given.tools), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
