"""The Compose profile `observe`: its files agree. What they ask is in tests/e2e."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "observability.md").read_text()


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read("docker-compose.yml")["services"]
    return found


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (DEPLOY / "grafana" / "dashboards" / "retinaserve.json").read_text()
    )
    return found


def alerts() -> list[dict[str, Any]]:
    groups = read("deploy/prometheus/alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_observe_containers_are_pinned_and_local(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["profiles"] == ["observe"]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for volume in service["volumes"]:
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir()
            assert rest.endswith(":ro")
        else:
            assert source in read("docker-compose.yml")["volumes"]


def test_prometheus_finds_the_service(services: dict[str, Any]) -> None:
    (job,) = read("deploy/prometheus/prometheus.yml")["scrape_configs"]
    (lookup,) = job["dns_sd_configs"]
    for name in ("cpu", "gpu"):
        assert lookup["names"] == services[name]["networks"]["default"]["aliases"]
        assert services[name]["ports"][0].endswith(f":{lookup['port']}")
    # The rules name the job.
    used = {job for rule in alerts() for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert used == {job["job_name"]}


def test_grafana_finds_prometheus_and_the_dashboard(
    services: dict[str, Any], dashboard: dict[str, Any]
) -> None:
    (source,) = read("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    host, port = re.fullmatch(r"http://([a-z]+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert services[host]["ports"][0].endswith(f":{port}")
    asked = {"type": source["type"], "uid": source["uid"]}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for holder in [*panels, *itertools.chain(*(panel["targets"] for panel in panels))]:
        assert holder["datasource"] == asked
    scrapes = read("deploy/prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrapes
    (provider,) = read("deploy/grafana/provisioning/dashboards/retinaserve.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/retinaserve.json"


def test_panels_lie_side_by_side_and_say_how_they_are_read(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert columns.stop <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert len(panel["description"]) > 40, panel["title"]
            assert panel["targets"], panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)


def test_alerts_say_what_to_do_and_are_described(dashboard: dict[str, Any]) -> None:
    titles = {panel["title"] for panel in dashboard["panels"]}
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        description = rule["annotations"]["description"]
        assert len(description) > 100
        assert set(re.findall(r'panel "([^"]+)"', description)) <= titles
    named = re.findall(r"^\| `(Retinaserve\w+)` \|", PAGE, re.MULTILINE)
    assert named == [rule["alert"] for rule in alerts()]


def test_every_alert_is_shown_to_fire_and_not_to() -> None:
    asked: dict[str, set[bool]] = {rule["alert"]: set() for rule in alerts()}
    for test in read("deploy/prometheus/alerts_test.yml")["tests"]:
        for case in test.get("promql_expr_test", ()):
            names = re.findall(r'alertname="(\w+)"', case["expr"]) or asked
            for name in names:
                asked[name].add(bool(case.get("exp_samples")))
        for case in test.get("alert_rule_test", ()):
            asked[case["alertname"]].add(bool(case.get("exp_alerts")))
    assert asked == {name: {True, False} for name in asked}
