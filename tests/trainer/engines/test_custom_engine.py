"""`engine: {type: custom}`: an engine that a user brings, looked at before the run, proved and trained with as ours."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from envs.base import Closes, Counts
from envs.errors import FoundLate, PublishError, UserError, WorldError
from envs.finance.world import FinanceWorld
from graders.types import taken_metrics
from tests.support.configs import scripted_config
from tests.support.scripted_engine import engine_starter, finance_script
from trainer.config import ENGINES, CustomEngineConfig, EngineConfig, ModelConfig, RunConfig, validate_config
from trainer.engines.custom import CustomEngine
from trainer.engines.engine import (
    ChecksModel,
    ChecksRun,
    Completion,
    EngineStart,
    KeepsBase,
    Sampling,
    Sleeps,
    make_engine,
)
from trainer.prepare import prepare
from trainer.runs.files import read_lines
from trainer.session import open_engine
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SCRIPTED = """
from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld
from tests.support.scripted_engine import ScriptedEngine, finance_script

class Mine(ScriptedEngine):
    def __init__(self, world):
        super().__init__(finance_script(FinanceWorld(FinanceConfig(**world))))

class Proxy:
    "As somebody writes it who wants to see what an engine is asked for."
    runs_here = False
    def __init__(self, world):
        self._inner, self.asked = Mine(world), []
    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self._inner, name)

class DoesNotPublish(Mine):
    async def publish(self, weights, version):
        self.version = version

class PublishesOnce(Mine):
    async def publish(self, weights, version):
        if version < 1:
            await super().publish(weights, version)
        self.version = version

class AnotherModel(Mine):
    async def start(self, given):
        import torch
        await super().start(given)
        with torch.no_grad():
            for weight in self._base.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)

class SamplesWithTheBase(Mine):
    async def generate(self, prompt_ids, sampling):
        if self._adapted is None:
            return await super().generate(prompt_ids, sampling)
        with self._adapted.disable_adapter():
            return await super().generate(prompt_ids, sampling)

class CannotStart(Mine):
    async def start(self, given):
        raise ValueError("no model " + given.model_path.name)
    def shutdown(self):
        (given := __import__("pathlib").Path("was_shut_down")).touch()
"""
WORLD = {"num_companies": 8, "num_train_tasks": 3, "num_eval_tasks": 3, "question_mix": {"value": 1.0}}


def scripted(folder: Path, model: Path, name: str | None) -> RunConfig:
    """A run of two steps over the engine `name`, or over ours."""
    config = scripted_config(folder / (name or "ours"), model, optim={"num_steps": 2, "learning_rate": 1e-2})
    if name is not None:
        (folder / "mine.py").write_text(SCRIPTED)
        world = {"type": "finance", "detour_calls": 0, **WORLD}
        config["engine"] = {"type": "custom", "target": f"{folder / 'mine.py'}:{name}", "kwargs": {"world": world}}
    return RunConfig.model_validate(config)


@pytest.mark.parametrize("name", ["Mine", "Proxy"])
def test_a_run_over_it_is_the_run_over_ours(name: str, tiny_model: Path, tmp_path: Path) -> None:
    ours, theirs = scripted(tmp_path, tiny_model, None), scripted(tmp_path, tiny_model, name)
    train(ours, start_engine=engine_starter(finance_script(FinanceWorld(ours.world))))
    train(theirs)
    adapters = [(c.output_dir / "adapter" / "adapter_model.safetensors").read_bytes() for c in (ours, theirs)]
    assert adapters[0] == adapters[1]
    steps = [line for line in read_lines(theirs.output_dir / "metrics.jsonl") if "canary/mismatch" in line]
    assert len(steps) == 2 and all(step["canary/applied_since_version"] > 0.9 for step in steps)
    assert json.loads((theirs.output_dir / "run.json").read_text())["finished_steps"] == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DoesNotPublish", "the engine still answers as the base model under an adapter that changes every layer"),
        ("PublishesOnce", "after policy-v1 was published the engine"),
        ("AnotherModel", "after the base model was loaded the engine's log-probabilities differ"),
    ],
)
def test_one_that_does_not_run_the_policy_is_found_out(name: str, told: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=told):
        train(scripted(tmp_path, tiny_model, name))


def test_one_that_samples_with_other_weights_than_it_scores_is_told_of(tiny_model: Path, tmp_path: Path) -> None:
    """The canary is right all the same."""
    for name, is_told in (("Mine", False), ("SamplesWithTheBase", True)):
        config = scripted(tmp_path, tiny_model, name)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"canary_mean_tolerance": 0.003})})
        folder = train(config)
        assert ("sampled with other log-probabilities" in (folder / "run.log").read_text()) is is_told


def test_one_that_does_not_start_is_shut_down(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = scripted(tmp_path, tiny_model, "CannotStart")
    prepared = SimpleNamespace(
        config=config,
        model_path=tiny_model,
        chat=SimpleNamespace(stop_token_ids={2}),
        engine=make_engine(config.engine),
        num_versions=1,
    )
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cpu"), local_process_index=0, process_index=0)
    with pytest.raises(ValueError, match=f"no model {tiny_model.name}") as raised:
        asyncio.run(open_engine(prepared, accelerator, None, first_step=0))  # type: ignore[arg-type]
    assert raised.value.__notes__ == [f"raised by engine.target '{tmp_path}/mine.py:CannotStart': start()"]
    assert (tmp_path / "was_shut_down").exists()


# --- what is looked at before the run

FORM = """
from trainer.engines.engine import Completion

class Whole:
    runs_here, publishes_merged = False, True
    def __init__(self, url="http://127.0.0.1:1"): self.url = url
    async def start(self, given): ...
    async def generate(self, prompt_ids, sampling): ...
    async def score(self, token_ids): ...
    async def publish(self, weights, version): ...
    def shutdown(self): ...

class Nothing: ...
class NoScore(Whole):
    score = property()
class NoFacts(Whole):
    @property
    def publishes_merged(self): raise AttributeError
class Undecided(Whole):
    publishes_merged = "auto"
class NotMethod(Whole):
    score = 3
class Swapped(Whole):
    async def publish(self, version, weights): ...
class Narrow(Whole):
    async def generate(self, prompt_ids): ...
class Sleepy(Whole):
    async def sleep(self): ...
class HalfBase(Whole):
    async def generate_base(self, prompt_ids, max_tokens): ...
class Raises(Whole):
    def __init__(self): raise RuntimeError("no server")
class Exits(Whole):
    def __init__(self): raise SystemExit(0)
async def later(): return Whole()
def factory(url): return Whole(url)
whole = Whole()
number = 3
class Refuses(Whole):
    def check_run(self, config): raise KeyError(config.engine.type)
class RefusesModel(Whole):
    def check_model(self, config, folder, *, trains): raise RuntimeError(str((folder / "config.json").is_file()))
"""


@pytest.fixture
def form(tmp_path: Path) -> Path:
    path = tmp_path / "form.py"
    path.write_text(FORM)
    return path


def custom(file: Path, name: str, **settings: Any) -> CustomEngineConfig:
    return CustomEngineConfig(type="custom", target=f"{file}:{name}", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("nothing", {}, r"form\.py has no 'nothing'; did you mean 'Nothing'"),
        ("number", {}, "expected a class or a factory, got int"),
        ("Nothing", {}, "Nothing has no runs_here, publishes_merged, start, generate, score, publish, shutdown; see "),
        ("NoScore", {}, "NoScore has no score; see"),
        ("NoFacts", {}, "NoFacts has no publishes_merged; see"),
        ("Undecided", {}, "publishes_merged: expected true or false, got 'auto'"),
        ("NotMethod", {}, r"NotMethod\.score: expected a method, got int"),
        ("Swapped", {}, r"publish is called as publish\(weights, version\), but: its parameters are version, weights"),
        ("Narrow", {}, r"generate is called as generate\(prompt_ids, sampling\), but: too many positional arguments"),
        ("Sleepy", {}, "Sleepy has sleep, and no wake_up"),
        ("HalfBase", {}, r"generate_base is called as generate_base\(prompt_ids, max_tokens=, .*, schema=\), but: "),
        ("Raises", {}, r"raised RuntimeError: no server \(.*form\.py, line \d+\)"),
        ("Exits", {}, "raised SystemExit"),
        ("later", {}, r"expected an engine, not a coroutine: what takes time belongs in start\(\)"),
        ("Whole", {"kwargs": {"uri": "x"}}, "kwargs: got an unexpected keyword argument 'uri'"),
        ("factory", {}, "kwargs: missing a required argument: 'url'"),
        ("whole", {"kwargs": {"url": "x"}}, "kwargs: have no effect"),
        ("Refuses", {}, r"check_run\(\): raised KeyError: 'custom'"),
        ("RefusesModel", {}, r"check_model\(\): raised RuntimeError: True"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_a_model_is_loaded(
    tmp_path: Path, tiny_model: Path, form: Path, name: str, settings: dict[str, Any], told: str
) -> None:
    engine = {"type": "custom", "target": f"{form}:{name}", **settings}
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, engine=engine))
    with pytest.raises(UserError, match=rf"^engine\.target '.*form\.py:{name}':? .*{told}"):
        prepare(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "kwargs"), [("Whole", {}), ("factory", {"url": "x"}), ("whole", {})])
def test_a_class_a_factory_or_an_engine_is_taken(form: Path, name: str, kwargs: dict[str, Any]) -> None:
    engine = make_engine(custom(form, name, kwargs=kwargs))
    assert not engine.runs_here and engine.publishes_merged
    for protocol in (Sleeps, KeepsBase, ChecksRun, ChecksModel, Counts, Closes):
        assert not isinstance(engine, protocol)


def test_what_it_may_have_besides_is_asked_of_it_though_it_hands_all_on(tmp_path: Path) -> None:
    (tmp_path / "able.py").write_text(
        FORM
        + """
class Able(Whole):
    calls = []
    async def sleep(self): self.calls.append("sleep")
    async def wake_up(self): self.calls.append("wake_up")
    def generate_base(self, prompt_ids, *, max_tokens, temperature, top_p, seed, schema): return [7] * max_tokens
    def check_run(self, config): self.calls.append(config)
    def check_model(self, config, folder, *, trains): self.calls.append((folder, trains))
    def take_metrics(self): return {"engine/retries": 3.0}
    async def aclose(self): self.calls.append("aclose")

class HandsOn:
    def __init__(self): self._able = Able()
    def __getattr__(self, name): return getattr(self._able, name)
"""
    )
    engine = make_engine(custom(tmp_path / "able.py", "HandsOn"))
    assert isinstance(engine, Sleeps) and isinstance(engine, KeepsBase) and isinstance(engine, Closes)
    assert isinstance(engine, ChecksRun) and isinstance(engine, ChecksModel)

    async def use() -> list[int]:
        await engine.sleep()
        await engine.wake_up()
        engine.check_run("config")
        engine.check_model("config", tmp_path, trains=False)
        await engine.aclose()
        return await engine.generate_base([1], max_tokens=2, temperature=0.0, top_p=1.0, seed=None, schema=None)

    assert asyncio.run(use()) == [7, 7]
    assert engine._engine.calls == ["sleep", "wake_up", "config", (tmp_path, False), "aclose"]  # type: ignore[attr-defined]
    assert taken_metrics(engine) == {"engine/retries": 3.0}


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("def take_metrics(self): ...", "expected figures by name, got NoneType"),
        ("async def take_metrics(self): return {}", "expected a plain method, not an async one"),
        (
            "def take_metrics(self): return {'engine/gpu': 'H100'}",
            "expected figures by name, got 'H100' under 'engine/gpu'",
        ),
        (
            "def take_metrics(self): return {'engine/calls': None}",
            "expected figures by name, got None under 'engine/calls'",
        ),
        (
            "def take_metrics(self): return {'engine/calls': 10**400}",
            "the figure 'engine/calls' is larger than any float",
        ),
    ],
)
def test_figures_that_are_none_are_named(form: Path, method: str, told: str) -> None:
    form.write_text(f"{FORM}\nclass Counting(Whole):\n    {method}\n")
    with pytest.raises(FoundLate, match=rf"^Counting\.take_metrics\(\): {told}$"):
        taken_metrics(make_engine(custom(form, "Counting")))


def test_a_judge_that_asks_the_engine_needs_one_that_keeps_the_base(
    form: Path, tmp_path: Path, tiny_model: Path
) -> None:
    engine = {"type": "custom", "target": f"{form}:Whole"}
    data = scripted_config(tmp_path / "run", tiny_model, engine=engine, judge={"base_url": "engine"})
    with pytest.raises(UserError, match=r"^judge\.base_url: engine needs the base model .* has no generate_base$"):
        prepare(RunConfig.model_validate(data))


# --- its answers

GOOD = Completion(token_ids=[5, 2], logprobs=[-0.5, -0.1], finished=True, policy_version=0)
SAMPLING = Sampling(max_tokens=3, temperature=1.0, top_p=1.0, seed=0)
GIVEN = EngineStart(model_path=Path(), model=ModelConfig(), max_model_len=9, stop_token_ids=[2], device="cpu")


def answering(form: Path, **answers: Any) -> CustomEngine:
    """A started one whose members give `answers`; an error is raised."""
    engine = CustomEngine(custom(form, "Whole"))
    asyncio.run(engine.start(GIVEN))
    for name, answer in answers.items():

        def give(*given: Any, answer: Any = answer) -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

        setattr(engine._engine, name, give)
    return engine


def completion(**changed: Any) -> Completion:
    fields = {name: getattr(GOOD, name) for name in ("token_ids", "logprobs", "finished", "policy_version")}
    return Completion(**fields | changed)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "expected a trainer.engines.engine.Completion; got NoneType"),
        ({"token_ids": [2]}, "Completion; got dict"),
        (completion(token_ids=["a", "b"]), "expected a list of token ids; got"),
        (completion(token_ids=[], logprobs=[]), r"expected 1 to 3 tokens \(max_tokens\); got 0"),
        (completion(token_ids=[5, 5, 5, 2]), "expected 1 to 3 tokens .* got 4"),
        (completion(logprobs=[-0.5]), "expected 2 log-probabilities, one a token; got 1"),
        (completion(logprobs=[-0.5, None]), "expected a list of log-probabilities"),
        (completion(logprobs=[0.6, 0.9]), "expected log-probabilities, none above 0; got 0.6"),
        (completion(logprobs=[-0.5, math.nan]), "none above 0; got nan"),
        (completion(logprobs=[-0.5, -math.inf]), "none above 0; got -inf"),
        (
            completion(token_ids=[5, 6]),
            r"finished with a stop token \(2\) last, and only then; got finished=True and 6",
        ),
        (completion(finished=False), "got finished=False and 2 for the last token"),
        (completion(token_ids=[2, 2]), r"expected a turn that ends at a stop token \(2\); got more tokens after it"),
        (completion(constrained_from=0), "expected constrained_from where the request has a schema"),
    ],
)
def test_a_turn_of_another_form_ends_the_run(form: Path, answer: Any, told: str) -> None:
    engine = answering(form, generate=answer)
    with pytest.raises(FoundLate, match=rf"^engine\.target '.*form\.py:Whole': generate\(\): .*{told}"):
        asyncio.run(engine.generate([1], SAMPLING))


@pytest.mark.parametrize("keeps_versions", [False, True])
async def test_new_weights_wait_for_a_turn_in_a_thread_that_was_cut_off(form: Path, keeps_versions: bool) -> None:
    engine = CustomEngine(custom(form, "Whole"))
    engine.keeps_versions = keeps_versions
    began, may_end, order = threading.Event(), threading.Event(), list[str]()

    def generate(prompt_ids: Any, sampling: Any) -> Completion:
        began.set()
        may_end.wait(30)
        order.append("turn")
        return GOOD

    engine._engine.generate, engine._engine.publish = generate, lambda weights, version: order.append("weights")
    turn = asyncio.create_task(engine.generate([1], SAMPLING))
    await asyncio.to_thread(began.wait, 30)
    turn.cancel()
    publishing = asyncio.create_task(engine.publish(Path(), 1))
    await asyncio.sleep(0.05)
    assert publishing.done() is keeps_versions
    may_end.set()
    async with asyncio.timeout(30):
        await publishing
    assert order[0] == ("weights" if keeps_versions else "turn")


def test_a_turn_of_another_version_than_was_published_ends_the_run(form: Path) -> None:
    engine = answering(form, generate=GOOD, score=[-0.1, -0.2])
    assert asyncio.run(engine.generate([1], SAMPLING)) == GOOD
    assert asyncio.run(engine.score([1, 2, 3])) == [-0.1, -0.2]
    asyncio.run(engine.publish(Path(), 1))
    with pytest.raises(PublishError, match="gives tokens of policy-v0 after policy-v1 was published"):
        asyncio.run(engine.generate([1], SAMPLING))
    with pytest.raises(UserError, match=r"score\(\): expected 3 log-probabilities, one a token; got 2"):
        asyncio.run(engine.score([1, 2, 3, 4]))


def test_a_lost_connection_costs_a_rollout_and_a_mistake_ends_the_run_with_its_place(form: Path) -> None:
    for lost in (ConnectionRefusedError("no"), TimeoutError("slow"), WorldError("busy")):
        with pytest.raises(WorldError):
            asyncio.run(answering(form, generate=lost).generate([1], SAMPLING))
    with pytest.raises(KeyError) as raised:
        asyncio.run(answering(form, generate=KeyError("choices")).generate([1], SAMPLING))
    assert raised.value.__notes__[0].endswith("form.py:Whole': generate()")


def test_what_is_not_async_does_not_hold_up_the_others(form: Path) -> None:
    both = threading.Barrier(2, timeout=30)

    def generate(prompt_ids: list[int], sampling: Sampling) -> Completion:
        both.wait()
        return GOOD

    engine = answering(form)
    engine._engine.generate = generate

    async def two() -> list[Completion]:
        return await asyncio.gather(engine.generate([1], SAMPLING), engine.generate([2], SAMPLING))

    assert asyncio.run(two()) == [GOOD, GOOD]


# --- the settings


def test_settings_without_a_type_are_those_of_the_local_engine(tmp_path: Path) -> None:
    data = {"output_dir": str(tmp_path), "grader": {"type": "numeric"}}
    for engine in ({}, {"publish": "lora"}, {"type": "local", "kv_cache_gib": 1}):
        assert type(validate_config(data | {"engine": engine}, source="test").engine) is EngineConfig
    for engine, told in (
        ({"type": "vllm"}, r"engine\.type: expected one of 'local', 'custom' \(got 'vllm'\)"),
        ({"type": "custom"}, r"engine\.target: required, but not given"),
        ({"type": "custom", "target": "a.py:B", "publish": "lora"}, r"engine\.publish: unknown key"),
        ({"type": "custom", "target": "a"}, r"engine\.target: expected `package\.module:Name`"),
        ("custom", r"engine: expected settings, such as \{type: custom, \.\.\.\} \(got 'custom'\)"),
        ({"publsh": "lora"}, r"engine\.publsh: unknown key; did you mean publish"),
    ):
        with pytest.raises(UserError, match=told):
            validate_config(data | {"engine": engine}, source="test")


def test_every_engine_of_the_register_is_made_of_its_settings(form: Path) -> None:
    assert {name: entry.settings.model_fields["type"].annotation.__args__[0] for name, entry in ENGINES.items()} == {
        name: name for name in ENGINES
    }
    assert isinstance(make_engine(EngineConfig()), KeepsBase) and isinstance(make_engine(EngineConfig()), Sleeps)
    assert type(make_engine(custom(form, "Whole"))) is CustomEngine
