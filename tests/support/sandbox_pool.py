"""A pool of sandboxes that runs the code of its gradings."""

from __future__ import annotations

import json

from graders.sandbox.isolation import Imports, Isolation
from graders.sandbox.pool import Pool
from graders.sandbox.protocol import Limits

SOURCE = """
def grade(sample, item):
    space = {}
    exec(item["code"], space)
    return space["f"]()
"""


def pool_of(way: Isolation, imports: Imports = (), num_workers: int = 1, **limits: float) -> Pool:
    return Pool(SOURCE, imports, isolation=way, limits=Limits(**{"wall_s": 60, **limits}), num_workers=num_workers)


async def ran(pool: Pool, code: str) -> dict[str, object]:
    outcome = await pool.run(json.dumps({"sample": {}, "item": {"code": code}}).encode())
    return json.loads(outcome.result or "{}")
