"""What `serve` says when it starts, and when it cannot."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_model
from tests.images import encoded, one_red
from tests.reliability.conftest import Serve, command, environment


def refused(*arguments: object, **settings: object) -> tuple[int, str]:
    done = subprocess.run(
        command("serve", *arguments),
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


def test_start_prints_one_line_with_the_url(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, cpu_inferences=None)
    assert process.url == f"http://localhost:{process.port}"
    with process.client() as client:
        answer = client.post("/v1/detect", content=encoded(one_red()))
        assert answer.status_code == 200
    process.terminate()
    assert process.exit_code() == 0
    assert process.popen.stdout is not None
    assert process.popen.stdout.read() == "", "one line, and that was it"


def test_start_reports_busy_port(quick_models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = refused("--models", quick_models, "--device", "cpu", "--port", port)
    assert code == 1
    assert text.count("\n") == 0
    assert f"port {port}" in text
    assert "in use" in text


def test_start_rejects_empty_repository(tmp_path: Path) -> None:
    code, text = refused("--models", tmp_path, "--device", "cpu", "--port", 0)
    assert code == 2
    assert text.count("\n") == 0
    assert f"{tmp_path}/<name>/<version>/model.onnx" in text


def test_start_rejects_invalid_setting(quick_models: Path) -> None:
    code, text = refused("--models", quick_models, max_queue_size="many")
    assert code == 2
    assert "RETINASERVE_MAX_QUEUE_SIZE=many" in text
    code, text = refused("--models", quick_models, "--device", "tpu")
    assert code == 2
    assert "--device=tpu" in text


def test_start_ignores_what_orchestrators_set(serve: Serve, quick_models: Path) -> None:
    links = ("port", "grpc_port", "admin_port")
    process = serve(
        quick_models,
        **dict.fromkeys(links, "tcp://10.43.0.17:8000"),
        service_host="10.43.0.17",
        port_8000_tcp_proto="tcp",
        gpu_port="udp://10.43.0.18:8000",
        admin_host="",
        rate_limit="",
        max_queue_size=" ",
    )
    (line,) = [each for each in process.log.read_text().splitlines() if "RETINASERVE_" in each]
    assert all(f"RETINASERVE_{name.upper()}" in line for name in links)
    assert "enableServiceLinks: false" in line


def test_health_check_of_the_image_finds_the_port(serve: Serve, quick_models: Path) -> None:
    text = (Path(__file__).parents[2] / "Dockerfile").read_text().replace("\\\n", "")
    (written,) = re.findall(r"HEALTHCHECK .* CMD (\[.*\])", text)
    _, *arguments = json.loads(written)

    def check(port: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment(port=port),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    port = serve(quick_models).port
    assert [check(each).returncode for each in (port, f" {port}")] == [0, 0]
    # What the service takes for unset means its default port, where nothing listens here, or may.
    for unset in ("", " ", "tcp://10.43.0.17:8000"):
        assert "ValueError" not in check(unset).stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ((), {"api_keys_file": ""}, "RETINASERVE_API_KEYS_FILE=: it is empty; name the file"),
        (("--host", ""), {}, "--host is empty"),
        (("--port", ""), {}, "'--port': '' is not a valid integer"),
        (("--device", ""), {}, "--device is empty"),
        (("--models", ""), {}, "'--models': it is empty"),
        ((), {"font_file": __file__}, f"RETINASERVE_FONT_FILE={__file__}: unknown file format"),
        ((), {"font_file": "/none.ttf"}, "RETINASERVE_FONT_FILE=/none.ttf: No such file"),
    ],
)
def test_start_rejects_empty_values_and_bad_fonts(
    quick_models: Path, arguments: tuple[str, ...], settings: dict[str, str], said: str
) -> None:
    code, text = refused("--models", quick_models, "--port", 0, *arguments, **settings)
    assert code == 2
    assert said in text.splitlines()[-1]


def test_start_survives_a_broken_model(serve: Serve, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "m")
    tiny_model.save(tmp_path / "m", version=2).write_bytes(b"no model")
    process = serve(tmp_path / "m")
    with process.client() as client:
        (model,) = client.get("/v1/models").json()["models"]
        assert [version["state"] for version in model["versions"]] == ["ready", "failed"]


def test_root_path_is_announced_in_openapi(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, arguments=("--root-path", "/cells"))
    with process.client() as client:
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/cells"}]
        assert client.get("/healthz").status_code == 200


def test_start_rejects_key_without_certificate(quick_models: Path) -> None:
    code, text = refused("--models", quick_models, "--ssl-keyfile", __file__)
    assert code == 2
    assert "--ssl-certfile" in text


def test_start_rejects_invalid_certificate(quick_models: Path) -> None:
    code, text = refused("--models", quick_models, "--port", 0, "--ssl-certfile", __file__)
    assert code == 2
    assert f"--ssl-certfile {__file__}" in text
    assert text.count("\n") == 0, "it is told before anything is loaded"


def test_start_rejects_invalid_keys_file(quick_models: Path) -> None:
    code, text = refused("--models", quick_models, "--port", 0, api_keys_file=__file__)
    assert code == 2
    assert __file__ in text
    assert text.count("\n") == 0, "it is told before anything is loaded"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_log_is_written_to_stderr(serve: Serve, quick_models: Path, log_format: str) -> None:
    process = serve(quick_models, log_format=log_format)
    with process.client() as client:
        client.post("/v1/detect", content=b"", headers={"X-Request-Id": "job-5"})
    process.terminate()
    assert process.exit_code() == 0
    (line,) = [line for line in process.log.read_text().splitlines() if "job-5" in line]
    assert line.startswith("{") == (log_format == "json")
