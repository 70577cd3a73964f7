"""The service on a real Ray cluster of two nodes, which lose a replica, and then one of them.

Every node is `ray start`, every deployment `serve deploy` of deploy/ray/serve.yaml with changes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.imaging.canvas import Size
from service.ray_serve.app import open_app
from service.settings import Settings, bundled_models
from tests import tiny_model
from tests.images import encoded, one_red
from tests.ray_cluster import ROOT, Cluster, Load, Replica, Seen, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed; `make test-scale` installs it and runs this",
    ),
]

RECOVERY_SECONDS = 120.0
"""Until what was killed is replaced; it takes about ten, and many times that on a busy machine."""
LEAST_PASSED = 330
"""Tests of tests/api that need nothing but an address."""
HEAD, OTHER = "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; either has room for another replica, the first one for both."""
    with Cluster((2, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def images(bccd: Path) -> list[bytes]:
    paths = sorted((bccd / "JPEGImages").glob("*.jpg"))[:6]
    return [path.read_bytes() for path in paths]


@pytest.fixture(scope="module")
def expected(images: list[bytes]) -> list[list[dict[str, Any]]]:
    """What the same application answers in this process."""
    app = open_app(Settings(device="cpu", cpus=1))

    async def ask() -> list[list[dict[str, Any]]]:
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            answers = [await client.post("/v1/detect", content=each) for each in images]
        return [answer.json()["detections"] for answer in answers]

    found = asyncio.run(ask())
    assert all(len(each) > 3 for each in found)
    return found


def deploy(cluster: Cluster, *, replicas: int, deployment: object = None, **settings: Any) -> None:
    """`deployment` is what differs in the deployment's own part of the file."""

    def change(config: dict[str, Any]) -> None:
        (application,) = config["applications"]
        application["args"] |= {"cpu_inferences": 1, "log_format": "text", **settings}
        (part,) = application["deployments"]
        del part["autoscaling_config"]
        part |= {"num_replicas": replicas, **(deployment or {})}  # type: ignore[dict-item]

    cluster.deploy(change)


def check_answers(seen: Sequence[Seen], expected: list[list[dict[str, Any]]]) -> None:
    """No wrong answer; a failure is one that the documentation knows, and says when to return."""
    for each in seen:
        assert each.status in (200, 503), each
        if each.status == 503:
            assert int(each.retry_after or 0) >= 1
            assert each.body["status"] == 503
            continue
        found, wanted = each.body["detections"], expected[each.image]
        assert [one["label"] for one in found] == [one["label"] for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-3)
            assert one["box"] == pytest.approx(other["box"], abs=0.5)


def kill(replica: Replica) -> None:
    os.kill(replica.pid, signal.SIGKILL)


def test_serve_run_works_as_documented(cluster: Cluster, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    wrong = cluster.run("service.ray_app:app", f"model_dir={tmp_path}")
    assert wrong.returncode != 0
    assert "model_dir: no such setting" in wrong.stdout + wrong.stderr
    done = cluster.run("service.ray_app:app", f"models_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    cluster.wait_for_replicas(1)
    answer = httpx.post(f"{cluster.url}/v1/detect", content=encoded(one_red()), timeout=60.0)
    assert answer.json()["model"] == {"name": "tiny", "version": 1}


def test_api_suite_passes_on_ray(cluster: Cluster, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    deploy(cluster, replicas=1, models_dir=str(tmp_path), device="cpu")
    cluster.wait_for_replicas(1)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/api", "-q", "-p", "no:cacheprovider", "-n", "0"],
        env={**os.environ, "RETINASERVE_TEST_URL": cluster.url},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= LEAST_PASSED
    # The tests of large uploads look inside the application.
    answer = httpx.post(f"{cluster.url}/v1/detect", content=bytes(34 << 20), timeout=60.0)
    assert answer.status_code == 413


def test_ray_model_update_loses_no_request(
    cluster: Cluster,
    tmp_path: Path,
    images: list[bytes],
    expected: list[list[dict[str, Any]]],
) -> None:
    shutil.copytree(bundled_models(), tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "blood-cells/1", tmp_path / "blood-cells/2")
    deploy(cluster, replicas=2)
    before = cluster.wait_for_replicas(2)
    with Load(cluster.url, images) as load:
        load.wait_for_answers(4)
        deploy(cluster, replicas=2, models_dir=str(tmp_path))
        after = cluster.wait_for_replicas(2, other_than=before)
        updated = len(load.seen)
        load.wait_for_answers(12)

        # The same replicas, another version.
        chosen = {"user_config": {"model": "blood-cells", "version": 1}}
        deploy(cluster, replicas=2, deployment=chosen, models_dir=str(tmp_path))
        wait_for(lambda: versions(load.seen[-12:]) == {1}, "version 1")
        assert cluster.wait_for_replicas(2) == after
    assert {each.status for each in load.seen} == {200}
    check_answers(load.seen, expected)
    assert versions(load.seen[:4]) == {1}
    # Requests that were under way when the last replica was replaced aside.
    assert versions(load.seen[updated + 4 : updated + 12]) == {2}


def versions(seen: Sequence[Seen]) -> set[int]:
    return {each.body["model"]["version"] for each in seen}


def test_ray_replaces_replica_with_lost_device(cluster: Cluster, tmp_path: Path) -> None:
    # One inference takes longer than the watchdog has patience.
    tiny_model.save(tmp_path, work=400, sizes=(Size(96, 128),))
    deploy(cluster, replicas=1, models_dir=str(tmp_path), watchdog_seconds=0.1)
    (before,) = cluster.wait_for_replicas(1)
    content = encoded(one_red())
    answer = httpx.post(f"{cluster.url}/v1/detect", content=content, timeout=60.0)
    assert answer.status_code == 503
    assert "has been on the device for" in answer.json()["detail"]
    cluster.wait_for_replicas(1, other_than=[before], seconds=RECOVERY_SECONDS)
    assert httpx.get(f"{cluster.url}/readyz", timeout=60.0).status_code == 200


def test_ray_backpressure_is_503_with_retry_after(
    cluster: Cluster, images: list[bytes], expected: list[list[dict[str, Any]]]
) -> None:
    room = {"max_ongoing_requests": 1, "max_queued_requests": 2}
    deploy(cluster, replicas=1, deployment=room)
    cluster.wait_for_replicas(1)
    with Load(cluster.url, images, clients=12) as load:
        load.wait_for_answers(12)
    check_answers(load.seen, expected)
    details = Counter(each.body["detail"] for each in load.seen if each.status == 503)
    assert details.keys() == {"no replica takes requests just now; try again in a moment"}


def test_ray_recovers_from_lost_replica_and_node(
    cluster: Cluster, images: list[bytes], expected: list[list[dict[str, Any]]]
) -> None:
    deploy(cluster, replicas=2)
    first = cluster.wait_for_replicas(2)
    assert {each.address for each in first} == {HEAD, OTHER}
    with Load(cluster.url, images, clients=6) as load:
        load.wait_for_answers(6)
        victim = next(each for each in first if each.address == HEAD)
        kill(victim)
        second = cluster.wait_for_replicas(2, other_than=[victim], seconds=RECOVERY_SECONDS)
        load.wait_for_answers(12)

        gone = [each for each in second if each.address == OTHER]
        assert gone, "the node that dies has a replica"
        cluster.kill_node(1)
        third = cluster.wait_for_replicas(2, other_than=gone, seconds=RECOVERY_SECONDS)
        assert {each.address for each in third} == {HEAD}
        recovered = len(load.seen)
        load.wait_for_answers(12)
        end = len(load.seen)
    check_answers(load.seen, expected)
    lost = [each for each in load.seen if each.status == 503]
    # At most what either had under way.
    assert len(lost) <= 12
    assert all(each.status == 200 for each in load.seen[recovered + 6 : end])
    print(Counter(each.status for each in load.seen), [each.body["detail"] for each in lost])
