"""When tracing is on, and what happens when it cannot be."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from service.observability.tracing import asked_for, open_tracing

ROOT = Path(__file__).resolve().parents[4]
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "cells"}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_tracing_follows_otel_variables(environment: dict[str, str], asked: bool) -> None:
    assert asked_for(environment) is asked


def test_tracing_without_sdk_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    assert open_tracing(ENDPOINT, version="1") is None
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "pip install 'retinaserve[otel]'" in line.getMessage()


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "use otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
    ],
)
def test_tracing_warns_about_unsupported_options(
    name: str, value: str, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_tracing({**ENDPOINT, name: value}, version="1") is None
    (line,) = caplog.records
    assert f"{name}={value}" in line.getMessage()
    assert remedy in line.getMessage()


def test_tracing_off_imports_no_sdk() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "import service.http.app; from service.observability.tracing import open_tracing\n"
        "assert open_tracing({}, version='1') is None\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.stderr, run.returncode) == ("", 0)
