"""What is exported loads elsewhere and says the same; it is there whole or not at all."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

from envs.errors import UserError
from envs.types import Message
from tests.support.scripts import run_script
from trainer.config import load_config
from trainer.exports.artefact import Artefact, _check_base, _loaded, export, servable
from trainer.exports.trained import Trained, find_trained
from trainer.learning.adapter import load_model
from trainer.learning.reader import scores_of
from trainer.runs.about import files_named
from trainer.runs.canary_record import CANARY, of_base, of_policy, read_canary

WITHOUT_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def trained(finished: Path) -> Trained:
    return find_trained(finished)


@pytest.fixture(scope="module")
def adapter(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(trained, Artefact(to=tmp_path_factory.mktemp("adapter") / "out"))


@pytest.fixture(scope="module")
def merged(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(trained, Artefact(form="merged", to=tmp_path_factory.mktemp("merged") / "out"))


def canary_scores(model: torch.nn.Module, rows: list[list[int]]) -> list[float]:
    out: list[float] = []
    for ids in rows:
        ids_T = torch.tensor(ids)
        with torch.no_grad():
            logprobs_TV = model(ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        out += logprobs_TV[torch.arange(len(ids) - 1), ids_T[1:]].tolist()
    return out


# ---- what is in it


def test_merged_weights_in_transformers_say_what_the_trainer_said_of_every_canary_token(trained, merged):
    record = read_canary(trained.run, trained.step)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert canary_scores(model, record.token_ids) == pytest.approx(record.policies[3], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(record.policies[3], record.base, strict=True)) > 0.01, "it learned nothing"


def test_the_adapter_on_its_base_in_peft_says_so_too(trained, adapter):
    record = read_canary(trained.run, trained.step)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert canary_scores(model, record.token_ids) == pytest.approx(record.policies[3], abs=1e-4)


def test_the_adapters_weights_are_the_runs_own_bytes(trained, adapter):
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (trained.run / "adapter" / name).read_bytes()


def test_a_checkpoints_policy_is_that_of_its_step(finished, tmp_path):
    record = read_canary(finished, 2)
    folder = export(find_trained(finished, 2), Artefact(form="merged", to=tmp_path / "out"))
    assert canary_scores(AutoModelForCausalLM.from_pretrained(folder), record.token_ids) == pytest.approx(
        record.policies[2], abs=1e-4
    )
    assert record.policies[2] != record.policies[3]


def test_merged_weights_in_another_dtype_are_those_in_float32_rounded_once(trained, merged, tmp_path):
    folder = export(trained, Artefact(form="merged", dtype="bfloat16", to=tmp_path / "out"))
    exact, rounded = load_file(merged / "model.safetensors"), load_file(folder / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(rounded[name].equal(exact[name].to(torch.bfloat16)) for name in exact)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_tokenizer_template_and_sampling_are_those_of_the_training(trained, form, request):
    from trainer.prepare import build_chat

    folder, chat = request.getfixturevalue(form), build_chat(trained.config, trained.model_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How much?"}]
    tools = [{"type": "function", "function": {"name": "search", "description": "Find.", "parameters": {}}}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    asked = [Message(role="user", content="How much?")]
    assert tokenizer.encode(text, add_special_tokens=False) == chat.open(asked, tools)
    sampling = GenerationConfig.from_pretrained(folder)
    assert sampling.eos_token_id == sorted(chat.stop_token_ids)
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 1.0, 1.0, 0)


def test_a_template_in_the_tokenizers_settings_gives_way_to_the_trainings(trained, run_folder, tmp_path):
    """llama.cpp's converter would take it before the one that lies beside."""
    model = tmp_path / "model"
    model.mkdir()
    for file in trained.model_path.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": WITHOUT_TOOLS}))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["model"]["name"] = str(model)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    folder = export(find_trained(run_folder), Artefact(to=tmp_path / "out"))
    written = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert written == (folder / "chat_template.jinja").read_text() and "tool" in written


def under_a_file(run: Path, file: Path) -> str:
    """Has the run's config name `file`, as if it had been trained under it; returns the template."""
    text = (run / "adapter/chat_template.jinja").read_text()
    file.write_text(text)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["chat_template"] = str(file)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "run.json").read_text())
    about["files"] = files_named(load_config(run / "config.yaml"))
    (run / "run.json").write_text(json.dumps(about))
    return text


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (Path.unlink, "No such file"),
        (lambda file: file.write_text("{{ messages }}"), "is not what it was when the run began"),
    ],
    ids=["gone", "edited"],
)
def test_the_template_is_the_trainings_whatever_has_become_of_the_file_that_the_config_names(
    run_folder, tmp_path, spoil, told
):
    template = under_a_file(run_folder, file := tmp_path / "mine.jinja")
    spoil(file)
    for step in (None, 2):
        folder = export(find_trained(run_folder, step), Artefact(to=tmp_path / f"out-{step}"))
        assert (folder / "chat_template.jinja").read_text() == template
    shutil.rmtree(run_folder / "adapter")
    with pytest.raises(UserError, match=rf"model.chat_template: .*{file}.* {told}"):
        export(find_trained(run_folder, 2), Artefact(to=tmp_path / "out"))


def test_what_a_model_sees_with_comes_along(trained, run_folder, tmp_path):
    model = shutil.copytree(trained.model_path, tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{}")
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["model"]["name"] = str(model)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    folder = export(find_trained(run_folder), Artefact(to=tmp_path / "out"))
    assert (folder / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_whoever_may_read_the_card_may_read_the_weights(form, request):
    folder = request.getfixturevalue(form)
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "README.md").stat().st_mode}


def test_the_card_states_data_grader_rewards_with_intervals_config_and_commit(trained, merged):
    text = (merged / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "transformers" and "agent-rft" in about["tags"]
    assert "base_model" not in about, "a folder is no model of a hub"
    for stated in (
        "the policy after step 3 of 3",
        "| mean reward |",
        "| held-out tasks | before | step 3 | change |",
        "paired bootstrap over tasks",
        "type: finance",
        "type: numeric",
        "slope: 0.04",
        "learning rate 0.03",
        f"run-{trained.about['run_id'].removeprefix('run-')}",
        f"commit {trained.about['versions']['commit']}",
        "--served-model-name policy",
        "--tool-call-parser hermes",
    ):
        assert stated in body, stated
    assert str(trained.model_path.parent) not in text, "a folder of the training machine"


def test_the_card_of_a_checkpoint_shows_no_later_evaluation(finished, tmp_path):
    text = (export(find_trained(finished, 2), Artefact(to=tmp_path / "out")) / "README.md").read_text()
    assert "the policy after step 2 of 3" in text and "| held-out tasks | before |" in text
    assert "step 3 |" not in text


def test_no_text_of_a_config_breaks_out_of_the_card(run_folder, tmp_path):
    path = run_folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    source = "def grade(sample, item):\n    '''\n```\n# Ha\n'''\n    return 1.0\n"
    config["grader"] = {"type": "python", "source": source, "pass_threshold": 0.5}
    path.write_text(yaml.safe_dump(config))
    text = (export(find_trained(run_folder), Artefact(to=tmp_path / "out")) / "README.md").read_text()
    assert text.count("\n````\n") >= 4, "its fence is longer than any in it"


# ---- whole or not at all


def refused(*arguments: object) -> str:
    """The one line."""
    ended = run_script("export", *arguments)
    assert ended.returncode == 2 and not ended.stdout, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_no_run_there_is_told(tmp_path):
    assert f"{tmp_path}: holds no config.yaml; expected the folder of a run" in refused(tmp_path)


def test_a_run_that_has_not_ended_names_the_checkpoints_that_there_are(run_folder):
    about = json.loads((run_folder / "run.json").read_text())
    del about["finished_steps"], about["adapter"]
    (run_folder / "run.json").write_text(json.dumps(about))
    assert "has not ended, so there is no final adapter yet; --step takes a checkpoint's: 2, 3" in refused(run_folder)
    assert find_trained(run_folder, 2).step == 2


def test_an_unknown_step_names_those_that_are_kept(run_folder):
    assert "--step 1: " in (line := refused(run_folder, "--step", 1)) and "but of 2, 3" in line


@pytest.mark.parametrize("step", [None, 3])
def test_a_damaged_adapter_is_not_exported(run_folder, step):
    folder = run_folder / "adapter" if step is None else run_folder / "checkpoints/step-000003/adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: w * 2 for name, w in weights.items()}, folder / "adapter_model.safetensors")
    line = refused(run_folder, *([] if step is None else ["--step", step]))
    assert "is not what the run wrote" in line or "adapter_model.safetensors: is damaged" in line
    assert not [p for p in run_folder.parent.iterdir() if "adapter" in p.name]


def test_weights_are_merged_into_no_other_base_than_the_one_that_was_trained(run_folder, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "written over")
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 0.2 * torch.randn_like(w) for name, w in weights.items()}, other / "model.safetensors")
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(config.replace(str(tiny_model), str(other)))
    told = refused(run_folder, "--form", "merged", "--to", tmp_path / "out")
    assert "model.name: the base model is not the one that" in told and "nats a token" in told
    assert not (tmp_path / "out").exists()


def test_a_run_with_an_attention_of_gpus_is_merged_on_a_cpu(run_folder, tmp_path):
    config = (run_folder / "config.yaml").read_text()
    assert "attn_implementation: auto" in config
    changed = config.replace("attn_implementation: auto", "attn_implementation: flash_attention_2")
    (run_folder / "config.yaml").write_text(changed)
    assert (export(find_trained(run_folder), Artefact(form="merged", to=tmp_path / "out")) / "config.json").is_file()


def test_a_base_that_turns_long_rows_otherwise_is_known_as_the_one_that_was_trained(trained, tmp_path):
    """LongRoPE: the training turns all rows by the longest that there may be, and the canary's are short."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    lengths = {"original_max_position_embeddings": 32, "max_position_embeddings": 2048}
    Phi3ForCausalLM(Phi3Config(rope_parameters=rope, **lengths, **small, **rest)).save_pretrained(tmp_path / "base")
    model = trained.config.model.model_copy(update={"name": str(tmp_path / "base")})
    config = trained.config.model_copy(update={"model": model})
    longest, ids = config.rollout.max_episode_tokens, [list(range(3, 33))]
    base = load_model(tmp_path / "base", model, device=torch.device("cpu"), seed=0, max_length=longest)
    scores = scores_of(base, ids)
    records = [of_base(ids, scores), of_policy(trained.step, scores)]
    (tmp_path / CANARY).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    here = replace(trained, run=tmp_path, config=config)
    _check_base(here, _loaded(here))


def test_a_target_that_exists_stays_as_it_is(run_folder, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("mine")
    assert f"--to {target}: is there already" in refused(run_folder, "--to", target)
    assert [p.name for p in target.iterdir()] == ["mine"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is there already" in refused(run_folder, "--to", tmp_path / "link")


def test_a_target_that_no_export_can_be_is_refused_and_leaves_nothing(run_folder, tmp_path):
    before = sorted(run_folder.rglob("*"))
    for inside in (run_folder / "export", run_folder / "adapter" / "inner"):
        assert "lies in the run folder" in refused(run_folder, "--to", inside)
    assert "names no folder" in refused(run_folder, "--to", "")
    for length in (250, 300):
        assert "File name too long" in refused(run_folder, "--to", tmp_path / ("x" * length))
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "float16"], "--dtype: only with --form merged or gguf"),
        (["--quantise", "q8_0"], "--quantise: only with --form gguf"),
        (["--form", "merged", "--llama-cpp", "x"], "--llama-cpp: only with --form gguf"),
        (["--form", "gguf", "--llama-cpp", "nowhere"], "--llama-cpp nowhere: holds no convert_hf_to_gguf.py"),
        (["--form", "gguf", "--dtype", "float16", "--quantise", "q8_0"], "--dtype: what is quantised has no dtype"),
        (["--name", "policy"], "--name: only with --deploy"),
        (["--deploy", "http://127.0.0.1:9", "--form", "merged"], "--form: not with --deploy, which takes the adapter"),
        (["--deploy", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH"], "--api-key-env NO_SUCH: this variable is not"),
        (["--deploy", "127.0.0.1"], "--deploy 127.0.0.1: not the URL of a server"),
        (["--to", "/dev/null/out"], "--to /dev/null/out: "),
    ],
)
def test_options_that_do_not_go_together_are_told(finished, arguments, told):
    assert told in refused(finished, *arguments)


def test_a_disk_that_fills_up_leaves_nothing_behind(trained, tmp_path):
    """A limit of the system on a file's size stands for the disk: it fails the same calls."""
    target, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"--to {target}: can't be written: .*(File too large|os error 27)"):
            export(trained, Artefact(form="merged", to=target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_place_without_room_is_told_before_the_model_is_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.exports.artefact._OVERHEAD_BYTES", 2**60)
    with pytest.raises(UserError, match=r"MiB free, and the export takes up to [\d,]+ MiB"):
        export(trained, Artefact(form="merged", to=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_cleared_by_the_next(trained, tmp_path):
    left = tmp_path / ".unfinished-out"
    left.mkdir()
    (left / "junk").write_text("junk")
    folder = export(trained, Artefact(to=tmp_path / "out"))
    assert not left.exists() and not (folder / "junk").exists()


def test_of_two_exports_to_one_place_at_once_the_second_is_refused_and_harms_nothing(trained, tmp_path, monkeypatch):
    second: list[str] = []

    def meanwhile(*of: object) -> None:
        if not second:
            second.append("asked")
            with pytest.raises(UserError, match="another export is being written there") as refusal:
                export(trained, Artefact(to=tmp_path / "out"))
            second.append(str(refusal.value))

    monkeypatch.setattr("trainer.exports.artefact._check_space", meanwhile)
    folder = export(trained, Artefact(to=tmp_path / "out"))
    assert len(second) == 2 and (folder / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- for servers


def test_servers_read_the_runs_own_adapter_or_an_export_of_a_checkpoint_that_may_be_there_already(run_folder):
    assert servable(find_trained(run_folder)) == (run_folder / "adapter").resolve()
    of_two = find_trained(run_folder, 2)
    folder = servable(of_two)
    assert folder.name == "run-step-2-adapter" and servable(of_two) == folder
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="is there already"):
        servable(of_two)
