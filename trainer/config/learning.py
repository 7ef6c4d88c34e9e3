"""Settings of what is learned from rollouts, and of the imitation before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from envs.reading.rows import FileOrDataset
from envs.settings import Kwargs, Settings, by_type
from envs.user_code import TARGET_PATTERN
from trainer.config.advantages import ADVANTAGE_SETTINGS, MOST_WEIGHT, Advantage, GaeConfig, advantage_settings


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= pair[0] <= 1 <= pair[1]:
        raise ValueError("expected [lowest, highest] with 0 <= lowest <= 1 <= highest")
    return pair


RatioRange = Annotated[tuple[float, float], AfterValidator(_in_order)]
"""Of ratios; 1 is what sampler and trainer have where they agree."""


class KlConfig(Settings):
    """The KL divergence to a reference, weighted by `kl_coef`. See `trainer.learning.losses.kl`."""

    place: Literal["loss", "reward"] = Field(
        "loss", description="loss: a term of the loss; reward: taken off the reward, before advantages are made of it"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="of a token's divergence d = logprob - reference: k1: d; k2: d² / 2; k3: exp(-d) + d - 1; in the "
        "loss each has the gradient of the KL itself",
    )
    reference: Literal["start", "base"] = Field(
        "start", description="start: the policy before the first step (what the warm start left); base: the base model"
    )
    refresh_steps: int | None = Field(
        None, ge=1, description="every so many steps the policy of then becomes the reference; null: never"
    )

    @model_validator(mode="after")
    def _base_is_not_refreshed(self) -> KlConfig:
        if self.reference == "base" and self.refresh_steps is not None:
            raise ValueError("refresh_steps: the base model never changes; leave it out, or set reference to start")
        return self


class EntropyConfig(Settings):
    """A bonus for the policy's entropy at each trained token. See `trainer.learning.losses.entropy`."""

    coef: float = Field(
        0.0,
        ge=0,
        le=MOST_WEIGHT,
        description="weight of the entropy (nats a token); at the beginning, where there is a floor",
    )
    floor: float | None = Field(
        None, gt=0, description="the bonus works only below it: nats a token, mean of a step; null: always"
    )
    step: float = Field(
        0.005,
        gt=0,
        le=MOST_WEIGHT,
        description="with a floor: what the weight rises by after a step below it and falls by after others",
    )
    max_coef: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="with a floor: the largest weight")

    @model_validator(mode="after")
    def _a_floor_moves_the_weight(self) -> EntropyConfig:
        if self.floor is None:
            for key in ("step", "max_coef"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: has no effect without a floor; set floor, or leave {key} out")
        elif self.max_coef == 0:
            raise ValueError("max_coef: 0 leaves no bonus below the floor; raise it, or leave entropy out")
        elif self.coef > self.max_coef:
            raise ValueError(f"coef: {self.coef:g} is above max_coef, {self.max_coef:g}; lower it, or raise max_coef")
        return self


class CorrectionConfig(Settings):
    """For how far sampler and trainer differ, besides `tis_cap`. See `trainer.learning.losses.correction`.

    Ranges are [lowest, highest] of the ratio trainer / sampler, 1 within them.
    """

    level: Literal["token", "sequence"] = Field(
        "token", description="of the weight that tis_cap caps: each token's ratio, or the product of its row's"
    )
    ratio_range: RatioRange | None = Field(None, description="tokens with a ratio outside are not trained on (IcePop)")
    mean_range: RatioRange | None = Field(
        None, description="rows whose ratios have a geometric mean outside are not trained on"
    )
    outlier_range: RatioRange | None = Field(None, description="rows with any ratio outside are not trained on")


class LossSettings(Settings):
    """What every loss has: advantages, weights of tokens, a reference, what corrects for the sampler."""

    type: str
    advantage: Advantage = Field(
        "grpo",
        description="how advantages are made of rewards, by name or as settings: grpo: centred and divided by the "
        "group's standard deviation; dr_grpo: centred only; others: docs/algorithms.md",
    )
    normalisation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="token: mean over all trainable tokens (DAPO); sequence: mean of per-rollout means (GRPO); "
        "constant: sum over tokens / (rollouts · max_episode_tokens) (Dr. GRPO)",
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        le=MOST_WEIGHT,
        description="weight of the KL divergence to the policy before the first step: the base model, or what "
        "the warm start left",
    )
    kl: KlConfig = Field(KlConfig(), description="which divergence kl_coef weighs, and where it stands")
    entropy: EntropyConfig | None = Field(None, description="a bonus for entropy; null: none, and it is not measured")
    tis_cap: float | None = Field(
        2.0, gt=0, description="cap of the truncated importance weight between sampler and trainer; null: no correction"
    )
    correction: CorrectionConfig = Field(CorrectionConfig(), description="the weight's level, and what is masked out")

    @property
    def gae(self) -> GaeConfig | None:
        """Advantages are a critic's; None where they are made of rewards alone."""
        settings = advantage_settings(self.advantage)
        return settings if isinstance(settings, GaeConfig) else None

    @property
    def has_reference(self) -> bool:
        """Log-probabilities of the reference are needed."""
        return self.kl_coef > 0

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl.place == "reward"

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl.place == "loss"

    @property
    def trains_without_advantage(self) -> bool:
        """Tokens may have a gradient though their advantage is 0: of the policy, or of the critic."""
        has_bonus = self.entropy is not None and (self.entropy.coef > 0 or self.entropy.floor is not None)
        return self.kl_in_loss or has_bonus or self.gae is not None

    @model_validator(mode="after")
    def _kl_has_a_weight(self) -> LossSettings:
        if not self.kl_coef and self.kl != KlConfig():
            raise ValueError("kl: has no effect while kl_coef is 0; set that, or leave kl out")
        return self

    @model_validator(mode="after")
    def _level_has_a_cap(self) -> LossSettings:
        if self.tis_cap is None and self.correction.level != "token":
            raise ValueError("correction.level: has no effect while tis_cap is null; set that, or leave level out")
        return self


class LossConfig(LossSettings):
    """The clipped policy-gradient loss. See `trainer.learning.losses` and `trainer.learning.advantages`."""

    type: Literal["clipped"] = "clipped"
    clip_low: float = Field(0.2, ge=0, lt=1, description="lower clip range of the ratio")
    clip_high: float = Field(0.2, ge=0, description="upper clip range of the ratio")
    delta: float | None = Field(
        None, gt=1, description="dual clip: the largest ratio where the advantage is negative; null: no bound"
    )

    @model_validator(mode="after")
    def _delta_is_beyond_the_range(self) -> LossConfig:
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta: expected more than 1 + clip_high, {1 + self.clip_high:g}")
        return self


class GspoConfig(LossSettings):
    """The clipped loss by sequence: the ratio is the row's geometric mean. See `trainer.learning.losses.gspo`."""

    type: Literal["gspo"]
    normalisation: Literal["token", "sequence", "constant"] = Field(
        "sequence", description="as of the clipped loss; GSPO's own is sequence"
    )
    clip_low: float = Field(3e-4, ge=0, lt=1, description="lower clip range of the row's ratio")
    clip_high: float = Field(4e-4, ge=0, description="upper clip range of the row's ratio")


class CispoConfig(LossSettings):
    """REINFORCE weighted by the capped ratio: no token loses its gradient. See `trainer.learning.losses.cispo`."""

    type: Literal["cispo"]
    ratio_cap: float = Field(5.0, gt=1, description="the largest weight of a token")


class ReinforceConfig(LossSettings):
    """The plain policy gradient, without ratio and clip. See `trainer.learning.losses.reinforce`."""

    type: Literal["reinforce"]


class CustomLossConfig(LossSettings):
    """Your own loss: a function of `trainer.learning.losses.base.LossInputs` that gives the loss and its metrics."""

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:name` or `path/to/file.py:name`")
    kwargs: Kwargs = Field({}, description="with them the target is a class or factory, called before the run")
    kl_coef: float = Field(
        0.0,
        ge=0,
        le=MOST_WEIGHT,
        description="above 0 the loss gets the reference's log-probabilities, unless kl.place is reward",
    )
    tis_cap: float | None = Field(
        None, gt=0, description="cap of the weight that the loss gets as correction_N; null: it gets none"
    )

    @model_validator(mode="after")
    def _its_kl_is_its_own(self) -> CustomLossConfig:
        if self.kl_in_loss and self.kl.estimator != "k3":
            raise ValueError("kl.estimator: your own loss makes its KL term itself; leave it out")
        return self


LOSS_SETTINGS: dict[str, type[LossSettings]] = {
    "clipped": LossConfig,
    "gspo": GspoConfig,
    "cispo": CispoConfig,
    "reinforce": ReinforceConfig,
    "custom": CustomLossConfig,
}
"""By the `type` that a config names."""


def _no_advantage(value: Any) -> Any:
    """Whoever looks for GRPO or PPO finds the advantages, of which each goes with each loss."""
    name = value.get("type") if isinstance(value, dict) else value
    meant = "gae" if name == "ppo" else name
    if isinstance(meant, str) and meant in ADVANTAGE_SETTINGS and meant not in LOSS_SETTINGS:
        raise ValueError(
            f"{name} is no loss but how advantages are made: set loss.advantage to {meant}, and loss.type to one of "
            f"{', '.join(LOSS_SETTINGS)}, or leave it out for the first"
        )
    return value


if TYPE_CHECKING:
    AnyLossConfig = LossSettings
else:
    AnyLossConfig = Annotated[by_type(LOSS_SETTINGS, without_type="clipped"), BeforeValidator(_no_advantage)]


class OptimConfig(Settings):
    """The optimizer (AdamW)."""

    num_steps: int = Field(100, ge=0, description="training steps of the run; one is num_epochs · minibatches updates")
    learning_rate: float = Field(2e-4, gt=0, description="peak")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, steps")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, to 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled from the gradient")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to it")
    num_epochs: int = Field(1, ge=1, description="passes over a step's samples; above 1 the clip takes effect")
    minibatches: int = Field(1, ge=1, description="optimizer updates per pass; above 1 the clip takes effect")
    max_microbatch_tokens: int = Field(8192, ge=64, description="tokens of one forward and backward")
    layout: Literal["tree", "padded"] = Field(
        "tree",
        description="tree: what rows begin alike (a group's prompt, the turns that forked rows share) is computed "
        "once; padded: every row by itself. Models of which not all layers attend to everything before are padded in "
        "any case",
    )


class WarmstartConfig(Settings):
    """Supervised fine-tuning on expert episodes before the first rollout."""

    data: FileOrDataset | None = Field(
        None,
        description="conversations (messages, tools) to imitate: a JSONL file, or a data set; without it the world's "
        "expert is imitated",
    )
    num_steps: int = Field(16, ge=1, description="supervised updates")
    episodes_per_step: int = Field(8, ge=1, description="expert episodes of one update")
    learning_rate: float = Field(1e-3, gt=0, description="constant")
