"""The run's configuration: YAML → validated objects. Loads neither torch nor vllm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from envs.errors import UserError, told_of
from envs.reading.documents import apply_override, from_file, read_document
from envs.reading.rows import FileOrDataset
from envs.registry import WorldConfig
from envs.remote.config import RemoteConfig
from envs.settings import JsonObject, Settings
from envs.users import user_of
from envs.validation import validation_problems
from graders.build import check_grader
from graders.config import GRADER_TYPES, GraderConfig
from graders.judges.base import JudgeConfig
from graders.penalties import PenaltiesConfig, check_penalties
from trainer.response_format import ResponseFormat


def _grader(value: Any) -> Any:
    if value in GRADER_TYPES and not Path(value).exists():
        raise ValueError(f"expected settings or the path of a file, such as {{type: {value}, ...}}")
    return from_file("grader")(value)


GraderOrFile = Annotated[GraderConfig, BeforeValidator(_grader)]


class LoraConfig(Settings):
    """The trainable adapter (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=512, description="rank")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / r")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="module names to adapt, or all-linear"
    )


Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Sleep = Literal["none", "kv", "weights"]


class ModelConfig(Settings):
    """The base model and how its text is rendered and parsed."""

    name: str = Field("smollm2-135m-instruct", description="embedded default, Hugging Face id or local folder")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="of the frozen base weights; auto: bfloat16, or float32 on a CPU that has no instructions for it, "
        "where bfloat16 took 25 times as long (measured on AVX2)",
    )
    lora: LoraConfig = Field(LoraConfig(), description="the trainable adapter")
    chat_template: str = Field(
        "auto",
        description="auto: the model's own, or a fallback in its turn markers where it knows no tools; training: the "
        "one that trl trains such models under, which keeps earlier turns as they were; or a Jinja file",
    )
    chat_template_kwargs: JsonObject = Field({}, description="passed to the template, e.g. enable_thinking")
    tool_parser: str = Field("hermes", description="as `vllm serve --tool-call-parser` names it")
    reasoning_parser: str | None = Field(None, description="as `vllm serve --reasoning-parser` names it")
    attn_implementation: Attention = Field(
        "auto",
        description="the trainer's attention; auto: what transformers takes for the model; flash_attention_2 or _3 "
        "where that is eager or needs a mask of all pairs (gpt-oss, sliding windows): a package of its own, 16 bits, "
        "a GPU",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")


class EngineConfig(Settings):
    """The vLLM engine of the rollout worker."""

    publish: Literal["auto", "lora", "merged"] = Field(
        "auto", description="how new weights reach the engine; auto: lora on a GPU, merged on a CPU (measured faster)"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences decoded at once")
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="share of GPU memory for the engine")
    kv_cache_gib: float = Field(2.0, gt=0, description="KV cache on a CPU, GiB")
    sleep: Sleep = Field(
        "none",
        description="what the engine leaves to the trainer of a GPU's memory while it trains; kv: the KV cache, "
        "weights: its weights, too, which wait in the machine's memory; gpu_memory_utilization may be larger then",
    )
    seeded_requests: bool | Literal["auto"] = Field(
        "auto",
        description="seed every request, so that a run samples the same tokens again; auto: on a GPU, where it costs "
        "nothing; on a CPU drawing them so took 60 % of the engine's time (measured)",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: the engine quantises the base's linear weights as it loads them, half their memory; the "
        "trainer and the adapter keep 16 bits, loss.tis_cap corrects for the difference, and canary_mean_tolerance "
        "may have to rise",
    )
    enforce_eager: bool = Field(False, description="no compilation or CUDA graphs")
    hung_after_s: float = Field(
        3600,
        gt=0,
        description="the run stops when the engine, asked for something, has answered nothing for so long, seconds; "
        "more than its longest turn takes",
    )
    canary_mean_tolerance: float = Field(
        0.15, gt=0, description="largest mean |difference| in log-probability between engine and trainer, nats a token"
    )


Answer = Literal["text", "tool_calls"]


class RolloutConfig(Settings):
    """How episodes are run."""

    tasks_per_step: int = Field(8, ge=1, description="groups in a step")
    stratify_by: str | None = Field(
        None,
        description="a key of the tasks' items (kind, say): every step then holds its values in the proportion in "
        "which all tasks do",
    )
    group_size: int = Field(8, ge=2, description="rollouts of one task")
    max_turns: int = Field(12, ge=1, description="model generations in an episode")
    max_tool_calls: int = Field(10, ge=0, description="the call budget of an episode")
    max_user_turns: int = Field(
        10, ge=0, description="messages that a simulated user may add to the prompt's; without such a user no limit"
    )
    answer: Answer = Field(
        "text",
        description="text: the first turn without calls is the answer; tool_calls: the first turn with calls, which "
        "are not run, so that the tools that rows define need no server; graders read sample.output_tools",
    )
    max_turn_tokens: int = Field(256, ge=1, description="generated tokens in one turn")
    max_episode_tokens: int = Field(
        1024, ge=16, description="tokens of a whole episode, prompt and tool outputs included"
    )
    episode_timeout_s: float = Field(
        600,
        gt=0,
        description="of an episode, seconds: its environment, tools and user; the engine, and waiting for a place "
        "at it or for a thread, do not count",
    )
    tool_timeout_s: float = Field(60, gt=0, description="of one tool call, seconds")
    settle_timeout_s: float = Field(
        300,
        gt=0,
        description="of what follows an episode, seconds each: one try of its grading, a judge's retries included (a "
        "grader that takes longer has failed), and closing its environment (no longer than episode_timeout_s)",
    )
    max_tool_output_chars: int = Field(20_000, ge=1, description="longer tool outputs are cut, and say so")
    temperature: float = Field(1.0, gt=0, description="sampling temperature in training")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; below 1 biases the policy gradient")
    response_format: Annotated[
        ResponseFormat | None,
        BeforeValidator(from_file("response_format")),
        Field(
            description="the form of every answer, as Chat Completions takes it (type json_schema, json_object or "
            "text), or a file that holds it; tasks may offer no tools then"
        ),
    ] = None
    world_retries: int = Field(
        2, ge=0, description="fresh attempts at an episode lost to a fault of the world, and at a grading that failed"
    )


class LossConfig(Settings):
    """The policy-gradient loss. See `trainer.losses` and `trainer.advantages` for the formulas."""

    advantage: Literal["grpo", "dr_grpo"] = Field(
        "grpo", description="grpo: centred and divided by the group's standard deviation; dr_grpo: centred only"
    )
    normalisation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="token: mean over all trainable tokens (DAPO); sequence: mean of per-rollout means (GRPO); "
        "constant: sum over tokens / (rollouts · max_episode_tokens) (Dr. GRPO)",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="lower clip range of the ratio")
    clip_high: float = Field(0.2, ge=0, description="upper clip range of the ratio")
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the KL divergence (k3) to the policy before the first step: the base model, or what "
        "the warm start left",
    )
    tis_cap: float | None = Field(
        2.0, gt=0, description="cap of the truncated importance weight between sampler and trainer; null: no correction"
    )


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
    max_microbatch_tokens: int = Field(8192, ge=64, description="padded tokens of one forward and backward")


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


class EvalConfig(Settings):
    """Held-out evaluation."""

    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0: before and after training only")
    num_tasks: int = Field(32, ge=1, description="held-out tasks, the first of the eval split")
    samples_per_task: int = Field(2, ge=1, description="rollouts of each")
    temperature: float = Field(1.0, ge=0, description="0 is greedy")


class DataConfig(Settings):
    """Tasks as rows in the hosted format; without this section the world's own tasks are used."""

    train: FileOrDataset = Field(description="training rows: a JSONL file, or a data set (see `envs.reading.rows`)")
    eval: FileOrDataset = Field(description="held-out rows, likewise")


class CurriculumConfig(Settings):
    """Tasks by measured difficulty: those whose rewards do not vary come more rarely (see `trainer.difficulty`)."""

    preflight: Path | None = Field(None, description="preflight.json with what is known of the tasks beforehand")
    floor: float = Field(0.1, gt=0, le=1, description="how often a tied task comes, as a share of the others")
    min_rollouts: int = Field(4, ge=2, description="graded rollouts that it takes to call a task tied")


class CheckpointConfig(Settings):
    """What is kept to resume and to serve."""

    every_steps: int = Field(1, ge=1, description="steps between checkpoints; the last step has one in any case")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; older ones are deleted")


def _empty_where_null(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"expected settings, such as {{type: {value}, ...}}")
    return {} if value is None else value


class RunConfig(Settings):
    """One training run."""

    output_dir: Path = Field(description="the run folder; holds everything the run writes")
    seed: int = Field(0, description="of tasks' order, sampling and the adapter's beginning")
    model: ModelConfig = Field(ModelConfig(), description="the base model and its adapter")
    engine: EngineConfig = Field(EngineConfig(), description="what samples the tokens")
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
    loss: LossConfig = Field(LossConfig(), description="the policy-gradient loss")
    optim: OptimConfig = Field(OptimConfig(), description="the optimizer")
    warmstart: WarmstartConfig | None = Field(None, description="imitation before the first step; null: none")
    curriculum: CurriculumConfig | None = Field(None, description="tasks by measured difficulty; null: all alike")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is kept to resume and to serve")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="where the metrics go besides metrics.jsonl; each is a package of its own"
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
    def _judge_has_a_base_model(self) -> RunConfig:
        if self.judge.base_url == "engine" and self.engine.publish == "merged":
            raise ValueError(
                "judge.base_url: engine needs the base model beside the adapter; set engine.publish to lora"
            )
        return self

    @model_validator(mode="after")
    def _user_has_a_base_model(self) -> RunConfig:
        user = user_of(self.world)
        if user is not None and not self.rollout.max_user_turns:
            raise ValueError("world.user: rollout.max_user_turns is 0, so the user would never say a word")
        if user is not None and user.type == "engine" and self.engine.publish == "merged":
            raise ValueError("world.user: engine needs the base model beside the adapter; set engine.publish to lora")
        return self

    @model_validator(mode="after")
    def _quantised_weights_are_never_replaced(self) -> RunConfig:
        if self.engine.quantization and self.engine.publish == "merged":
            raise ValueError(
                f"engine.quantization: {self.engine.quantization} can't take merged weights; set engine.publish to lora"
            )
        if self.engine.quantization and self.model.dtype == "float32":
            raise ValueError(
                f"engine.quantization: {self.engine.quantization} computes in 16 bits; set model.dtype to bfloat16 or "
                "float16"
            )
        return self

    @model_validator(mode="after")
    def _penalties_keep_the_order(self) -> RunConfig:
        check_penalties(self.grader, self.penalties)
        return self


_DEFAULTED = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, BaseModel)}
"""Sections that are there in any case."""


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config and apply `key.sub=value` overrides (values are YAML). Raises `UserError`."""
    return validate_config(read_sections(path, overrides or []), source=str(path))


def read_sections(path: Path | None, overrides: list[str]) -> dict[str, Any]:
    """The sections as they are given, not yet validated: the YAML's, if there is one, under the overrides.

    Raises `UserError`.
    """
    data = {} if path is None else _read_sections(path)
    for override in overrides:
        apply_override(data, override)
    return data


def _read_sections(path: Path) -> dict[str, Any]:
    data = read_document(path, f"config {path}")
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def validate_config(data: dict[str, Any], *, source: str) -> RunConfig:
    """Raises `UserError` that names every bad key, what was expected and the nearest known key."""
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as e:
        raise UserError(validation_problems(f"config {source}", e, RunConfig, data)) from None
    for key, grader in (("grader", config.grader), ("watch_grader", config.watch_grader)):
        if grader is not None:
            file = f", in {data[key]}" if isinstance(data.get(key), str) else ""
            with told_of(f"config {source}: {key}{file}"):
                check_grader(grader)
    return config
