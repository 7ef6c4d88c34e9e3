"""Graders to name as the `target` of a `custom` grader."""

from __future__ import annotations

from envs.custom.trl_env import live_environment
from envs.errors import Unscored, UserError
from envs.types import Episode, Task
from envs.user_code import call_user


class EnvReward:
    """What the rollout's own TRL-style environment gives as `get_reward()`; its state is gone when the rollout ends.

    None passes the rollout over (`Unscored`). Raises `UserError` where the environment has no `get_reward`.
    As a grader: `{"type": "custom", "target": "graders.custom:EnvReward"}`.
    """

    async def grade(self, task: Task, episode: Episode) -> float:
        environment = live_environment(episode.rollout_id)
        get_reward = getattr(environment, "get_reward", None)
        if get_reward is None:
            raise UserError(
                "grader.target 'graders.custom:EnvReward': expected a world of type custom with a TRL-style "
                f"environment that has get_reward; rollout {episode.rollout_id!r} has none"
            )
        reward: float | None = await call_user(get_reward)
        if reward is None:
            raise Unscored("get_reward gave None")
        return reward
