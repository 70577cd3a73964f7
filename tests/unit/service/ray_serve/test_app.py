"""The replica's side of Ray Serve, without Ray: tests/reliability/test_ray.py runs it there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from service.engine.service import Service
from service.errors import ArtifactError, DataError, LoadFailed, UnknownModel
from service.ray_serve.app import Replica, app, fit, open_app
from service.settings import Settings
from service.system.cpus import cpu_count
from tests import tiny_model
from tests.images import encoded, one_red


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    tiny_model.save(tmp_path)
    return tmp_path


@pytest.fixture
async def replica(repository: Path) -> AsyncIterator[Replica]:
    """One that runs, as `serve.ingress` makes it of the class."""
    made = Replica()
    made.app = open_app(Settings(models_dir=repository, device="cpu", cpu_inferences=1))
    async with made.app.router.lifespan_context(made.app):
        yield made


def service(replica: Replica) -> Service:
    found: Service = replica.app.state.service
    return found


async def version_of_an_answer(replica: Replica) -> int:
    transport = httpx.ASGITransport(app=replica.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/detect", content=encoded(one_red()))
    assert answer.status_code == 200, answer.text
    return int(answer.json()["model"]["version"])


@pytest.mark.parametrize(
    ("settings", "share", "fitted"),
    [
        ({}, {"CPU": 1.0}, {"cpus": 1, "device": "cpu"}),
        ({}, {"CPU": 3.0, "memory": 1e9}, {"cpus": 3, "device": "cpu"}),
        # Ray counts CPUs as it is told, and not as they are.
        ({}, {"CPU": 64.0}, {"cpus": 8, "device": "cpu"}),
        ({}, {}, {"cpus": 1, "device": "cpu"}),
        ({}, {"CPU": 4.0, "GPU": 0.25}, {"cpus": 4, "device": "cuda"}),
        ({"cpus": 2, "device": "cuda:0,cuda:1"}, {"CPU": 4.0, "GPU": 2.0}, {}),
    ],
)
def test_a_replica_keeps_to_its_share(
    settings: dict[str, object], share: dict[str, float], fitted: dict[str, object]
) -> None:
    assert fit(Settings(**settings), share, cpus=8) == fitted  # type: ignore[arg-type]


async def test_the_share_is_what_sessions_and_decoding_get(repository: Path) -> None:
    opened = open_app(Settings(models_dir=repository, device="cpu", cpus=1))
    found: Service = opened.state.service
    (device,) = found.hardware.devices
    assert device.threads == 1
    assert len(found.pipeline._decoders) == 2, "one is left while the other has a large image"
    found.registry.close()
    # Without the setting: all there are.
    other = open_app(Settings(models_dir=repository, device="cpu", cpu_inferences=1))
    assert len(other.state.service.pipeline._decoders) == cpu_count()
    other.state.service.registry.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_dir": "/models"}, r"model_dir: no such setting.*models_dir=/models"),
        ({"max_batch_size": "none"}, r"max-batch-size=none"),
        ({"admin_port": 8001}, "RETINASERVE_ADMIN_PORT: .* no such port; unset it"),
        ({"grpc_port": 8001}, "RETINASERVE_GRPC_PORT: .* no such port; unset it"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        app(arguments)


def test_a_replica_without_its_default_model_does_not_start(repository: Path) -> None:
    path = repository / "tiny/1/model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="ONNX"):
        open_app(Settings(models_dir=repository, device="cpu"))


async def test_it_is_healthy_until_the_device_is_lost(replica: Replica) -> None:
    await replica.check_health()
    service(replica).pipeline.fatal = "the device does not answer any more"
    with pytest.raises(RuntimeError, match="does not answer"):
        await replica.check_health()


async def test_models_change_in_place(replica: Replica, repository: Path) -> None:
    assert await version_of_an_answer(replica) == 1
    tiny_model.save(repository, version=2)
    await replica.reconfigure({"model": "tiny"})
    assert await version_of_an_answer(replica) == 2
    await replica.reconfigure({"model": "tiny", "version": 1})
    assert await version_of_an_answer(replica) == 1


@pytest.mark.parametrize(
    ("chosen", "kind", "words"),
    [
        ({"version": 2}, DataError, r"model: Field required.*write \{\"model\": NAME\}"),
        ({"model": "tiny", "versoin": 2}, DataError, "versoin"),
        ({"model": "cells"}, UnknownModel, "there is tiny"),
        ({"model": "tiny", "version": 3}, LoadFailed, "version 3 was not loaded"),
    ],
)
async def test_a_choice_that_is_wrong_changes_nothing(
    replica: Replica,
    repository: Path,
    chosen: dict[str, object],
    kind: type[Exception],
    words: str,
) -> None:
    tiny_model.save(repository, version=3).write_bytes(b"nothing")
    with pytest.raises(kind, match=words):
        await replica.reconfigure(chosen)
    assert await version_of_an_answer(replica) == 1
