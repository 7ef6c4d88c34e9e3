"""Configs of runs that take seconds."""

from __future__ import annotations

from pathlib import Path


def scripted_config(folder: Path, model: Path, /, **sections: dict[str, object]) -> dict[str, object]:
    """A config for the scripted engine: short finance episodes on the tiny model. `sections` adds to its sections."""
    config: dict[str, dict[str, object]] = {
        "model": {"name": str(model), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "world": {
            "type": "finance",
            "num_companies": 8,
            "num_train_tasks": 3,
            "num_eval_tasks": 3,
            "question_mix": {"value": 1.0},
            "detour_calls": 0,
        },
        "grader": {"type": "numeric"},
        "penalties": {"tool_calls": {"free": 2, "slope": 0.04, "floor": -0.2, "only_passing": True}},
        "rollout": {
            "tasks_per_step": 2,
            "group_size": 4,
            "max_turns": 5,
            "max_tool_calls": 4,
            "max_turn_tokens": 96,
            "max_episode_tokens": 1000,
        },
        "optim": {"num_steps": 3, "learning_rate": 1e-2},
        "eval": {"num_tasks": 2, "samples_per_task": 1},
    }
    return {"output_dir": str(folder)} | {k: config.get(k, {}) | sections.get(k, {}) for k in config | sections}
