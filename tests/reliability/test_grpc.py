"""The gRPC server of a real process: its port, and its part of a graceful stop."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from service.errors import DataError
from service.http.oip.grpc_messages import check_installed
from service.imaging.canvas import Size
from tests import tiny_model
from tests.reliability.conftest import Serve, command, environment, until

PATIENCE = 60.0


def request() -> list[triton.InferInput]:
    images = np.zeros((1, 96, 128, 3), np.uint8)
    given = triton.InferInput("images", list(images.shape), "UINT8")
    return [given.set_data_from_numpy(images)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_grpc_busy_port_is_reported_before_loading(quick_models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("serve", "--models", quick_models, "--device", "cpu", "--port", 0),
            env=environment(grpc_port=port),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert f"port {port}" in last
    assert "RETINASERVE_GRPC_PORT" in last


def test_grpc_port_without_grpcio_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install 'retinaserve\[grpc\]'"):
        check_installed()


def test_grpc_drain_finishes_calls_in_flight(serve: Serve, tmp_path: Path) -> None:
    # Slow, but with one canvas to be warmed.
    tiny_model.save(tmp_path / "models", work=250, sizes=(Size(96, 128),))
    port = free_port()
    process = serve(
        tmp_path / "models", grpc_port=port, drain_seconds=60, request_timeout_ms=60_000
    )
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(PATIENCE)
    results: list[object] = []
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.async_infer("tiny", request(), lambda result, error: results.append(error or result))
        with process.client() as http:
            until(lambda: "retinaserve_pictures_held 1.0" in http.get("/metrics").text)
        process.terminate()
        until(lambda: bool(results))
    (result,) = results
    assert isinstance(result, triton.InferResult), result
    assert process.exit_code(PATIENCE) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
