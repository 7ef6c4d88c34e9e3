"""The whole spine with the scripted engine: real model, real updates, real proof; only what is written is scripted."""

import gc
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from envs.errors import PublishError, UserError, WorldError
from envs.finance.world import FinanceWorld
from tests.support.configs import scripted_config
from tests.support.scripted_engine import BROKEN_CALL, Faults, ScriptedEngine, engine_starter, finance_script
from trainer.config import RunConfig
from trainer.engines.engine import PROBE_VERSION
from trainer.measures.reference import is_known
from trainer.runs.records import rollout_from_json
from trainer.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # accelerate leaves its TensorBoard writer to the garbage collector when a run stops with an error.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_config(folder: Path, model: Path, **sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(scripted_config(folder, model, **sections))


def start(config: RunConfig, faults: Faults | None = None) -> ScriptedEngine:
    """Train to the end; the engine that served it."""
    engines: list[ScriptedEngine] = []
    script = finance_script(FinanceWorld(config.world))
    train(config, start_engine=engine_starter(script, faults, engines))
    (engine,) = engines
    return engine


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("train") / "run", tiny_model)


@pytest.fixture(scope="module")
def engine(config: RunConfig) -> ScriptedEngine:
    import torch

    torch.set_num_threads(1)
    return start(config)


@pytest.fixture(scope="module")
def metrics(config: RunConfig, engine: ScriptedEngine) -> list[dict[str, Any]]:
    return lines(config.output_dir / "metrics.jsonl")


def test_the_run_folder_is_complete(config, engine):
    folder = config.output_dir
    for name in ("config.yaml", "run.json", "metrics.jsonl", "run.log", "report.html"):
        assert (folder / name).stat().st_size, name
    assert RunConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert [p.name for p in sorted((folder / "rollouts").iterdir())] == [f"step-00000{i}.jsonl" for i in (1, 2, 3)]
    assert [p.name for p in sorted((folder / "evals").iterdir())] == ["step-000000.jsonl", "step-000003.jsonl"]
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= {
        p.name for p in (folder / "adapter").iterdir()
    }
    about = json.loads((folder / "run.json").read_text())
    assert about["adapter"] == str(folder / "adapter")
    for part in ("--enable-lora", "--tool-call-parser hermes", f"policy={folder / 'adapter'}", "chat_template.jinja"):
        assert part in about["serve_command"]
    assert list(folder.rglob("events.out.tfevents.*")), "TensorBoard's files"
    assert not list(folder.rglob(".unfinished-*"))


def test_every_step_and_both_evaluations_have_their_metrics(metrics):
    assert [(r["step"], "eval/reward" in r) for r in metrics] == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    for row in metrics:
        assert all(math.isfinite(value) for value in row.values()), row
        assert [key for key in row if not is_known(key)] == [], "docs/metrics.md says what each key is"
    for row in metrics[1:4]:
        assert row["train/rollouts"] == 8 and row["train/masked_rollouts"] == 0
        assert row["groups/reward_std"] > 0 and row["loss/grad_norm"] > 0 and row["loss/skipped_updates"] == 0
        assert row["loss/mismatch_abs"] < 1e-4, "the engine's log-probabilities are those of the policy"
        assert row["canary/mismatch"] < 1e-4
        assert row["canary/applied_since_model"] == pytest.approx(1, abs=0.01)
        assert row["canary/applied_since_version"] == pytest.approx(1, abs=0.01)


def test_the_sampler_runs_each_version_and_tokens_carry_it(config, engine):
    assert [version for version, _ in engine.published] == [PROBE_VERSION, 0, 1, 2, 3]
    assert engine.is_shut_down
    for step in (1, 2, 3):
        for row in lines(config.output_dir / "rollouts" / f"step-{step:06d}.jsonl"):
            versions = {v for ledger in row["ledgers"] for _, _, v in ledger["sampled"]}
            assert versions == {step - 1}


def test_the_exported_adapter_is_the_last_one_published(config, engine):
    exported = load_file(config.output_dir / "adapter" / "adapter_model.safetensors")
    _, published = engine.published[-1]
    assert exported.keys() == published.keys()
    assert all(exported[name].equal(published[name]) for name in exported)
    assert any(tensor.abs().sum() > 0 for name, tensor in exported.items() if "lora_B" in name)


def test_rollouts_on_disk_hold_what_the_engine_sampled_token_by_token(config, engine):
    """Invariant 1, through the whole spine: every prompt is a prefix of a ledger, what follows it was sampled."""
    ledgers = [
        ledger
        for kind in ("rollouts", "evals")
        for path in (config.output_dir / kind).iterdir()
        for row in lines(path)
        for ledger in rollout_from_json(row).ledgers
    ]
    rows = {tuple(ledger.prompt_ids) for ledger in ledgers}
    assert len(engine.prompts) > 60
    for prompt, completion in zip(engine.prompts, engine.completions, strict=True):
        whole = (*prompt, *completion.token_ids)
        assert any(row[: len(whole)] == whole for row in rows)


def test_training_and_held_out_tasks_differ(config, engine):
    trained, held_out = (
        {row["task"]["task_id"] for path in (config.output_dir / kind).iterdir() for row in lines(path)}
        for kind in ("rollouts", "evals")
    )
    assert trained and held_out and not trained & held_out


def test_a_finished_run_started_again_does_nothing(config, engine):
    before = files(config.output_dir)
    engines: list[ScriptedEngine] = []
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world)), None, engines))
    assert engines == [] and files(config.output_dir) == before


def test_a_run_made_longer_goes_on_as_if_it_had_been_so_from_the_start(config, engine, metrics, tiny_model, tmp_path):
    short = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 1})
    start(short)
    start(make_config(tmp_path / "run", tiny_model))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (config.output_dir / name).read_bytes()


def test_rollouts_lost_to_the_world_are_masked_and_counted(tiny_model, tmp_path):
    config = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 1}, rollout={"world_retries": 0})
    engine = start(config, Faults(failing_requests=frozenset(range(20, 23))))
    assert engine.is_shut_down
    rows = lines(config.output_dir / "metrics.jsonl")
    masked = [r for kind in ("rollouts", "evals") for p in (config.output_dir / kind).iterdir() for r in lines(p)]
    masked = [r for r in masked if r["grade"] is None]
    assert len(masked) == 3
    for key in ("masked_rollouts", "masked_by/world"):
        assert sum(r.get(f"train/{key}", 0) + r.get(f"eval/{key}", 0) for r in rows) == 3
    assert all(r["episode"]["stop_reason"] == "world_fault" for r in masked)
    assert all("failed" in r["episode"]["error"] for r in masked)


def test_a_lost_rollout_is_tried_anew_and_nothing_is_masked(tiny_model, tmp_path):
    config = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 1})
    # One fault in the first evaluation and one in the step, whatever the order of requests within each: two rollouts of
    # five turns at most, and one turn anew, are 11 requests.
    start(config, Faults(failing_requests=frozenset([1, 16])))
    rows = lines(config.output_dir / "metrics.jsonl")
    parts = [(row, "train" if "train/rollouts" in row else "eval") for row in rows]
    assert [row[f"{part}/retried_rollouts"] for row, part in parts] == [1, 1, 0]
    assert [row[f"{part}/masked_rollouts"] for row, part in parts] == [0, 0, 0]
    written = [r for kind in ("rollouts", "evals") for p in (config.output_dir / kind).iterdir() for r in lines(p)]
    assert len(written) == 2 + 8 + 2
    assert sorted(r["num_attempts"] for r in written) == [1] * 10 + [2] * 2
    assert all(r["grade"] is not None for r in written)


def test_a_run_without_trackers_is_not_warned_of_them(tiny_model, tmp_path):
    config = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(config.model_copy(update={"trackers": []}))
    assert not [str(w.message) for w in caught if "tracker" in str(w.message)]
    assert not list(config.output_dir.rglob("*tfevents*"))
    assert len(lines(config.output_dir / "metrics.jsonl")) == 3


def test_a_step_in_which_all_rollouts_are_lost_stops_the_run(tiny_model, tmp_path):
    config = make_config(tmp_path / "run", tiny_model, rollout={"world_retries": 0})
    with pytest.raises(
        WorldError, match=r"no rollout of the step has a grade: 8 lost to faults of the world, most often: .*failed"
    ):
        start(config, Faults(failing_requests=frozenset(range(1, 1000))))
    # With the world back the same command goes on, and does not read again that all were lost.
    start(config)
    rows = lines(config.output_dir / "rollouts" / "step-000001.jsonl")
    assert len(rows) == 8 and all(row["grade"] for row in rows)
    told = "not one of the 8 rollouts of step 1 has a grade: they are made again"
    assert told in (config.output_dir / "run.log").read_text()


def test_steps_without_variance_are_said_aloud_and_the_third_stops_the_run(tiny_model, tmp_path, capfd):
    config = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 9})
    with pytest.raises(UserError, match="rewards did not vary within any group for 3 steps"):
        train(config, start_engine=engine_starter(lambda prompt, seed: "no idea"))
    output = capfd.readouterr().err
    assert output.count("no group of this step had rewards that vary") == 3
    assert output.count("no rollout of this step made a tool call that parsed") == 3
    rows = lines(config.output_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert [r["loss/skipped_updates"] for r in rows[1:]] == [1, 1]


def test_malformed_calls_alone_are_counted_and_never_answers(tiny_model, tmp_path, capfd):
    config = make_config(tmp_path / "run", tiny_model, optim={"num_steps": 1})
    train(config, start_engine=engine_starter(lambda prompt, seed: BROKEN_CALL))
    (row,) = [r for r in lines(config.output_dir / "metrics.jsonl") if "train/reward" in r]
    assert row["train/malformed_calls"] == 5 and row["train/answered"] == 0 and row["train/reward"] == 0
    assert "no rollout of this step made a tool call that parsed" in capfd.readouterr().err


@pytest.mark.parametrize("faults", [Faults(stale_from=1), Faults(always_base=True), Faults(stale_from=2)])
def test_an_engine_that_ignores_an_update_stops_the_run(tiny_model, tmp_path, faults):
    config = make_config(tmp_path / "run", tiny_model)
    with pytest.raises(PublishError, match=r"still answers as|runs another policy"):
        start(config, faults)
    first_ignored = faults.stale_from or 1
    checkpoints = [p.name for p in (config.output_dir / "checkpoints").iterdir()]
    assert max(checkpoints) == f"step-{first_ignored - 1:06d}", "nothing is kept of the step that could not be proved"


def test_two_processes_give_the_same_run_as_one(config, engine, server, tmp_path):
    """Each process rolls out half on an engine of its own, and all train the same adapter."""
    folder = tmp_path / "two"
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"output_dir": str(folder)}))
    # As torchrun and `accelerate launch` start them; test_processes.py has the launchers themselves.
    server.start(path, processes=2)
    assert server.wait() == 0
    assert len(list((folder / "rollouts").glob("step-000001*.jsonl"))) == 2, "each process rolled out its share"

    name = "adapter/adapter_model.safetensors"
    one, two = load_file(config.output_dir / name), load_file(folder / name)
    assert one.keys() == two.keys()
    for key in one:
        # Adam divides by the root of the second moment: where a gradient is near zero its rounding shows.
        assert (one[key] - two[key]).abs().max() < 2e-3, key
        assert (one[key] - two[key]).norm() < 1e-3 * one[key].norm() + 1e-6, key

    def sampled(root: Path) -> dict[str, list[list[int]]]:
        run_id = json.loads((root / "run.json").read_text())["run_id"]
        return {
            row["episode"]["rollout_id"].removeprefix(run_id): [ledger["token_ids"] for ledger in row["ledgers"]]
            for p in (root / "rollouts").iterdir()
            for row in lines(p)
        }

    assert sampled(folder) == sampled(config.output_dir)


def test_prompts_that_leave_no_room_are_an_error_that_names_the_limit(tiny_model, tmp_path):
    short = {"max_turn_tokens": 8, "max_episode_tokens": 16}
    with pytest.raises(UserError, match=r"rollout\.max_episode_tokens"):
        start(make_config(tmp_path / "run", tiny_model, rollout=short))


def test_figures_of_a_users_own_parts_take_the_place_of_none_of_the_trainers(tiny_model, tmp_path):
    (tmp_path / "own.py").write_text("""
class Own:
    async def grade(self, task, episode): return float(len(episode.answer or "") % 2)
    def take_metrics(self): return {"own/seen": 4.0, "step": 77.0, "train/reward": -9.0, "loss/grad_norm": -9.0}
""")
    own = {"type": "custom", "target": f"{tmp_path / 'own.py'}:Own", "pass_threshold": 0.5}
    made = scripted_config(tmp_path / "run", tiny_model, optim={"num_steps": 1}, penalties={}) | {"grader": own}
    made["penalties"] = {}
    start(RunConfig.model_validate(made))
    (step,) = (line for line in lines(tmp_path / "run" / "metrics.jsonl") if "own/seen" in line)
    assert step["step"] == 1 and step["own/seen"] == 4
    assert step["train/reward"] >= 0 and step["loss/grad_norm"] >= 0


def test_while_it_works_collections_of_cycles_are_fewer_and_leave_out_what_was_loaded_before(
    tiny_model, tmp_path, monkeypatch
):
    frozen, thresholds = [], []
    own = FinanceWorld.make_env

    def make_env(world):
        frozen.append(gc.get_freeze_count())
        thresholds.append(gc.get_threshold())
        return own(world)

    monkeypatch.setattr(FinanceWorld, "make_env", make_env)
    config = RunConfig.model_validate(scripted_config(tmp_path / "run", tiny_model, optim={"num_steps": 1}))
    before, (youngest, *older) = gc.get_freeze_count(), gc.get_threshold()
    train(config, start_engine=engine_starter(finance_script(FinanceWorld(config.world))))
    assert frozen[-1] > before + 100_000 and gc.get_freeze_count() <= before
    assert thresholds[-1][0] > youngest and thresholds[-1][1:] == tuple(older)
    assert gc.get_threshold() == (youngest, *older)
