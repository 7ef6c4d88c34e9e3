"""The board and the scrape config that docs/watching.md hands out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from trainer.config.run import PrometheusConfig
from trainer.measures.exposition import LIVE, families

BOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana" / "agent-rft.json").read_text())
PROMETHEUS = ROOT / "docs" / "grafana" / "prometheus.yml"
KNOWN = {family.name: {*family.labels, "job", "instance"} for family in (*families(), *LIVE.values())}
KNOWN["process_resident_memory_bytes"] = {"job", "instance"}


def queries() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]


def test_every_query_of_the_board_asks_for_a_metric_that_a_run_has_by_labels_that_it_has() -> None:
    assert len(queries()) > 40
    for query in [*queries(), *(v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query")]:
        selected = re.findall(r"([a-z_]+)(?:\{(.*?)\}|, )", query)
        assert selected, query
        for name, labels in selected:
            assert name in KNOWN, f"{name}: no run has it"
            assert {*re.findall(r"(\w+)[=!]", labels)} <= KNOWN[name], query
    counters = [query for query in queries() if "_total{" in query]
    assert counters and all(re.search(r"(rate|increase)\(", query) for query in counters)


def test_the_labels_that_the_board_writes_out_of_a_query_are_there() -> None:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            [name] = re.findall(r"\b((?:agent_rft|process)_\w+)\{", target["expr"])
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= KNOWN[name]


def test_no_panel_lies_on_another_and_none_has_anothers_number() -> None:
    places = set[tuple[int, int]]()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not places & mine, panel["title"]
        places |= mine
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "job", "instance"}


def test_the_scrape_config_asks_where_a_run_of_the_page_answers() -> None:
    [job] = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    [[target]] = [static["targets"] for static in job["static_configs"]]
    host, _, port = target.partition(":")
    assert PrometheusConfig(port=int(port)).host == host
    assert f"prometheus: {{port: {port}}}" in (ROOT / "docs" / "watching.md").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_scrape_config() -> None:
    done = subprocess.run(["promtool", "check", "config", str(PROMETHEUS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_every_metric_of_the_moment_with_its_labels() -> None:
    page = (ROOT / "docs" / "watching.md").read_text()
    for family in LIVE.values():
        by = f" by {', '.join(f'`{label}`' for label in family.labels)}" if family.labels else ""
        assert f"| `{family.name}`{by} | {family.help[0].lower()}{family.help[1:]} |" in page
