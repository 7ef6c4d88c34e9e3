"""Settings of how advantages are made of a step's rewards. See `trainer.learning.advantages`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag

from envs.errors import nearest
from envs.settings import Kwargs, Settings
from envs.user_code import TARGET_PATTERN

AdvantageName = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gdpo",
    "mt_grpo",
    "gigpo",
    "turn_discounted",
    "gae",
]
"""Estimators that may be named alone: all their settings have defaults."""

MOST_WEIGHT = 1e6
"""Of one thing beside another: by more, the sum is the one alone, and float32 soon holds no product of them."""


class AdvantageSettings(Settings):
    """What every estimator has."""

    type: str


class GrpoConfig(AdvantageSettings):
    """Centred on the group's mean and divided by its standard deviation."""

    type: Literal["grpo"] = "grpo"


class DrGrpoConfig(AdvantageSettings):
    """Centred on the group's mean."""

    type: Literal["dr_grpo"] = "dr_grpo"


class RlooConfig(AdvantageSettings):
    """Centred on the mean of the group's other rollouts."""

    type: Literal["rloo"] = "rloo"


class ReinforcePpConfig(AdvantageSettings):
    """Whitened over all tokens of the step."""

    type: Literal["reinforce_pp"] = "reinforce_pp"


class ReinforcePpBaselineConfig(AdvantageSettings):
    """Centred on the group's mean, then whitened over all tokens of the step."""

    type: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class GdpoConfig(AdvantageSettings):
    """Each part of the reward normalised within the group, their sum over the step."""

    type: Literal["gdpo"] = "gdpo"
    weights: dict[str, Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)]] = Field(
        {}, description="by the part's name: the grader's own, then the penalties; those not named have 1"
    )

    def fault(self, parts: Sequence[str]) -> str | None:
        """What is wrong with weighing a reward that has these parts, by name."""
        if not parts:
            return "loss.advantage gdpo: the reward has no parts; expected a grader that gives some"
        if unknown := [name for name in self.weights if name not in parts]:
            return (
                f"loss.advantage.weights: {unknown[0]!r} is no part of the reward; it has {', '.join(parts)}"
                f"{nearest(unknown[0], parts)}"
            )
        if not any(self.weights.get(name, 1.0) for name in parts):
            return (
                f"loss.advantage.weights: those of {', '.join(parts)}, which are all parts of the reward, are 0, so "
                "that nothing would be learned; leave one out"
            )
        return None


class TurnSettings(AdvantageSettings):
    """What every estimator by turn has."""

    gamma: float = Field(1.0, ge=0, le=1, description="what a reward counts for the turn before the one that earned it")


class MtGrpoConfig(TurnSettings):
    """Each turn's return against those of the same turn in the group's other rollouts."""

    type: Literal["mt_grpo"] = "mt_grpo"


class GigpoConfig(TurnSettings):
    """GRPO's advantage, and each turn's return against those of all turns of the group that began in the same state."""

    type: Literal["gigpo"] = "gigpo"
    gamma: float = Field(
        0.95, ge=0, le=1, description="what a reward counts for the turn before the one that earned it"
    )
    weight: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="of the turn's own advantage beside the episode's")


class TurnDiscountedConfig(TurnSettings):
    """GRPO's advantage of the outcome, and the discounted rewards of the turns against those of the group."""

    type: Literal["turn_discounted"] = "turn_discounted"
    weight: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="of the turns' own advantage beside the outcome's")


class CriticConfig(Settings):
    """A critic: what it takes to learn the value of a state. See `trainer.learning.critic`."""

    r: int = Field(8, ge=1, le=256, description="rank of its own adapter on the frozen base")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's, constant")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="the first steps train the critic alone, so that the policy learns from values that mean something",
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="how far an update may move a value away from the one before it; null: any way"
    )


class GaeConfig(AdvantageSettings):
    """Generalised advantage estimation by a learned critic: PPO, beside the clipped loss."""

    type: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="what a reward counts for the sampled token before")
    lam: float = Field(
        1.0,
        ge=0,
        le=1,
        description="between one step's surprise (0) and the whole return less the value (1); a reward that comes k "
        "sampled tokens later counts lam^k until the critic has learned to foresee it: 0.6 % at 0.95 and k = 100",
    )
    whiten: bool = Field(True, description="advantages are centred and scaled to a spread of 1 over the step's tokens")
    bootstrap: bool = Field(
        False,
        description="an episode that a limit ended counts as going on, worth what the critic thinks of its last state",
    )
    critic: CriticConfig = Field(CriticConfig(), description="what learns the values")


class CustomAdvantageConfig(AdvantageSettings):
    """Your own estimator: a function of the step's groups, see `trainer.learning.advantages.base.Estimator`."""

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:name` or `path/to/file.py:name`")
    kwargs: Kwargs = Field({}, description="with them the target is a class or factory, called before the run")


ADVANTAGE_SETTINGS: dict[str, type[AdvantageSettings]] = {
    "grpo": GrpoConfig,
    "dr_grpo": DrGrpoConfig,
    "rloo": RlooConfig,
    "reinforce_pp": ReinforcePpConfig,
    "reinforce_pp_baseline": ReinforcePpBaselineConfig,
    "gdpo": GdpoConfig,
    "mt_grpo": MtGrpoConfig,
    "gigpo": GigpoConfig,
    "turn_discounted": TurnDiscountedConfig,
    "gae": GaeConfig,
    "custom": CustomAdvantageConfig,
}
"""By the `type` that a config names."""

BY_EPISODE = frozenset({"grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gdpo"})
"""Give all turns of a rollout one advantage: of what a turn has earned by itself the sum alone counts."""
WITHOUT_TIES = frozenset({"reinforce_pp", "gae"})
"""Compare the rollouts of a group with all of the step's, or with a critic's word: equal rewards teach, too."""


def _by_name_or_settings(value: Any) -> Any:
    if isinstance(value, dict | AdvantageSettings) or value in _NAMES:
        return value
    known = ", ".join(map(repr, _NAMES))
    raise ValueError(
        f"expected one of {known}, or settings, such as {{type: custom, target: my_file.py:name}}"
        f"{nearest(value, _NAMES)}"
    )


_NAMES = get_args(AdvantageName)


def _tag_of(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("type")
    return value.type if isinstance(value, AdvantageSettings) else "[name]"


if TYPE_CHECKING:
    Advantage = AdvantageName | AdvantageSettings
else:
    _tagged = [Annotated[AdvantageName, Tag("[name]")]]
    _tagged += [Annotated[one, Tag(name)] for name, one in ADVANTAGE_SETTINGS.items()]
    Advantage = Annotated[
        functools.reduce(operator.or_, _tagged), Discriminator(_tag_of), BeforeValidator(_by_name_or_settings)
    ]


def advantage_settings(advantage: AdvantageName | AdvantageSettings) -> AdvantageSettings:
    """The settings of an estimator that may have been named alone."""
    return ADVANTAGE_SETTINGS[advantage](type=advantage) if isinstance(advantage, str) else advantage
