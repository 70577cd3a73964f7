"""docs/clients.md: every example runs as it stands there, and all of them see the same objects."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.settings import bundled_models
from tests.api.served import PATIENCE, Served, served

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SAMPLE = Path("service", "static", "sample.jpg")

Run = Callable[..., str]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


CURL = [line for block in blocks("console") for line in block.splitlines() if "curl " in line]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(bundled_models()) as running:
        yield running


@pytest.fixture
def run(server: Served, tmp_path: Path) -> Run:
    """Run a program of the page where the sample is, and against the server of this test."""
    (tmp_path / SAMPLE).parent.mkdir(parents=True)
    shutil.copy(ROOT / SAMPLE, tmp_path / SAMPLE)

    def start(*command: str) -> str:
        *options, program = command
        program = program.replace("localhost:8000", server.http)
        program = program.replace("localhost:8001", server.grpc)
        ended = subprocess.run(
            [*options, program], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return start


@pytest.fixture(scope="module")
def expected(server: Served) -> list[str]:
    with server.client() as client:
        answer = client.post("/v1/detect", content=(ROOT / SAMPLE).read_bytes()).json()
    assert answer["detections"]
    return [f"{each['label']} {each['score']:.2f}" for each in answer["detections"]]


def test_clients_page_has_an_example_per_language() -> None:
    assert (len(CURL), len(blocks("python")), len(blocks("javascript"))) == (7, 3, 1)


@pytest.mark.parametrize("line", CURL)
def test_curl_examples_print_detections(run: Run, line: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    command = line.removeprefix("$ ").replace("curl ", "curl --silent --show-error --fail ")
    answer = run("bash", "-c", command)
    assert answer.startswith("{") != ("-o boxes.png" in line)


@pytest.mark.parametrize("program", blocks("python"))
def test_python_examples_run(run: Run, expected: list[str], program: str) -> None:
    assert run(sys.executable, "-c", program).splitlines() == expected


@pytest.mark.parametrize("program", blocks("javascript"))
def test_javascript_examples_run(run: Run, expected: list[str], program: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not there")
    assert run("node", "--input-type=module", "--eval", program).splitlines() == expected
