"""Model families without an engine: what LoRA adapts, what is refused before a weight is read, what vLLM is given."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from envs.errors import PublishError, UserError
from tests.support.configs import scripted_config
from tests.support.families import (
    ADAPTED,
    CONFIGS,
    EXPERTS,
    class_of,
    config_alone,
    load_into_vllm,
)
from tests.support.scripted_engine import ScriptedEngine
from trainer.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig
from trainer.engines.arguments import engine_arguments
from trainer.engines.canary import Canary
from trainer.engines.publish import Publisher
from trainer.exports.commands import length_arguments
from trainer.learning import adapter as lora
from trainer.models.family import (
    check_served,
    model_class_of,
    read_family,
    split_in_vllm,
    takes_adapters,
    weights_dtype,
)
from trainer.prepare import prepare

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"kv_a_proj_with_mqa", "o_proj"}
TARGETS = dict.fromkeys(CONFIGS, ATTENTION | MLP) | {
    "gpt-oss": ATTENTION,
    "mixtral": ATTENTION,
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm4": ATTENTION | {"gate_up_proj", "down_proj"},
    "deepseek-v2": LATENT | MLP | {"q_proj"},
    "deepseek-v3": LATENT | MLP | {"q_a_proj", "q_b_proj"},
    "qwen3-next": ATTENTION | MLP | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    "qwen3.5": ATTENTION | MLP | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_means_the_decoders_linear_layers(name, tmp_path):
    """Never a router, the experts, the head, an embedding or a vision tower."""
    family = read_family(config_alone(tmp_path, name), LoraConfig())
    assert {target.rpartition(".")[2] for target in family.targets} == TARGETS[name]
    assert not any("vision" in target or "visual" in target or ".experts." in target for target in family.targets)
    assert family.has_experts == (name in EXPERTS)
    assert family.max_length == 512


@pytest.mark.parametrize("name", ["gemma3-vision", "qwen2-moe", "qwen3-next", "deepseek-v3"])
def test_an_adapter_holds_the_targets_and_nothing_else(name, tmp_path):
    """By itself PEFT takes a shared expert's gate_proj for the fused experts, and a tower's q_proj for the text's."""
    with torch.random.fork_rng():
        model = class_of(config := CONFIGS[name]())(config)
    targets = set(lora.lora_targets(model, LoraConfig()))
    model = lora._with_adapter(model, LoraConfig(r=4))
    names = {name.partition(".lora_")[0] for name in lora.trainable_parameters(model)}
    assert {name.removeprefix("base_model.model.") for name in names} == targets
    assert {p.shape[0] for n, p in lora.trainable_parameters(model).items() if ".lora_A." in n} == {4}


REFUSED = {
    "code of its own": (
        {"model_type": "mymodel", "architectures": ["MyModel"], "auto_map": {"AutoConfig": "mine.MyConfig"}},
        r"MyModel is code that its repository brings along \(auto_map",
    ),
    "an architecture of its own": (
        {"architectures": ["MyLlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "mine.MyLlama"}},
        "MyLlamaForCausalLM is code that its repository brings along",
    ),
    "unknown to transformers": ({"model_type": "quux", "architectures": ["QuuxForCausalLM"]}, "'QuuxForCausalLM'"),
    "no architecture": ({"architectures": None}, "config.json names no architectures"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "not a decoder that writes text"),
    "an encoder-decoder": (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "not a decoder that writes text",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"weights are quantised \(gptq\)"),
    "quantised as only gpt-oss may be": ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
    "quantised in a part": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"quantised \(awq\)"),
    "architectures of no text": ({"architectures": [None]}, "config.json names no architectures"),
    "an architecture of another type": ({"architectures": ["Qwen2ForCausalLM"]}, "can't be built of its config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_from_its_config_alone(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as e:
        read_family(config_alone(tmp_path, **changes), LoraConfig())
    assert "\n" not in str(e.value) and str(e.value).startswith("model.name: this model can't be trained here: ")


def test_a_config_that_cannot_be_read_is_named_and_one_that_says_nothing_of_quantisation_is_taken(tmp_path):
    with pytest.raises(UserError, match=r"^model\.name: .*config\.json: No such file"):
        read_family(tmp_path / "none", LoraConfig())
    with pytest.raises(UserError, match=r"^model\.name: .*config\.json: transformers can't read it: .*hidden_size"):
        read_family(config_alone(tmp_path / "text", hidden_size="64"), LoraConfig())
    config = config_alone(tmp_path / "null") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    assert read_family(config.parent, LoraConfig()).targets


def test_code_beside_an_architecture_that_transformers_has_is_not_needed(tmp_path):
    config_alone(tmp_path, "phi3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    assert read_family(tmp_path, LoraConfig()).architecture == "Phi3ForCausalLM"


@pytest.mark.parametrize(
    "name, target, why",
    [
        ("llama", "q", "the model has no module 'q'; this LlamaForCausalLM has down_proj, gate_proj, k_proj"),
        ("llama", "lm_head", "outside the text decoder"),
        ("llama", "embed_tokens", r"no linear layer \(Embedding\)"),
        ("qwen3-moe", "gate", "a router"),
        ("qwen2-moe", "shared_expert_gate", "a router"),
        ("gpt-oss", "experts", "of the experts"),
        ("mixtral", "gate_up_proj", "the model has no module"),
        ("deepseek-v3", "kv_b_proj", "multiplied into other matrices"),
        ("gemma3-vision", "out_proj", "outside the text decoder"),
    ],
)
def test_a_users_own_targets_are_checked_alike(name, target, why, tmp_path):
    with pytest.raises(UserError, match=rf"^model.lora.target_modules: .*{why}"):
        read_family(config_alone(tmp_path, name), LoraConfig(target_modules=[target]))


def test_a_users_own_targets_mean_the_text_decoder_of_a_wrapper(tmp_path):
    family = read_family(config_alone(tmp_path, "gemma3-vision"), LoraConfig(target_modules=["q_proj"]))
    assert family.targets == tuple(f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1))


def test_the_config_is_transformers_own_even_where_vllm_has_put_its_own_in_the_place(tmp_path, monkeypatch):
    from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

    class Foreign(LlamaConfig):
        """As vLLM registers its own class of Qwen3.5's config when its engine starts."""

        model_type = "llama"

    folder = config_alone(tmp_path)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama", Foreign)
    assert type(AutoConfig.from_pretrained(folder)) is Foreign
    assert type(model_class_of(folder)[1]) is LlamaConfig


def test_experts_beside_an_adapter_are_refused_on_a_cpu(tmp_path):
    family = read_family(config_alone(tmp_path, "qwen3-moe"), LoraConfig())
    with pytest.raises(UserError, match=r"engine.publish: lora can't be had for Qwen3MoeForCausalLM on a CPU"):
        check_served(family, EngineConfig(publish="lora"), on_cpu=True)
    check_served(family, EngineConfig(), on_cpu=True)
    check_served(family, EngineConfig(), on_cpu=False)


@pytest.mark.parametrize(
    "name",
    [f"{name}ForCausalLM" for name in ("Llama", "Phi3", "Glm4", "Glm", "Phi", "StableLm")],
)
def test_what_a_class_takes_as_adapters_is_read_as_vllm_finds_it(name):
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[name]
    own = model.load_model_cls()
    assert takes_adapters(model.module_name, model.class_name) == supports_lora(own)
    assert split_in_vllm(model.module_name, model.class_name) == getattr(own, "packed_modules_mapping", {})


def test_a_layer_of_which_vllm_takes_adapters_in_parts_alone_is_refused_by_name(tmp_path):
    folder = config_alone(tmp_path, "glm4")
    published = EngineConfig(publish="lora")
    with pytest.raises(UserError, match=r"^engine\.publish: .* gate_up_proj .*\(gate_proj, up_proj\); leave it out"):
        check_served(read_family(folder, LoraConfig()), published, on_cpu=True)
    check_served(read_family(folder, LoraConfig()), EngineConfig(publish="merged"), on_cpu=True)
    check_served(read_family(folder, ADAPTED["glm4"]), published, on_cpu=True)
    check_served(read_family(config_alone(tmp_path / "phi3", "phi3"), LoraConfig()), published, on_cpu=True)


@pytest.mark.parametrize("publish, on_cpu", [("lora", True), ("lora", False), ("auto", False)])
def test_adapters_for_a_model_to_which_vllm_applies_none_are_refused_and_merged_weights_are_not(
    publish, on_cpu, tmp_path
):
    folder = config_alone(tmp_path, model_type="stablelm", architectures=["StableLmForCausalLM"])
    family = read_family(folder, LoraConfig())
    with pytest.raises(UserError, match=rf"^engine\.publish: {publish} can't be had for StableLm.*set it to merged$"):
        check_served(family, EngineConfig(publish=publish), on_cpu=on_cpu)
    check_served(family, EngineConfig(publish="merged"), on_cpu=on_cpu)


def test_linear_attention_in_float32_is_refused_on_a_cpu(tmp_path):
    family = read_family(config_alone(tmp_path, "qwen3-next"), LoraConfig())
    with pytest.raises(UserError, match=r"model.dtype: float32 can't be had for Qwen3NextForCausalLM on a CPU"):
        check_served(family, EngineConfig(), dtype="float32", on_cpu=True)


@pytest.mark.parametrize(("rope_type", "max_length"), [("linear", 2048), ("dynamic", 512), ("yarn", 512)])
def test_the_longest_sequence_is_vllms(rope_type, max_length, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    family = read_family(config_alone(tmp_path, rope_parameters=rope), LoraConfig())
    assert family.max_length == max_length


def test_a_model_that_vllm_has_not_is_refused(tmp_path):
    family = read_family(
        config_alone(tmp_path, architectures=["CodeGenForCausalLM"], model_type="codegen"), LoraConfig()
    )
    with pytest.raises(UserError, match=r"vLLM \S+ has no model CodeGenForCausalLM"):
        check_served(family, EngineConfig(), on_cpu=True)


@pytest.mark.parametrize(
    "model, rollout, message",
    [
        ({}, {"max_episode_tokens": 513}, r"rollout.max_episode_tokens: 513 tokens .* positions for \(512"),
        ({"lora": {"target_modules": ["nothing"]}}, {}, "model.lora.target_modules: the model has no module 'nothing'"),
    ],
)
def test_a_run_is_refused_before_its_weights_are_there(model, rollout, message, tmp_path):
    folder = config_alone(tmp_path / "model")
    config = scripted_config(tmp_path / "run", folder, rollout={"max_episode_tokens": 512} | rollout)
    config["model"] |= model
    with pytest.raises(UserError, match=message):
        prepare(RunConfig.model_validate(config))


@pytest.mark.filterwarnings("ignore")
def test_a_server_is_told_of_the_length_by_which_longrope_turned_the_training_s_rows(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    rope = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
    folder = config_alone(tmp_path, "phi3", rope_parameters=None, rope_scaling=rope, **lengths)
    assert length_arguments(folder, 64) == [] and length_arguments(config_alone(tmp_path / "llama"), 400) == []
    assert length_arguments(folder, 400) == ["--max-model-len", "400"]
    by_default = EngineArgs(model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32")
    assert by_default.create_model_config().max_model_len == 64, "as `length_arguments` takes it to be"


LOADED = ["gpt-oss", "deepseek-v3"]
"""Experts, beside which a CPU can run no adapter; two that differ in how vLLM packs and names the layers around them.
`make test-families` loads every family."""


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_vllms_own_loader_takes_every_layer_of_an_adapter_beside_experts(tiny_model, tmp_path):
    """Names and ranks fit vLLM's model, no layer that it made room for stays empty, and the experts get none."""
    for name, loaded in load_into_vllm(LOADED, tmp_path, tiny_model).items():
        assert loaded["left"] == [], name
        kinds = {layer.rpartition(".")[2] for layer in loaded["took"]}
        assert kinds >= {"o_proj"} and len(loaded["took"]) == len(set(loaded["took"])) >= 4, name
        assert not any("experts" in layer.split(".") for layer in loaded["took"]), name


def test_vllm_is_told_to_make_room_for_the_adapted_layers_alone_where_there_are_experts(tmp_path):
    def told(name: str, publish: str) -> object:
        return engine_arguments(
            config_alone(tmp_path / name, name),
            model=ModelConfig(),
            engine=EngineConfig(publish=publish),
            max_model_len=512,
            device="cuda",
        ).get("lora_target_modules")

    assert told("gpt-oss", "lora") == sorted(ATTENTION)
    assert told("gpt-oss", "merged") is None and told("llama", "lora") is None


@pytest.mark.parametrize(
    "name, device, told", [("deepseek-v3", "cpu", True), ("deepseek-v3", "cuda", False), ("llama", "cpu", False)]
)
def test_vllm_turns_the_heads_of_latent_attention_without_its_kernel_on_a_cpu(name, device, told, tmp_path):
    """Which takes a head for a token. With it the real engine differs by 0.65 nats a token (test_families_vllm)."""
    arguments = engine_arguments(
        config_alone(tmp_path, name), model=ModelConfig(), engine=EngineConfig(), max_model_len=512, device=device
    )
    assert ("-rotary_embedding" in arguments.get("compilation_config", {}).get("custom_ops", [])) is told


class Deaf(ScriptedEngine):
    """Ignores the adapter on some layers."""

    ignored = ("k_proj", "up_proj")

    async def publish(self, weights: Path, version: int) -> None:
        from safetensors.torch import load_file, save_file

        file = weights / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({n: t * 0 if any(i in n for i in self.ignored) else t for n, t in tensors.items()}, file)
        await super().publish(weights, version)


CANARY = [list(range(20 + 100 * i, 120 + 100 * i)) for i in range(4)]


def a_publisher(tiny_model: Path, engine: type[ScriptedEngine], scratch: Path) -> Publisher:
    from accelerate import Accelerator

    from trainer.learning.policy import Policy

    config = ModelConfig(dtype="float32", lora=LoraConfig(r=4, alpha=8))
    policy = Policy(tiny_model, config, OptimConfig(), Accelerator(cpu=True), 0)
    started = engine(lambda prompt, seed: "")
    started.load(tiny_model, [2])
    return Publisher(policy, started, Canary(CANARY, tolerance=0.15), scratch)


@pytest.mark.usefixtures("one_thread")
async def test_the_probe_proves_every_kind_of_layer_and_leaves_the_policy_as_it_was(tiny_model, tmp_path):
    publisher = a_publisher(tiny_model, ScriptedEngine, tmp_path)
    before = lora.adapter_state(publisher._policy.model)
    await publisher.note_base()
    shares = await publisher.probe()
    assert set(shares) == ATTENTION | MLP and all(share == pytest.approx(1, abs=0.01) for share in shares.values())
    after = lora.adapter_state(publisher._policy.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.iterdir()) == []
    metrics = await publisher.publish()
    assert metrics["canary/mismatch"] < 1e-4


@pytest.mark.usefixtures("one_thread")
async def test_an_engine_that_ignores_some_layers_is_refused_before_the_first_rollout_and_they_are_named(
    tiny_model, tmp_path
):
    publisher = a_publisher(tiny_model, Deaf, tmp_path)
    await publisher.note_base()
    with pytest.raises(PublishError, match=r"^LlamaForCausalLM: .* another share: up_proj \(.*%\), k_proj \(.*%\)$"):
        await publisher.probe()


def test_the_command_that_serves_an_adapter_is_one_that_vllm_parses_whatever_the_rank(tiny_model, tmp_path):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from trainer.exports.at_end import export_adapter
    from trainer.runs.folder import RunFolder

    raw = scripted_config(tmp_path / "run", tiny_model)
    raw["model"]["lora"]["r"] = 12
    config = RunConfig.model_validate(raw)
    RunFolder.create(config)
    run = RunFolder.open(config, rank=0)
    publisher = a_publisher(tiny_model, ScriptedEngine, tmp_path)
    export_adapter(prepare(config), run, publisher._policy)
    command = shlex.split(json.loads((run.path / "run.json").read_text())["serve_command"])
    arguments = command[command.index("vllm.entrypoints.openai.api_server") + 1 :]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert parsed.max_lora_rank == 16 and parsed.enable_lora


@pytest.mark.parametrize(
    ("has_bfloat16", "on_cpu", "named", "expected"),
    [
        (True, True, "auto", "bfloat16"),
        (False, True, "auto", "float32"),
        (False, False, "auto", "bfloat16"),
        (False, True, "bfloat16", "bfloat16"),
    ],
)
def test_weights_are_held_in_float32_only_where_a_cpu_would_emulate_bfloat16(
    monkeypatch, has_bfloat16, on_cpu, named, expected
):
    # Which instructions the CPU has can't be chosen here.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    assert weights_dtype(ModelConfig(dtype=named), on_cpu=on_cpu) == expected
