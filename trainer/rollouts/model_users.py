"""Simulated users that are models: behind a server, or the run's own base model."""

from __future__ import annotations

from collections.abc import Sequence

from envs.errors import UserError, WorldError
from envs.settings import WorldSettings
from envs.types import Task
from envs.users import (
    EngineUserConfig,
    Exchange,
    ModelUserConfig,
    ScriptUserConfig,
    ScriptUsers,
    UrlUserConfig,
    UrlUsers,
    Users,
    user_of,
)
from graders.hosted.templates import Template
from graders.hosted.view import item_of
from graders.judges.base import Judge, JudgeConfig, JudgeRequest, JudgeSampling, check_judge
from graders.judges.openai_judge import OpenAIJudge
from graders.types import taken_metrics
from trainer.engines.base_judge import EngineJudge

_OPENING = "Hello. What can I do for you?"
"""The model's part before the user's first words: many templates take no conversation that begins with a reply."""


def build_users(config: WorldSettings) -> Users | None:
    """Who plays the user, by `world.user`; None where nobody does. Raises `UserError`.

    An `EngineUsers` has to be bound to the engine when that has started.
    """
    match user_of(config):
        case ScriptUserConfig() as user:
            return ScriptUsers(user)
        case UrlUserConfig() as user:
            return UrlUsers(user)
        case ModelUserConfig() as user:
            asked = JudgeConfig(
                base_url=user.base_url,
                api_key_env=user.api_key_env,
                max_concurrency=user.max_concurrency,
                timeout_s=user.timeout_s,
                max_retries=user.max_retries,
            )
            return ModelUsers(user, OpenAIJudge(asked, key="world.user"), model=user.model)
        case EngineUserConfig() as user:
            return ModelUsers(user, EngineJudge(), model="the run's own base model")
    return None


class ModelUsers:
    """Asks a model for the user's words: it is told who it is, and hears the model under training as *its* user.

    Covered: each reply has a seed of its own, derived from the rollout's; reasoning that the server or the run's own
    reasoning parser splits off is not said. Not covered: users who call tools; a server that has no `seed` or
    `max_completion_tokens`.
    """

    def __init__(self, config: ModelUserConfig | EngineUserConfig, model_behind: Judge, *, model: str) -> None:
        """Raises `UserError` for a prompt that can't be read, and where the model can't be asked at all."""
        self._config = config
        self._asked = model_behind
        self._model = model
        self._prompt = Template(config.prompt, where="world.user.prompt")
        if of_sample := [v for v in self._prompt.variables if v.namespace != "item"]:
            raise UserError(
                f"world.user.prompt: {of_sample[0].text} is not known to the user; only {{{{ item.KEY }}}} is"
            )
        check_judge(model_behind, JudgeSampling())

    @property
    def engine(self) -> EngineJudge | None:
        """What has to be bound to the run's engine."""
        return self._asked if isinstance(self._asked, EngineJudge) else None

    def check(self, task: Task) -> None:
        self._prompt.check(task)

    async def reply(self, exchange: Exchange) -> str | None:
        sampling = JudgeSampling(
            seed=exchange.seed,
            temperature=self._config.temperature,
            max_completions_tokens=self._config.max_tokens,
        )
        messages = ({"role": "system", "content": self._prompt.render(item_of(exchange.task), {})}, *_turned(exchange))
        request = JudgeRequest(model=self._model, messages=tuple(messages), schema=None, sampling=sampling)
        answer = await self._asked.ask(request)
        text = answer.text.strip()
        if self._config.stop in text:
            return None
        if not text:
            said = f"refused: {answer.refusal}" if answer.refusal else "said nothing"
            raise WorldError(f"the simulated user {said}")
        return text

    def take_metrics(self) -> dict[str, float]:
        """The model's figures under `user/`."""
        return {name.replace("judge/", "user/", 1): x for name, x in taken_metrics(self._asked).items()}

    async def aclose(self) -> None:
        await self._asked.aclose()


def _turned(exchange: Exchange) -> Sequence[dict[str, str]]:
    """The conversation as the user's model sees it: its own words are the assistant's. Roles alternate."""
    messages = [{"role": "user", "content": _OPENING}]
    for role, text in exchange.spoken():
        turned = "assistant" if role == "user" else "user"
        if messages[-1]["role"] == turned and len(messages) > 1:
            messages[-1]["content"] += f"\n\n{text}"
        elif messages[-1]["role"] == turned:
            messages[-1]["content"] = text
        else:
            messages.append({"role": turned, "content": text})
    return messages
