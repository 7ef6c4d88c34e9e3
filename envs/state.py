"""What an environment tells graders of its final state."""

from __future__ import annotations

import json
from typing import Any

from envs.base import Env, of_env
from envs.errors import WorldError
from envs.limits.clocks import time_limit


async def read_state(env: Env, *, timeout_s: float) -> dict[str, Any]:
    """The state as JSON values; empty where the environment tells none.

    Raises `WorldError` where it does not answer in time, and plain errors, with a note, for what is no JSON: a bug.
    """
    final_state = of_env(env, "final_state")
    if final_state is None:
        return {}
    try:
        async with time_limit(timeout_s) as limit:
            state = await final_state()
    except TimeoutError:
        if not limit.expired():
            raise
        raise WorldError(f"final_state: no answer within {timeout_s:g} s") from None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(state), allow_nan=False))
    except (TypeError, ValueError) as e:
        e.add_note("final_state must give a mapping of JSON values")
        raise
    return plain
