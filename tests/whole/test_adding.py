"""The recipes of docs/adding.md work as they are written, in a copy of the repository, and touch few files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.recipes import PAGE, apply, copied, recipe

USES = {
    "A loss of your own": """
        from trainer.config import RunConfig
        from trainer.learning.losses.registry import _example, loss_of
        loss = {"type": "custom", "target": "my_loss.py:reinforce"}
        config = RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, "loss": loss})
        value, metrics = loss_of(config.loss)(_example(has_reference=False))
        assert value.requires_grad and metrics["weight"] > 0 and metrics["num_tokens"] == 4
    """,
    "A loss": """
        from trainer.config import RunConfig, reference
        from trainer.learning.losses.registry import _example, loss_of
        loss = {"type": "plain", "scale": 2.0, "tis_cap": None}
        config = RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, "loss": loss})
        inputs = _example(has_reference=False)
        value, metrics = loss_of(config.loss)(inputs)
        assert abs(value.item() + 2 * (inputs.logprobs_N * inputs.advantages_N).sum().item() / 4) < 1e-6
        assert "### `loss: {type: plain}`" in reference.page()
    """,
    "An engine of your own": """
        from trainer.config import RunConfig
        from trainer.engines.engine import ChecksRun, KeepsBase, Sleeps, make_engine
        engine = {"type": "custom", "target": "my_engine.py:ServedEngine", "kwargs": {"url": "http://127.0.0.1:1"}}
        data = {"output_dir": "x", "grader": {"type": "numeric"}, "engine": engine}
        engine = make_engine(RunConfig.model_validate(data).engine)
        assert engine.runs_here and not engine.publishes_merged
        assert isinstance(engine, ChecksRun) and not isinstance(engine, (KeepsBase, Sleeps))
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        engine.check_run(RunConfig.model_validate(data))
        try:
            engine.check_run(RunConfig.model_validate(data | {"rollout": {"response_format": schema}}))
        except ValueError as e:
            assert str(e).startswith("rollout.response_format: ")
        else:
            raise AssertionError
    """,
    "An engine": """
        import asyncio, math
        from pathlib import Path
        from trainer.config import ModelConfig, RunConfig, reference
        from trainer.engines.engine import EngineStart, Sampling, make_engine
        engine = {"type": "uniform", "vocabulary": 8}
        config = RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, "engine": engine})
        engine = make_engine(config.engine)
        given = EngineStart(model_path=Path(), model=ModelConfig(), max_model_len=9, stop_token_ids=[2], device="cpu")
        asyncio.run(engine.start(given))
        sampling = Sampling(max_tokens=4, temperature=1.0, top_p=1.0, seed=0)
        completion = asyncio.run(engine.generate([5, 6], sampling))
        assert completion.token_ids == [2] and completion.finished and completion.logprobs == [-math.log(8)]
        assert "### `engine: {type: uniform}`" in reference.page()
    """,
    "A world": """
        import asyncio
        from envs.registry import build_world
        from trainer.config import RunConfig
        world = {"type": "coin", "num_tasks": 2}
        config = RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, "world": world})
        world = build_world(config.world)
        assert [task.task_id for task in world.tasks("eval")] == ["eval-0", "eval-1"]
        env = world.make_env()
        from envs.tools import call_tool
        from envs.types import ToolCall
        call = ToolCall(call_id="c", name="toss", arguments="{}")
        assert asyncio.run(call_tool(env.tools, call, timeout_s=5)).output == "heads"
    """,
    "A grader": """
        import asyncio
        from pydantic import TypeAdapter
        from envs.types import Episode, Message, StopReason, Task, Turn
        from graders.build import build_grader
        from graders.config import GraderConfig
        from graders.penalties import PenaltiesConfig
        both = {"type": "multi", "calculate_output": "a + b", "graders": {
            "a": {"type": "length", "at_most": 3}, "b": {"type": "length", "at_most": 1}}}
        grader = build_grader(TypeAdapter(GraderConfig).validate_python(both), PenaltiesConfig())
        said = Message(role="assistant", content="4.2")
        episode = Episode(rollout_id="r", task_id="t", messages=(said,), turns=(Turn(message=said),),
                          stop_reason=StopReason.ANSWERED)
        assert asyncio.run(grader.grade(Task(task_id="t", messages=()), episode)).reward == 1.0
    """,
}
"""What is then done with it. Measures and pictures: tests/trainer/measures/test_measures.py."""
FILES = {
    "A loss of your own": 0,
    "A loss": 3,
    "An engine of your own": 0,
    "An engine": 2,
    "A world": 2,
    "A grader": 2,
    "A measure": 1,
    "A picture": 1,
}


@pytest.mark.parametrize("heading", USES)
def test_a_recipe_works_as_it_is_written(heading: str, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree")
    touched = apply(tree, heading)
    program = "\n".join(line.removeprefix("        ") for line in USES[heading].splitlines())
    environment = {"PYTHONPATH": str(tree), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(touched) == FILES[heading]
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    ruff += sorted(touched or {"envs/base.py"})
    check = subprocess.run(ruff, cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("heading", FILES)
def test_the_page_says_how_many_files_a_recipe_touches(heading: str) -> None:
    words = {0: "No file", 1: "One file", 2: "Two files", 3: "Three files"}
    assert PAGE.partition(f"## {heading}\n\n")[2].startswith(words[FILES[heading]])
    assert len({file for file, _, _ in recipe(heading) if "/" in file}) == FILES[heading]
