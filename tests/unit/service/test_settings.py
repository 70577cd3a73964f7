"""Settings: names, defaults, what is refused and how it is said."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from pathlib import Path

import pytest

from service.errors import DataError
from service.settings import Settings, bundled_models, load_settings, unknown_variables


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
    ],
)
def test_invalid_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"RETINASERVE_{name}", value)
    with pytest.raises(DataError, match=f"RETINASERVE_{name}={value}: "):
        load_settings()


def test_invalid_option_is_named_as_typed() -> None:
    with pytest.raises(DataError, match="--port=70000: "):
        load_settings(port=70000)


def test_kubernetes_service_link_is_not_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_PORT", "tcp://10.43.0.17:8000")
    monkeypatch.setenv("RETINASERVE_SERVICE_HOST", "10.43.0.17")
    assert load_settings().port == 8000


def test_unknown_variables_are_reported() -> None:
    harmless = [
        "PATH",
        "RETINASERVE_PORT",
        "retinaserve_log_level",
        "RETINASERVE_SERVICE_HOST",
        "RETINASERVE_SERVICE_PORT_HTTP",
        "RETINASERVE_PORT_8000_TCP_ADDR",
        "RETINASERVE_GPU_SERVICE_PORT",
    ]
    assert unknown_variables(harmless) == []
    wrong = ["RETINASERVE_MAX_BODY_SIZE", "RETINASERVE_RATE_LIMITS"]
    assert unknown_variables([*harmless, *wrong]) == wrong


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
