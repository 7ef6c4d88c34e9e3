"""The scripted engine as an engine of a user's: `engine: {type: custom, target: tests.support.sweep_engine:scripted}`.

For runs of scripts/train.py itself that take seconds; `kwargs` are the world's settings, as the config has them.
"""

from __future__ import annotations

from typing import Any

from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld
from tests.support.scripted_engine import ScriptedEngine, finance_script


def scripted(**world: Any) -> ScriptedEngine:
    return ScriptedEngine(finance_script(FinanceWorld(FinanceConfig.model_validate({"type": "finance", **world}))))
