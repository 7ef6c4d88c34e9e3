"""Settings of what is learned from rollouts, and of the imitation before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from envs.reading.rows import FileOrDataset
from envs.settings import Kwargs, Settings, by_type
from envs.user_code import TARGET_PATTERN


class LossSettings(Settings):
    """What every loss has: advantages, weights of tokens, and a reference."""

    type: str
    advantage: Literal["grpo", "dr_grpo"] = Field(
        "grpo", description="grpo: centred and divided by the group's standard deviation; dr_grpo: centred only"
    )
    normalisation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="token: mean over all trainable tokens (DAPO); sequence: mean of per-rollout means (GRPO); "
        "constant: sum over tokens / (rollouts · max_episode_tokens) (Dr. GRPO)",
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the KL divergence (k3) to the policy before the first step: the base model, or what "
        "the warm start left",
    )


class LossConfig(LossSettings):
    """The clipped policy-gradient loss. See `trainer.learning.losses` and `trainer.learning.advantages`."""

    type: Literal["clipped"] = "clipped"
    clip_low: float = Field(0.2, ge=0, lt=1, description="lower clip range of the ratio")
    clip_high: float = Field(0.2, ge=0, description="upper clip range of the ratio")
    tis_cap: float | None = Field(
        2.0, gt=0, description="cap of the truncated importance weight between sampler and trainer; null: no correction"
    )


class CustomLossConfig(LossSettings):
    """Your own loss: a function of `trainer.learning.losses.base.LossInputs` that gives the loss and its metrics."""

    type: Literal["custom"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:name` or `path/to/file.py:name`")
    kwargs: Kwargs = Field({}, description="with them the target is a class or factory, called before the run")
    kl_coef: float = Field(0.0, ge=0, description="above 0 the loss gets the reference's log-probabilities")


LOSS_SETTINGS: dict[str, type[LossSettings]] = {
    "clipped": LossConfig,
    "custom": CustomLossConfig,
}
"""By the `type` that a config names."""


if TYPE_CHECKING:
    AnyLossConfig = LossSettings
else:
    AnyLossConfig = by_type(LOSS_SETTINGS, without_type="clipped")


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
