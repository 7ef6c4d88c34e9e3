"""The README's own snippets work as they are written."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the README has a user write, under the names in their first lines; its row is rows.jsonl."""
    for name, text in re.findall(r"^```(?:python|yaml)\n# (\S+\.\w+)\n(.*?)^```$", README, re.M | re.S):
        (tmp_path / name).write_text(text)
    [row] = re.findall(r"^```json\n(.*?)^```$", README, re.M | re.S)
    (tmp_path / "rows.jsonl").write_text(row)
    return tmp_path


def test_the_readmes_tools_rows_and_grader_make_a_run(folder: Path, smollm2: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"my_tools.py", "my_rewards.py", "mine.yaml", "rows.jsonl"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "mine.yaml", "--check"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tools +stock$", done.stdout, re.M) and re.search(r"tasks +1 to train on", done.stdout)


def test_the_readmes_grader_tells_right_from_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from envs.registry import build_world
    from envs.tools import call_tool
    from envs.types import Episode, Message, StopReason, ToolCall, ToolErrorKind, Turn
    from graders.build import build_grader
    from trainer.config import load_config
    from trainer.prepare import prepare

    monkeypatch.chdir(folder)
    config = load_config(Path("mine.yaml"))
    [task] = prepare(config).train_tasks

    async def played(answer: str, sku: str) -> tuple[float, str, ToolErrorKind | None]:
        env = build_world(config.world).make_env()
        await env.open(task, "r-1")
        call = ToolCall(call_id="c", name="stock", arguments=f'{{"sku": "{sku}"}}')
        result = await call_tool(env.tools, call, timeout_s=5)
        said = Message(role="assistant", content=answer)
        episode = Episode(
            rollout_id="r-1",
            task_id=task.task_id,
            messages=(*task.messages, said),
            turns=(Turn(message=said),),
            stop_reason=StopReason.ANSWERED,
        )
        grade = await build_grader(config.grader, config.penalties).grade(task, episode)
        return grade.reward, result.output, result.error

    assert asyncio.run(played("There are 12 in store", "A-1007")) == (1.0, "12", None)
    reward, output, error = asyncio.run(played("There are 120", "Z-9"))
    assert reward == 0.0 and "no article Z-9" in output and error is not None


def test_every_command_of_the_readme_names_files_that_exist() -> None:
    for path in re.findall(r"\b((?:scripts|configs|docs)/[\w./-]+)", README):
        assert (ROOT / path).exists() or path == "configs/mine.yaml", path
