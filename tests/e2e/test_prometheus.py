"""A real Prometheus with deploy/prometheus scrapes a real service and answers the dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import typing
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.engine.models.versions import State
from tests.e2e.browser import ROOT, answers, free_port, server, until
from tests.images import encoded, one_red

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
IMAGES = 5
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}
"""What Grafana puts in."""

NOT_YET = "offset 7d"
"""Asks for last week."""

NEED_NOT_COME_UP = {"status", "alertname", "alertstate"}
"""Labels whose values a service that does well does not show."""

TARGET = {"job", "instance"}
"""Labels that Prometheus itself gives."""

Ask = Callable[..., Any]


def program(name: str) -> str:
    """Where one of Prometheus' programs is. Skips where it is not, fails there in CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"no {name} (Debian: prometheus)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return path


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    path = DEPLOY / "grafana" / "dashboards" / "retinaserve.json"
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def selectors(query: str) -> list[tuple[str, dict[str, str]]]:
    """Metric names in a query, each with what is asked of its labels."""
    found = re.findall(r"\b((?:retinaserve|process)_\w+|up|ALERTS)\b(?:\{([^}]*)\})?", query)
    return [(name, dict(re.findall(r'(\w+)[=!~]+"([^"]*)"', text))) for name, text in found]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Ask]:
    """Ask a Prometheus that has scraped a service with some requests behind it."""
    binary = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    with server(models_dir=tiny, cpu_inferences=1) as service:
        config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
        (job,) = config["scrape_configs"]
        # No name server here: the same job, its target by address.
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [urllib.parse.urlsplit(service).netloc]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = f"http://127.0.0.1:{free_port()}"
        log = (folder / "log").open("w")
        process = subprocess.Popen(
            [
                binary, f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn",
                f"--web.listen-address={url.removeprefix('http://')}",
            ],
            stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip

        def ask(path: str, **parameters: str) -> Any:
            address = f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
            with urllib.request.urlopen(address, timeout=10) as response:
                answer = json.load(response)
            assert answer["status"] == "success", answer
            return answer["data"]

        def value(query: str) -> float:
            result = ask("query", query=query)["result"]
            return float(result[0]["value"][1]) if result else 0.0

        try:
            until(lambda: answers(f"{url}/-/ready") or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            # The first scrape is of counters at zero.
            until(lambda: value("up") == 1)
            make_requests(service)
            answered = 'sum(retinaserve_pictures_total{outcome="answered"})'
            until(lambda: value(answered) == IMAGES)
            # A rate needs two samples of a series that may be new.
            until(lambda: value("min(count_over_time(retinaserve_refusals_total[1m]))") >= 2)
            until(lambda: all(rule["health"] == "ok" for rule in rules(ask)))
            yield ask
        finally:
            process.terminate()
            process.wait(20)
            log.close()


def make_requests(url: str) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    for _ in range(IMAGES):
        request = urllib.request.Request(f"{url}v1/detect", encoded(one_red()), headers)
        urllib.request.urlopen(request, timeout=60).close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}v1/detect", b"no image", headers))
    refused.value.close()
    # Routes that queries leave out.
    for path in ("healthz", "v2/health/live"):
        assert answers(url + path)


def rules(ask: Ask) -> list[dict[str, Any]]:
    return [rule for group in ask("rules")["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_accepts_the_rules(arguments: tuple[str, ...]) -> None:
    run = subprocess.run(
        [program("promtool"), *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_scrapes_the_service_without_alerts(prometheus: Ask) -> None:
    (target,) = prometheus("targets")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "retinaserve")
    assert [rule["name"] for rule in rules(prometheus)] == [rule["alert"] for rule in alerts()]
    assert {rule["state"] for rule in rules(prometheus)} == {"inactive"}
    assert {rule.get("lastError", "") for rule in rules(prometheus)} == {""}


def queries() -> list[tuple[str, str]]:
    """Every query, with where it is written."""
    asked = [
        (panel["title"], filled(target["expr"]))
        for panel in panels()
        for target in panel["targets"]
    ]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "retinaserve.json").read_text())
    asked += [(each["name"], each["expr"]) for each in dashboard["annotations"]["list"]]
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (adapter,) = re.findall(r"^    metricsQuery: '(.*)'$", page, re.MULTILINE)
    (series,) = re.findall(r"^  - seriesQuery: '(\w+)\{", page, re.MULTILINE)
    # As the adapter fills it in, with a label that there is here.
    for name, text in (("Series", series), ("LabelMatchers", 'instance!=""'), ("GroupBy", "job")):
        adapter = adapter.replace(f"<<.{name}>>", text)
    asked.append(("adapter", adapter))
    return asked + [(rule["alert"], rule["expr"]) for rule in alerts()]


def test_queries_use_exported_metrics_and_labels(prometheus: Ask) -> None:
    exported = set(prometheus("label/__name__/values"))
    known: dict[str, set[str]] = {"ALERTS": {"alertname", "alertstate"}}
    for where, query in queries():
        prometheus("query", query=query)
        names = selectors(query)
        assert names, where
        for name, matchers in names:
            if name not in known:
                assert name in exported, f"{where}: no metric {name}"
                series = prometheus("series", **{"match[]": name})
                known[name] = {label for each in series for label in each}
            assert matchers.keys() <= known[name], f"{where}: {name} has {known[name]}"
        # What is grouped and joined by are labels, too.
        groups = re.findall(r"\b(?:by|on|ignoring|group_left) ?\(([^)]*)\)", query)
        labels = {label.strip() for group in groups for label in group.split(",")} - {""}
        assert labels <= TARGET.union(*(known[name] for name, _ in names)), f"{where}: {labels}"


def test_queries_use_possible_label_values(prometheus: Ask) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    asked = {
        (where, label, word)
        for where, query in queries()
        for _, labels in selectors(query)
        for label, text in labels.items()
        if label not in NEED_NOT_COME_UP
        for word in text.split("|")
    }
    for where, label, word in sorted(asked):
        if label == "reason":
            assert f"`{word}`" in page, f"{where}: {word}"
        elif label == "state":
            assert word in typing.get_args(State), f"{where}: {word}"
        else:
            values = prometheus(f"label/{label}/values")
            hits = [value for value in values if re.fullmatch(word, value)]
            assert hits or not word, f"{where}: no {label} is {word}, there are {values}"


def test_dashboard_panels_have_data(prometheus: Ask) -> None:
    for panel in panels():
        for target in panel["targets"]:
            if NOT_YET in target["expr"]:
                continue
            result = prometheus("query", query=filled(target["expr"]))["result"]
            assert result, f"{panel['title']}: nothing for {target['expr']}"
            # Legends are made of labels that are there.
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(wanted <= each["metric"].keys() for each in result), panel["title"]


def test_dashboard_figures_match_the_requests(prometheus: Ask) -> None:
    (found,) = prometheus("query", query="sum by (label) (retinaserve_detections_total) > 0")[
        "result"
    ]
    assert found["metric"] == {"label": "red"}
    assert float(found["value"][1]) == IMAGES
    (bad,) = prometheus("query", query="retinaserve_refusals_total")["result"]
    assert (bad["metric"]["reason"], bad["value"][1]) == ("unsupported-media-type", "1")
