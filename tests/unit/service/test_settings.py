"""Settings: names, defaults, what is refused and how it is said."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest

from service.errors import DataError
from service.settings import (
    Settings,
    bundled_models,
    load_settings,
    service_links,
    unknown_variables,
)

KUBERNETES = {
    # What a pod gets for the services `retinaserve`, `retinaserve-grpc`, `retinaserve-admin`,
    # `retinaserve-gpu` and `retinaserve-host` of its namespace.
    "RETINASERVE_SERVICE_HOST": "10.43.0.17",
    "RETINASERVE_SERVICE_PORT": "8000",
    "RETINASERVE_SERVICE_PORT_HTTP": "8000",
    "RETINASERVE_PORT": "tcp://10.43.0.17:8000",
    "RETINASERVE_PORT_8000_TCP": "tcp://10.43.0.17:8000",
    "RETINASERVE_PORT_8000_TCP_PROTO": "tcp",
    "RETINASERVE_PORT_8000_TCP_PORT": "8000",
    "RETINASERVE_PORT_8000_TCP_ADDR": "10.43.0.17",
    "RETINASERVE_GRPC_SERVICE_HOST": "fd00::1",
    "RETINASERVE_GRPC_PORT": "udp://[fd00::1]:8001",
    "RETINASERVE_GRPC_PORT_8001_UDP": "udp://[fd00::1]:8001",
    "RETINASERVE_ADMIN_PORT": "sctp://10.43.0.19:8002",
    "RETINASERVE_ADMIN_PORT_8002_SCTP_ADDR": "10.43.0.19",
    "RETINASERVE_GPU_SERVICE_PORT": "8000",
    "RETINASERVE_GPU_PORT": "tcp://10.43.0.20:8000",
    "RETINASERVE_HOST_PORT": "tcp://10.43.0.21:8000",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"RETINASERVE_{name.upper()}", raising=False)


def test_settings_have_documented_defaults() -> None:
    settings = Settings()
    assert settings.models_dir == bundled_models()
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.max_body_bytes == 33_554_432
    assert settings.max_image_pixels == 50_000_000
    assert settings.max_queue_size >= settings.max_batch_images == 64


def test_options_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_PORT", "9000")
    monkeypatch.setenv("RETINASERVE_MODELS_DIR", "/models")
    monkeypatch.setenv("RETINASERVE_LOG_LEVEL", "WARNING")
    settings = load_settings(port=None, host="0.0.0.0")
    assert (settings.port, settings.host) == (9000, "0.0.0.0")
    assert settings.models_dir == Path("/models")
    assert settings.log_level == "warning"
    assert load_settings(port=1).port == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("DEVICE", "gpu"),
        ("DEVICE", "cuda:0,cpu"),
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_QUEUE_DELAY_MS", "-1"),
        ("LOG_FORMAT", "xml"),
        ("DRAIN_SECONDS", "soon"),
        ("DRAIN_SECONDS", "inf"),
        ("DRAIN_DELAY_SECONDS", "nan"),
        # As `docker run --env-file` passes on what is quoted in the file.
        ("PORT", '"8000"'),
        ("GRPC_PORT", '""'),
        ("MODELS_DIR", "'/models'"),
        ("API_KEYS_FILE", '""'),
        ("CORS_ORIGINS", '"*"'),
        # Not from Kubernetes, whose variables of this kind end in _PORT.
        ("RATE_LIMIT", "tcp://10.43.0.17:8000"),
    ],
)
def test_invalid_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"RETINASERVE_{name}", value)
    with pytest.raises(DataError, match=re.escape(f"RETINASERVE_{name}={value}: ")):
        load_settings()


def test_invalid_option_is_named_as_typed() -> None:
    with pytest.raises(DataError, match="--port=70000: "):
        load_settings(port=70000)


def test_empty_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_HOST", "192.0.2.1")
    for empty in ("", " "):
        with pytest.raises(DataError, match=r"^--host is empty; "):
            load_settings(host=empty)


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
@pytest.mark.parametrize("name", sorted(Settings.model_fields.keys() - {"api_keys_file"}))
def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, name: str, empty: str) -> None:
    default = load_settings()
    monkeypatch.setenv(f"RETINASERVE_{name.upper()}", empty)
    settings = load_settings()
    assert settings == default
    assert settings.model_fields_set == set()


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_keys_file_is_refused(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    monkeypatch.setenv("RETINASERVE_API_KEYS_FILE", empty)
    with pytest.raises(DataError, match=r"^RETINASERVE_API_KEYS_FILE= *: .*unset it"):
        load_settings()


def test_kubernetes_service_links_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    default = load_settings()
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert load_settings() == default
    assert unknown_variables(KUBERNETES) == []
    assert service_links(KUBERNETES) == [
        f"RETINASERVE_{each}PORT" for each in ("ADMIN_", "GRPC_", "")
    ]


def test_unknown_variables_are_reported() -> None:
    known = dict.fromkeys(("PATH", "RETINASERVE_PORT", "retinaserve_log_level"), "1")
    wrong = {
        "RETINASERVE_HTTP_PORT": "8000",
        "RETINASERVE_MAX_BODY_SIZE": "1",
        "RETINASERVE_RATE_LIMITS": "tcp://1",
    }
    assert unknown_variables(known) == service_links(known) == service_links(wrong) == []
    assert unknown_variables({**known, **KUBERNETES, **wrong}) == sorted(wrong)


def test_every_setting_is_described() -> None:
    (written,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(written, ast.ClassDef)
    described = {
        field.target.id
        for field, text in pairwise(written.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    }
    assert described == Settings.model_fields.keys()
