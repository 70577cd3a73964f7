"""`retinaserve serve` up to the moment when it would serve."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.commands import serve
from service.engine import process
from service.errors import DataError
from service.http import hosting
from service.http.auth.keys import new_key
from service.http.listening import AddressError
from service.http.server import Server
from tests import tiny_model

Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    """Run the command without serving and return its warnings."""
    monkeypatch.setattr(process, "configure_logging", lambda *_: None)
    monkeypatch.setattr(serve, "leave", lambda _: None)
    monkeypatch.setattr(Server, "run", lambda self, sockets: None)
    # Where the data sets of other tests lie, and no setting.
    monkeypatch.delenv("RETINASERVE_TEST_DATA", raising=False)
    tiny_model.save(tmp_path / "models")

    def begin(**given: object) -> list[str]:
        chosen = {"models_dir": tmp_path / "models", "device": "cpu", "port": 0, **given}
        with caplog.at_level(logging.WARNING):
            serve.run(given=chosen, root_path="", certificate=None, key=None)
        return [record.getMessage() for record in caplog.records]

    return begin


def test_serve_admin_port_requires_keys(run: Run) -> None:
    with pytest.raises(DataError, match=r"RETINASERVE_API_KEYS_FILE.*keys new NAME --admin"):
        run(admin_port=0)


def test_serve_reports_busy_admin_port_before_loading(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "open_models", lambda _: pytest.fail("too late"))
    keys = tmp_path / "keys.json"
    new_key(keys, "operator", admin=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port}.*RETINASERVE_ADMIN_PORT"):
            run(admin_port=port, api_keys_file=keys)


def test_serve_warns_without_an_admin_key(run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    new_key(keys, "camera", admin=False)
    (warning,) = run(admin_port=0, api_keys_file=keys)
    assert "models cannot be changed" in warning
    assert "--admin" in warning


def test_serve_warns_when_open_to_the_network(run: Run) -> None:
    (warning,) = run(host="0.0.0.0")
    assert "any client that reaches 0.0.0.0" in warning
    assert "RETINASERVE_API_KEYS_FILE" in warning


def test_serve_does_not_warn_with_keys_or_on_loopback(run: Run, tmp_path: Path) -> None:
    assert run() == [], "loopback"
    keys = tmp_path / "keys.json"
    new_key(keys, "operator", admin=True)
    assert run(host="0.0.0.0", api_keys_file=keys, admin_port=0) == []


@pytest.mark.parametrize(("owner", "name"), [(hosting, "open_server"), (Server, "run")])
def test_serve_failure_leaves_no_native_thread(
    run: Run, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    before = set(threading.enumerate())
    loaders: list[threading.Thread] = []

    def fail(*_: object, **__: object) -> None:
        begun = set(threading.enumerate()) - before
        loaders.extend(each for each in begun if each.name == "model-loader")
        raise DataError("no certificate")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(DataError, match="no certificate"):
        run()
    (loader,) = loaders
    assert not loader.is_alive(), "models loaded while the rest was imported, and no longer"
