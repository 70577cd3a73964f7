"""The service, with the variables of deploy/kubernetes, answers the probes as written there."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.images import encoded, one_red
from tests.kustomize import build, find
from tests.reliability.conftest import ROOT, Process, Serve, command, environment, until

FOLDER = ROOT / "deploy" / "kubernetes"
GOOD = encoded(one_red())
READINESS = "readinessProbe"
PROBES = ("startupProbe", "livenessProbe", READINESS)


def settings(container: dict[str, Any]) -> dict[str, str]:
    """A container's variables but the folder of models, which is mounted elsewhere here."""
    chosen = {
        entry["name"].removeprefix("RETINASERVE_").lower(): entry["value"]
        for entry in container["env"]
    }
    chosen.pop("models_dir", None)
    return chosen


def asked(process: Process, container: dict[str, Any]) -> dict[str, int]:
    with process.client() as client:
        return {
            probe: client.get(container[probe]["httpGet"]["path"]).status_code for probe in PROBES
        }


def turned_away(process: Process, container: dict[str, Any]) -> bool:
    return asked(process, container)[READINESS] == 503


@pytest.fixture
def mounted(quick_models: Path, tmp_path: Path) -> Path:
    """What KServe puts at /mnt/models: here a link, as it makes for claims and images of models."""
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "cells").symlink_to(quick_models / "tiny")
    mount = tmp_path / "mnt"
    mount.symlink_to(stored)
    return mount


def test_kserve_storage_without_a_name_is_refused(quick_models: Path, tmp_path: Path) -> None:
    (tmp_path / "1").symlink_to(quick_models / "tiny" / "1")
    run = subprocess.run(
        command("serve", "--port", "0", "--device", "cpu"),
        env=environment(models_dir=tmp_path), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert f"expected {tmp_path}/<name>/<version>/model.onnx" in run.stderr


def test_kubernetes_probes_and_drain(serve: Serve, quick_models: Path, mounted: Path) -> None:
    deployment = find(build(FOLDER / "overlays" / "cpu"), "Deployment")["spec"]["template"]["spec"]
    kserve = build(FOLDER / "kserve")
    predictor = find(kserve, "InferenceService")
    (container,) = deployment["containers"]
    (of_runtime,) = find(kserve, "ServingRuntime")["spec"]["containers"]
    graces = [
        deployment["terminationGracePeriodSeconds"],
        predictor["spec"]["predictor"]["terminationGracePeriodSeconds"],
    ]
    pairs = [
        (serve(quick_models, **settings(container)), container),
        (serve(mounted, **settings(of_runtime)), of_runtime),
    ]
    for process, each in pairs:
        assert asked(process, each) == dict.fromkeys(PROBES, 200)
    name = predictor["metadata"]["name"]
    with pairs[1][0].client() as client:
        # KServe's clients ask for the model by the service's name.
        assert client.get(f"/v2/models/{name}/ready").status_code == 200
    with pairs[0][0].client() as client:
        assert client.get("/metrics").status_code == 200

    signalled = time.monotonic()
    for process, _ in pairs:
        process.terminate()
    for process, each in pairs:
        until(partial(turned_away, process, each))
        assert asked(process, each) == {**dict.fromkeys(PROBES, 200), READINESS: 503}
        with process.client() as client:
            assert client.post("/v1/detect", content=GOOD).status_code == 200
    for (process, each), grace in zip(pairs, graces, strict=True):
        assert process.exit_code() == 0
        lasted = time.monotonic() - signalled
        assert float(settings(each)["drain_delay_seconds"]) <= lasted < grace
