"""Several processes train what one would, in as many parts as one likes; a killed run goes on."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from model_export.training.distributed import ProcessLost, World, launch, world
from model_export.training.hardware import accelerator_for
from service.cli import retinaserve
from service.errors import DataError, DeviceError
from tests.conftest import ROOT
from tests.unit.model_export import distributed_runs as runs
from tests.unit.model_export import rectangles

SCRIPT = [sys.executable, "-m", "tests.unit.model_export.distributed_runs"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes of their own find; no measuring of coverage, for they mostly import torch."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles.draw_data(tmp_path_factory.mktemp("distributed") / "rectangles")


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, each batch in one part."""
    output = tmp_path_factory.mktemp("one") / "run"
    runs.run(data, output)
    return output


def curve(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


def saved(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "last.ckpt", weights_only=True)
    return content


def check_same_run(run: Path, other: Path) -> None:
    """The same to what float32 leaves of another order of summation."""
    for row, wanted in zip(curve(run), curve(other), strict=True):
        for name, value in wanted.items():
            assert float(row[name] or -1) == pytest.approx(float(value or -1), rel=1e-4, abs=1e-5)
    state, wanted_state = saved(run)["state_dict"], saved(other)["state_dict"]
    assert state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- equality ------------------------------------------------------------------------------------


def test_parts_of_a_batch_make_the_step_of_the_whole(one: Path, data: Path, tmp_path: Path) -> None:
    runs.run(data, tmp_path, accumulate=3)
    check_same_run(tmp_path, one)
    learned = saved(one)["state_dict"]["network.regression_head.out.weight"]
    began = runs.start(("red", "green")).weights["regression_head.out.weight"]
    assert (learned - began).abs().max() > 1e-3


def test_two_processes_equal_one(one: Path, data: Path, tmp_path: Path) -> None:
    launch(2, [*SCRIPT, "two", str(data), str(tmp_path)])
    check_same_run(tmp_path / "two", one)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"metrics.csv", "curves.png", "last.ckpt", "best.ckpt"}


@pytest.mark.slow
def test_killed_process_ends_both_and_one_process_resumes(
    one: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProcessLost, match="process 1 of 2 was ended by SIGKILL"):
        launch(2, [*SCRIPT, "two-killed", str(data), str(tmp_path)])
    assert [row["epoch"] for row in curve(tmp_path / "two-killed")] == ["1"]
    runs.run(data, tmp_path / "two-killed", resume=True)
    check_same_run(tmp_path / "two-killed", one)


@pytest.mark.slow
def test_two_machines_equal_one(one: Path, data: Path, tmp_path: Path) -> None:
    # As docs say to start it: an agent on each machine, which find each other at one address.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"),
        *("--no-python", *SCRIPT, "machines", str(data), str(tmp_path)),
    ]
    with ExitStack() as ends:
        agents = []
        for _ in range(2):
            started = subprocess.Popen(
                agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            ends.callback(started.kill)
            agents.append(started)
        told = [each.communicate(timeout=240)[0] for each in agents]
    assert [each.returncode for each in agents] == [0, 0], "\n".join(told)
    places = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("place-*.json"))]
    assert places == [{"rank": rank, "size": 2, "nodes": 2} for rank in range(2)]
    check_same_run(tmp_path / "machines", one)


@pytest.mark.slow
def test_a_run_after_kill_9_has_the_same_loss_curve(one: Path, data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*SCRIPT, "killed", str(data), str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    run = tmp_path / "killed"
    assert [row["epoch"] for row in curve(run)] == ["1"]
    runs.run(data, run, resume=True)
    assert curve(run) == curve(one)
    resumed, whole = saved(run), saved(one)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name
    momenta = whole["optimizer_states"][0]["state"]
    assert momenta
    for key, state in momenta.items():
        momentum = resumed["optimizer_states"][0]["state"][key]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])


# --- places and devices --------------------------------------------------------------------------


def test_alone_where_torchrun_is_not() -> None:
    assert world() == World(rank=0, size=1, local_size=1)
    assert world().is_first
    assert world().nodes == 1


@pytest.fixture
def third_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun tells it on the second of two machines."""
    place = {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "a"}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("third_of_four")
def test_a_place_among_many() -> None:
    assert world() == World(rank=2, size=4, local_size=2)
    assert not world().is_first
    assert world().nodes == 2


@pytest.mark.usefixtures("third_of_four")
def test_a_batch_smaller_than_the_processes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size 3 cannot be shared by 4 processes"):
        runs.run(data, tmp_path / "run", batch_size=3)


@pytest.mark.usefixtures("third_of_four")
def test_more_processes_than_torchrun_has_started(data: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(data), "--output", str(tmp_path / "run"), "--devices", "3"]
    result = CliRunner().invoke(retinaserve, arguments)
    assert result.exit_code == 2
    assert "torchrun has started 2 processes on this machine" in result.stderr


@pytest.mark.parametrize(
    ("device", "count", "words"),
    [
        ("cuda:0", 2, "cuda:0 is one GPU, but 2 processes want one each"),
        ("cuda", 99, "--device cuda for 99 processes: this torch sees"),
    ],
)
def test_too_few_devices(device: str, count: int, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        accelerator_for(device, count)


# --- ends ----------------------------------------------------------------------------------------


def test_the_first_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = "import os, sys, time; time.sleep(60 * (os.environ['RANK'] == '0')); sys.exit(3)"
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        launch(2, [sys.executable, "-c", script])
    assert ended.value.code == 3
    assert time.monotonic() - started < 30
