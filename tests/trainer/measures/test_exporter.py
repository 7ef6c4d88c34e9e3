"""What Prometheus is told of a run: scraped while a real run works, and read by Prometheus's own parser."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from envs.errors import UserError
from envs.types import StopReason, ToolErrorKind
from tests.support.configs import scripted_config
from tests.support.run_server import SMALL, Server, lines, write_config
from tests.support.servers import free_port
from tests.support.written_runs import make_rollout
from trainer.config import RunConfig
from trainer.config.load import validate_config
from trainer.measures.catalogue import CATALOGUE, COUNTS
from trainer.measures.exporter import check_port, exporting
from trainer.measures.exposition import LIVE, OWN, families, family_of
from trainer.measures.reference import OTHERS
from trainer.runs.folder import RunFolder
from trainer.types import Kind


def scraped(port: int, host: str = "127.0.0.1") -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=30) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def value(found: dict[str, Metric], name: str, /, **labels: str) -> float:
    [sample] = [s for s in found[name].samples if s.labels == labels and not s.name.endswith("_created")]
    return sample.value


def config_of(folder: Path, port: int, **sections: dict[str, object]) -> RunConfig:
    return validate_config(scripted_config(folder, folder, prometheus={"port": port}, **sections), source="the test's")


@contextlib.contextmanager
def exported(folder: Path) -> Iterator[tuple[RunFolder, int]]:
    port = free_port()
    run = RunFolder(folder, run_id="run-1", rank=0)
    with run.exported(config_of(folder, port), lambda: "rollouts"):
        yield run, port


def test_every_key_that_a_run_may_log_has_a_name_of_prometheus_with_a_help_and_no_two_are_one() -> None:
    keys = [f"train/{m.key}" for m in CATALOGUE if m.is_logged] + [f"eval/{c.key}" for c in COUNTS]
    for heading, rows in OTHERS.items():
        side = "train/" if heading.startswith("of the rollouts") else ""
        keys += [side + re.sub(r"[A-Z]{2,}", "some-name", key) for key, _ in rows]
    found = [family_of(key)[0] for key in keys]
    assert len({f.name for f in found}) == len(found) and OWN not in {f.name for f in found}
    assert {f.name for f in families()} == {f.name for f in found}
    assert not {f.name for f in found} & LIVE.keys()
    for family in (*found, *LIVE.values()):
        assert re.fullmatch(r"agent_rft_[a-z][a-z0-9_]*", family.name) and not family.help[0].islower()
        assert family.name in LIVE or not family.name.endswith("_total")
        assert not re.search(r"_(s|share|gib)$|__", family.name) or family.name.endswith("_gib")
    assert family_of("train/tool/search/latency_s")[0].name == "agent_rft_tool_latency_seconds"
    assert family_of("train/tool/search/latency_s")[1] == ("train", "search")
    assert family_of("time/rollouts_s") == (family_of("time/step_s")[0], ("rollouts",))
    assert family_of("brevity") == (family_of("train/verve")[0], ("brevity",)) and family_of("brevity")[0].name == OWN


def test_a_run_is_scraped_while_it_works_and_says_what_its_files_say(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    config = write_config(tmp_path / "run", tiny_model, 6, **SMALL, prometheus={"port": port})
    server.start(config)
    seen: list[dict[str, Metric]] = []
    end = time.monotonic() + 120
    while time.monotonic() < end and not (
        seen and "agent_rft_step" in seen[-1] and value(seen[-1], "agent_rft_step") >= 2
    ):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            seen.append(scraped(port))
    assert server.wait() == 0
    found = seen[-1]
    step = int(value(found, "agent_rft_step"))
    [row] = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if row["step"] == step and "train/reward" in row]
    assert value(found, "agent_rft_rollout_reward", rollouts="train") == pytest.approx(row["train/reward"])
    assert value(found, "agent_rft_time_seconds", lap="step") == pytest.approx(row["time/step_s"])
    assert value(found, "agent_rft_rollouts", rollouts="eval") == 1
    for key, logged in row.items():
        if key != "step":
            family, labels = family_of(key)
            assert value(found, family.name, **dict(zip(family.labels, labels, strict=True))) == pytest.approx(logged)
    assert value(found, "agent_rft_steps_planned") == 6
    assert value(found, "agent_rft_rollouts_done", rollouts="train") >= 4 * step
    calls = {s.labels["outcome"]: s.value for s in found["agent_rft_calls"].samples if s.labels["rollouts"] == "train"}
    assert calls["ok"] > 0 and set(calls) <= {"ok", "malformed", *ToolErrorKind}
    phases = {
        s.labels["phase"] for scrape in seen for f in scrape.values() if "phase_info" in f.name for s in f.samples
    }
    assert phases & {"rollouts", "training", "publishing"}
    for name in ("rollouts_asked", "rollouts_in_flight", "rollouts_waiting", "turns_in_flight", "policy_version"):
        assert value(found, f"agent_rft_{name}") >= 0
    assert "process_resident_memory_bytes" in found
    assert all(family.documentation for family in found.values())
    # The same command goes on, or is made longer, at another port.
    longer = write_config(tmp_path / "run", tiny_model, 7, **SMALL, prometheus={"port": free_port()})
    assert server.outcome(longer) == ""


def test_each_of_two_processes_answers_at_a_port_of_its_own_and_the_figures_of_the_run_are_the_firsts(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    config = write_config(tmp_path / "run", tiny_model, 5, **SMALL, prometheus={"port": port})
    server.start(config, processes=2)
    first: dict[str, Metric] = {}
    second: dict[str, Metric] = {}
    end = time.monotonic() + 200
    while time.monotonic() < end and not ("agent_rft_step" in first and "agent_rft_rollouts_done" in second):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            first, second = scraped(port), scraped(port + 1)
    assert server.wait() == 0
    assert value(first, "agent_rft_rollout_reward", rollouts="train") >= 0
    assert "agent_rft_step" not in second and "agent_rft_rollout_reward" not in second
    assert value(second, "agent_rft_rollouts_done", rollouts="train") > 0
    assert value(first, "agent_rft_policy_version") >= value(second, "agent_rft_policy_version") - 1


def test_counters_tell_the_models_errors_from_the_worlds_faults_and_no_label_is_a_task(tmp_path: Path) -> None:
    with exported(tmp_path) as (run, port):
        (tmp_path / "rollouts").mkdir()
        run.keep_rollout(Kind.TRAIN, 1, make_rollout("a", error=ToolErrorKind.TIMEOUT, malformed=True))
        run.keep_rollout(Kind.TRAIN, 1, make_rollout("b", reward=None, stop=StopReason.WORLD_FAULT))
        found = scraped(port)
        assert value(found, "agent_rft_calls", rollouts="train", outcome="timeout") == 1
        assert value(found, "agent_rft_calls", rollouts="train", outcome="malformed") == 1
        assert value(found, "agent_rft_faults", rollouts="train", kind="world") == 1
        assert value(found, "agent_rft_phase_info", phase="rollouts") == 1
        shown = json.dumps([[s.labels for s in family.samples] for family in found.values()])
        assert "task of" not in shown and '"a"' not in shown


def test_a_run_that_goes_on_tells_of_no_step_that_it_does_anew(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    killed = RunFolder(tmp_path, run_id="run-1", rank=0)
    for step in (1, 2, 3):
        killed.log({"step": step, "train/reward": 0.5})
    with exported(tmp_path) as (_, port):
        found = scraped(port)
    assert value(found, "agent_rft_step") == 2


def test_what_is_no_number_and_what_a_later_step_lacks_is_absent(tmp_path: Path) -> None:
    with exported(tmp_path) as (run, port):
        run.log({"step": 1, "train/reward": 0.5, "loss/entropy": 1.0, "train/tool/search/calls": 2.0})
        run.log({"step": 2, "train/reward": math.nan, "train/tool/cat/calls": 1.0, "loss/grad_norm": math.inf})
        found = scraped(port)
    assert value(found, "agent_rft_step") == 2
    assert not {"agent_rft_rollout_reward", "agent_rft_loss_entropy", "agent_rft_loss_grad_norm"} & found.keys()
    assert [s.labels["name"] for s in found["agent_rft_tool_calls"].samples] == ["cat"]


def test_names_that_a_user_chose_are_labels_and_bounded(tmp_path: Path) -> None:
    with exported(tmp_path) as (run, port):
        run.log({"step": 1, 'my "metric"\n\\': 3.0} | {f"train/tool/t{i}/calls": 1.0 for i in range(2000)})
        found = scraped(port)
    assert value(found, OWN, key='my "metric"\n\\') == 3.0
    assert len(found["agent_rft_tool_calls"].samples) == 500


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"prometheus\.port: 127\.0\.0\.1:{port} can't be listened at"):
            check_port(config_of(tmp_path, port))
        from trainer.train import train

        # The model's folder holds no model, which would be told next.
        with pytest.raises(UserError, match=r"prometheus\.port"):
            train(config_of(tmp_path / "run", port))
        assert not (tmp_path / "run").exists()
    check_port(config_of(tmp_path, port))


def test_each_process_of_a_machine_has_a_port_and_all_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = config_of(tmp_path, taken.getsockname()[1] - 1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(UserError, match="can't be listened at"):
            check_port(config)
        monkeypatch.setenv("LOCAL_RANK", "1")
        check_port(config)
        with (
            pytest.raises(UserError, match="can't be listened at"),
            exporting(config, run_id="r", records=[], phase=str),
        ):
            pass


def test_a_place_that_there_is_none_of_and_keys_that_are_wrong_are_told(tmp_path: Path) -> None:
    sections = {"prometheus": {"port": 9400, "host": "no.such.host.invalid"}}
    with pytest.raises(UserError, match=r"prometheus\.port: no\.such\.host\.invalid:9400"):
        check_port(validate_config(scripted_config(tmp_path, tmp_path, **sections), source="the test's"))
    for wrong in ({"port": 0}, {"port": 70000}, {"port": 9400, "hots": "x"}, {}):
        with pytest.raises(UserError, match="prometheus"):
            validate_config(scripted_config(tmp_path, tmp_path, prometheus=wrong), source="the test's")


def test_without_the_section_nothing_is_served(tmp_path: Path) -> None:
    config = validate_config(scripted_config(tmp_path, tmp_path), source="the test's")
    check_port(config)
    with exporting(config, run_id="r", records=[], phase=str) as exporter:
        assert exporter is None
