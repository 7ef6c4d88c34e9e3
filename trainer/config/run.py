"""One training run: its sections, and what no section can tell alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from envs.custom.world import CustomEnvConfig
from envs.errors import UserError
from envs.reading.documents import from_file
from envs.registry import WorldConfig
from envs.remote.config import RemoteConfig
from envs.settings import Settings
from envs.users import user_of
from graders.config import GRADER_TYPES, GraderConfig
from graders.judges.base import JudgeConfig
from graders.penalties import KL, TURN_REWARDS, PenaltiesConfig, check_part_names, check_penalties, part_name
from graders.user.custom import CustomConfig
from trainer.config.advantages import BY_EPISODE, WITHOUT_TIES, GdpoConfig, advantage_settings
from trainer.config.engines import AnyEngineConfig, EngineConfig, publishes_merged
from trainer.config.learning import AnyLossConfig, LossConfig, OptimConfig, WarmstartConfig
from trainer.config.model import ModelConfig
from trainer.config.rollouts import OverlapConfig, RolloutConfig
from trainer.config.tasks import CurriculumConfig, DataConfig, EvalConfig


def _grader(value: Any) -> Any:
    if value in GRADER_TYPES and not Path(value).exists():
        raise ValueError(f"expected settings or the path of a file, such as {{type: {value}, ...}}")
    return from_file("grader")(value)


GraderOrFile = Annotated[GraderConfig, BeforeValidator(_grader)]


class CheckpointConfig(Settings):
    """What is kept to resume and to serve."""

    every_steps: int = Field(1, ge=1, description="steps between checkpoints; the last step has one in any case")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; older ones are deleted")


class PrometheusConfig(Settings):
    """Where the run answers Prometheus while it works, under /metrics."""

    port: int = Field(
        ge=1, le=65535, description="of the first process of a machine; of its others the ports that follow, one each"
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen at; 0.0.0.0: all, without a password")


def _empty_where_null(value: Any) -> Any:
    return {} if value is None else value


class RunConfig(Settings):
    """One training run."""

    output_dir: Path = Field(description="the run folder; holds everything the run writes")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="of tasks' order, sampling and the adapter's beginning")
    model: ModelConfig = Field(ModelConfig(), description="the base model and its adapter")
    engine: AnyEngineConfig = Field(EngineConfig(), description="what samples the tokens")
    world: Annotated[
        WorldConfig,
        BeforeValidator(_empty_where_null),
        Field(description="the environment; left out, null or {}: no tools, the rows of `data` are single answers"),
    ] = RemoteConfig()
    data: DataConfig | None = Field(None, description="tasks as rows; null: the world's own")
    grader: Annotated[GraderOrFile, Field(description="the score: settings, or a file that holds them")]
    penalties: PenaltiesConfig = Field(PenaltiesConfig(), description="what is taken off the score")
    watch_grader: Annotated[
        GraderOrFile | None, Field(description="a second grader, never trained on: its divergence shows reward hacking")
    ] = None
    judge: JudgeConfig = Field(JudgeConfig(), description="the model that judging graders ask")
    rollout: RolloutConfig = Field(RolloutConfig(), description="how episodes are run")
    overlap: OverlapConfig = Field(OverlapConfig(), description="how far rollouts run ahead of the training")
    loss: AnyLossConfig = Field(LossConfig(), description="the policy-gradient loss")
    optim: OptimConfig = Field(OptimConfig(), description="the optimizer")
    warmstart: WarmstartConfig | None = Field(None, description="imitation before the first step; null: none")
    curriculum: CurriculumConfig | None = Field(None, description="tasks by measured difficulty; null: all alike")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is kept to resume and to serve")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="where the metrics go besides metrics.jsonl; each is a package of its own"
    )
    prometheus: PrometheusConfig | None = Field(
        None, description="serve figures to Prometheus; null: nothing is served. It may change when a run goes on"
    )

    @model_validator(mode="before")
    @classmethod
    def _sections_that_say_nothing(cls, data: Any) -> Any:
        """All of a section's lines commented out leave null."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in _DEFAULTED}

    @model_validator(mode="after")
    def _lengths_fit(self) -> RunConfig:
        if self.rollout.max_turn_tokens >= self.rollout.max_episode_tokens:
            raise ValueError("rollout.max_turn_tokens must be smaller than rollout.max_episode_tokens")
        return self

    @model_validator(mode="after")
    def _one_rule_chooses_the_tasks(self) -> RunConfig:
        if self.curriculum is not None and self.rollout.stratify_by is not None:
            raise ValueError("rollout.stratify_by: the curriculum chooses by difficulty; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _the_policy_learns_too(self) -> RunConfig:
        if self.loss.gae is not None and 0 < self.optim.num_steps <= self.loss.gae.critic.warmup_steps:
            raise ValueError(
                f"loss.advantage.critic.warmup_steps: {self.loss.gae.critic.warmup_steps} of optim.num_steps = "
                f"{self.optim.num_steps} train the critic alone, so that the policy would never learn; lower it"
            )
        return self

    @model_validator(mode="after")
    def _the_reference_is_refreshed_in_time(self) -> RunConfig:
        refresh, num_steps = self.loss.kl.refresh_steps, self.optim.num_steps
        if refresh is not None and 0 < num_steps <= refresh:
            raise ValueError(
                f"loss.kl.refresh_steps: {refresh} has no effect in a run of optim.num_steps = {num_steps}: no step "
                "comes after; lower it, or leave it out"
            )
        return self

    @property
    def parts_of_reward(self) -> list[str] | None:
        """By name; None of a grader of the user's own, whose first grade alone tells."""
        if isinstance(self.grader, CustomConfig) and not self.grader.targets:
            return None
        return [part_name(self.grader), *self.parts_beside_the_grade]

    @property
    def parts_beside_the_grade(self) -> list[str]:
        """What the trainer and the world add to the grader's own parts of the reward, by name."""
        of_kl = [KL] if self.loss.kl_in_reward else []
        # No world but the user's own gives rewards of turns.
        of_turns = [TURN_REWARDS] if isinstance(self.world, CustomEnvConfig) else []
        return [*self.penalties.names, *of_kl, *of_turns]

    @model_validator(mode="after")
    def _weights_are_of_parts(self) -> RunConfig:
        advantage, known = advantage_settings(self.loss.advantage), self.parts_of_reward
        if not isinstance(advantage, GdpoConfig) or known is None:
            return self
        if told := advantage.fault(known):
            raise ValueError(told)
        return self

    @model_validator(mode="after")
    def _a_group_has_something_to_compare(self) -> RunConfig:
        """Your own estimator may compare the groups."""
        name = advantage_settings(self.loss.advantage).type
        if self.rollout.group_size == 1 and name not in {*WITHOUT_TIES, "custom"}:
            raise ValueError(
                f"rollout.group_size: expected 2 or more with loss.advantage {name}, which compares the rollouts of a "
                "group; a single one is compared with nothing"
            )
        return self

    @model_validator(mode="after")
    def _tied_groups_are_told_in_time(self) -> RunConfig:
        rule, name = self.rollout.tied_groups, advantage_settings(self.loss.advantage).type
        if rule != "keep" and name in WITHOUT_TIES:
            raise ValueError(
                f"rollout.tied_groups: {rule} has no effect with loss.advantage {name}, which does not compare the "
                "rollouts of a group with each other, so that none is tied; leave it out"
            )
        if rule != "replace" and self.rollout.replacement_rounds != RolloutConfig().replacement_rounds:
            raise ValueError(
                f"rollout.replacement_rounds: has no effect while rollout.tied_groups is {rule}; set that to replace, "
                "or leave replacement_rounds out"
            )
        if rule == "replace" and self.overlap.max_staleness:
            raise ValueError(
                "rollout.tied_groups: replace asks for fresh tasks when a step's rollouts are there, and the next "
                "steps' are under way by then where overlap.max_staleness is above 0; set it to skip, or "
                "overlap.max_staleness to 0"
            )
        return self

    @model_validator(mode="after")
    def _penalties_by_turn_reach_a_turn(self) -> RunConfig:
        name = advantage_settings(self.loss.advantage).type
        for key, penalty in self.penalties:
            if name in BY_EPISODE and penalty is not None and penalty.by_turn:
                raise ValueError(
                    f"penalties.{key}.by_turn: has no effect with loss.advantage {name}, which gives all turns of a "
                    "rollout the same; leave it out, or choose mt_grpo, gigpo or turn_discounted"
                )
        return self

    @model_validator(mode="after")
    def _user_may_speak(self) -> RunConfig:
        if user_of(self.world) is not None and not self.rollout.max_user_turns:
            raise ValueError("world.user: rollout.max_user_turns is 0, so the user would never say a word")
        return self

    @model_validator(mode="after")
    def _reasoning_is_read(self) -> RunConfig:
        if self.world.expert_reasons and self.model.reasoning_parser is None:
            raise ValueError(
                "world: its expert reasons, but there is no model.reasoning_parser, so that reasoning would be read as "
                "part of the answer; name the one that `vllm serve` takes (olmo3 for the embedded model's template)"
            )
        return self

    @model_validator(mode="after")
    def _merged_weights_take_nothing_away(self) -> RunConfig:
        if isinstance(self.engine, EngineConfig) and self.engine.publish == "merged":
            check_publish(self, on_cpu=False)
        return self

    @model_validator(mode="after")
    def _quantised_weights_have_16_bits(self) -> RunConfig:
        if isinstance(self.engine, EngineConfig) and self.engine.quantization and self.model.dtype == "float32":
            raise ValueError(
                f"engine.quantization: {self.engine.quantization} computes in 16 bits; set model.dtype to bfloat16 or "
                "float16"
            )
        return self

    @model_validator(mode="after")
    def _overlap_has_its_way(self) -> RunConfig:
        if self.overlap.max_staleness == 0:
            if self.overlap.pin != "turn":
                raise ValueError(f"overlap.pin: {self.overlap.pin} has no effect where overlap.max_staleness is 0")
        elif isinstance(self.engine, EngineConfig) and self.engine.sleep != "none":
            raise ValueError(
                f"engine.sleep: {self.engine.sleep} takes the engine away while the trainer trains, and rollouts go on "
                "meanwhile where overlap.max_staleness is above 0; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _penalties_keep_the_order(self) -> RunConfig:
        check_part_names([part_name(self.grader)], self.penalties, whose="grader.name")
        check_penalties(self.grader, self.penalties)
        return self


_DEFAULTED = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, BaseModel)}
"""Sections that are there in any case."""


def asks_the_base(config: RunConfig) -> Iterator[str]:
    """The keys by which the run's engine is asked for what the base model says."""
    user = user_of(config.world)
    if config.judge.base_url == "engine":
        yield "judge.base_url"
    if user is not None and user.type == "engine":
        yield "world.user"


def _served_by_the_base(config: RunConfig, engine: EngineConfig) -> Iterator[tuple[str, str]]:
    """(key, why) of each setting that goes with an adapter beside the base and not with merged weights."""
    for key in asks_the_base(config):
        yield key, "engine needs the base model beside the adapter"
    if engine.quantization:
        yield "engine.quantization", f"{engine.quantization} can't take merged weights"


def depends_on_the_machine(config: RunConfig) -> bool:
    """Whether `check_publish` says something else on a machine without a GPU."""
    engine = config.engine
    return isinstance(engine, EngineConfig) and engine.publish == "auto" and any(_served_by_the_base(config, engine))


def check_publish(config: RunConfig, *, on_cpu: bool) -> None:
    """Raise `UserError` for what can't be had where new weights reach vLLM's engine merged into the base."""
    engine = config.engine
    if not isinstance(engine, EngineConfig) or not publishes_merged(engine, on_cpu=on_cpu):
        return
    for key, why in _served_by_the_base(config, engine):
        if engine.publish == "merged":
            raise UserError(f"{key}: {why}; set engine.publish to lora")
        raise UserError(
            f"{key}: {why}, and engine.publish: {engine.publish} means merged weights on this machine, which "
            "has no GPU; leave it out, or set engine.publish to lora"
        )
