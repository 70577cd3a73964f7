"""deploy/kubernetes: manifests that clusters accept, and that say of the service what is true."""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings, load_settings, unknown_variables
from tests.crd_schemas import SCHEMAS, pod_parts
from tests.kustomize import Manifest, build, find, in_order

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "kubernetes.md"
RELEASES = ("1.30", "1.37")
"""The oldest whose schemas know all that is used, and the newest that there are schemas of."""

COMPONENTS = {
    "cpu": (),
    "gpu": (),
    "cpu-pvc": ("models-pvc", "api-keys", "servicemonitor"),
    "gpu-image": ("models-image", "api-keys"),
}
"""What is built: an overlay, alone and with components."""

Build = Callable[[str], list[Manifest]]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with folders of a user's own beside deploy, as docs/kubernetes.md advises."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(FOLDER, root / "deploy" / "kubernetes")
    for name, components in COMPONENTS.items():
        file = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "vision",
            "resources": [f"../deploy/kubernetes/overlays/{name.partition('-')[0]}"],
            "components": [f"../deploy/kubernetes/components/{each}" for each in components],
            "images": [{"name": "retinaserve", "newName": "registry.example.org:5000/retinaserve"}],
        }
        (root / name).mkdir()
        (root / name / "kustomization.yaml").write_text(yaml.safe_dump(file))
    (root / "cells").mkdir()
    # As the page shows it, with the patch that it shows further down.
    (root / "cells" / "kustomization.yaml").write_text(
        blocks("kind: Kustomization")[0] + blocks("RETINASERVE_DEFAULT_MODEL")[0]
    )
    return root


@pytest.fixture(scope="module")
def built(mine: Path) -> Build:
    made = {name: build(mine / name) for name in COMPONENTS}
    return made.__getitem__


@pytest.fixture(scope="module")
def kserve() -> list[Manifest]:
    return build(FOLDER / "kserve")


def blocks(holding: str) -> list[str]:
    """The YAML of docs/kubernetes.md that holds some text."""
    found = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if holding in block]


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = find(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


def validate(manifest: Manifest) -> None:
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
    else:
        for release in RELEASES:
            kubernetes_validate.validate(manifest, release, strict=True)


def test_builder_output_equals_kustomize(mine: Path) -> None:
    program = next(filter(shutil.which, ("kustomize", "kubectl")), None)
    if program is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    verb = "build" if program == "kustomize" else "kustomize"
    for folder in (mine / "cpu-pvc", mine / "gpu-image", mine / "cells", FOLDER / "kserve"):
        run = subprocess.run([program, verb, folder], check=True, capture_output=True, text=True)
        real = {(each["kind"]): in_order(each) for each in yaml.safe_load_all(run.stdout)}
        assert {each["kind"]: in_order(each) for each in build(folder)} == real


@pytest.mark.parametrize("name", COMPONENTS)
def test_manifests_match_the_cluster_schemas(built: Build, name: str) -> None:
    kinds = [manifest["kind"] for manifest in built(name)]
    assert len(kinds) == 6 + (name == "cpu-pvc")
    for manifest in built(name):
        validate(manifest)
        inside = manifest["metadata"].get("namespace", "")
        assert inside == ("" if manifest["kind"] == "Namespace" else "vision")


@pytest.mark.parametrize("field", ["periodSecond", "httpGets"])
def test_schema_check_rejects_misspelt_field(built: Build, field: str) -> None:
    (container,) = pod(build(FOLDER / "overlays" / "cpu"))["containers"]
    container["livenessProbe"][field] = 1
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({**manifest, "spec": {"containers": [container]}})


def test_kserve_manifests_match_their_schemas(kserve: list[Manifest]) -> None:
    for manifest in kserve:
        validate(manifest)
    runtime, service = find(kserve, "ServingRuntime"), find(kserve, "InferenceService")
    validate(pod_parts(runtime, service))
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"]["name"] in [each["name"] for each in formats]
    (container,) = runtime["spec"]["containers"]
    # KServe knows its container by this name and mounts what is stored at this path.
    assert container["name"] == "kserve-container"
    assert variables(container)["RETINASERVE_MODELS_DIR"] == "/mnt/models"
    (port,) = container["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["containerPort"]
    assert runtime["spec"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    misspelt = copy.deepcopy(service)
    misspelt["spec"]["predictor"]["model"]["storageURI"] = model["storageUri"]
    with pytest.raises(jsonschema.ValidationError):
        validate(misspelt)


def containers(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Those that run the service."""
    if any(each["kind"] == "ServingRuntime" for each in manifests):
        found: list[dict[str, Any]] = find(manifests, "ServingRuntime")["spec"]["containers"]
    else:
        found = pod(manifests)["containers"]
    return found


@pytest.mark.parametrize("name", [*COMPONENTS, "kserve"])
def test_manifest_variables_are_valid_settings(
    built: Build, kserve: list[Manifest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = containers(kserve if name == "kserve" else built(name))
    chosen = variables(container)
    assert unknown_variables(chosen) == []
    for variable, value in chosen.items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    for variable, value in chosen.items():
        read = getattr(settings, variable.removeprefix("RETINASERVE_").lower())
        assert str(read) == value or float(read) == float(value)


@pytest.mark.parametrize("name", [*COMPONENTS, "kserve"])
def test_grace_period_outlasts_the_drain(built: Build, kserve: list[Manifest], name: str) -> None:
    manifests = kserve if name == "kserve" else built(name)
    (container,) = containers(manifests)
    chosen = variables(container)
    delay, drain = (float(chosen[f"RETINASERVE_DRAIN_{each}SECONDS"]) for each in ("DELAY_", ""))
    if name == "kserve":
        grace = find(manifests, "InferenceService")["spec"]["predictor"][
            "terminationGracePeriodSeconds"
        ]
    else:
        grace = pod(manifests)["terminationGracePeriodSeconds"]
    # uvicorn cuts off a second after the drain, and spans have two more to leave.
    assert grace >= delay + math.ceil(drain) + 1 + 2
    # Whoever asks for readiness has noticed before the listener closes.
    probe = container["readinessProbe"]
    assert delay > probe["periodSeconds"] * probe["failureThreshold"]
    assert drain == Settings.model_fields["drain_seconds"].default


@pytest.mark.parametrize("name", COMPONENTS)
def test_ports_and_selectors_meet(built: Build, name: str) -> None:
    manifests = built(name)
    deployment = find(manifests, "Deployment")["spec"]
    (container,) = pod(manifests)["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    (service_port,) = find(manifests, "Service")["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    (ingress,) = find(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert [each["port"] for each in ingress["ports"]] == [port["name"]]
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        find(manifests, "Service")["spec"]["selector"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        pod(manifests)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    target = find(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "retinaserve")
    assert "replicas" not in deployment, "to apply again would undo what the autoscaler did"


def test_service_monitor_selects_the_service(built: Build) -> None:
    manifests = built("cpu-pvc")
    monitor, service = find(manifests, "ServiceMonitor")["spec"], find(manifests, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]


def _is_restricted(container: dict[str, Any], of_pod: dict[str, Any]) -> None:
    """Pod Security Standards, level restricted, and a root that cannot be written."""
    own = container["securityContext"]
    assert {**of_pod, **own}["runAsNonRoot"] is True
    assert {**of_pod, **own}["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {**of_pod, **own}.get("runAsUser") != 0
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert "privileged" not in own
    assert all("hostPort" not in port for port in container.get("ports", ()))
    assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_pods_are_restricted(built: Build, name: str) -> None:
    spec = pod(built(name))
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        _is_restricted(container, spec["securityContext"])
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    allowed = {"persistentVolumeClaim", "emptyDir", "secret"}
    assert all(volume.keys() - {"name"} <= allowed for volume in spec.get("volumes", ()))
    labels = find(built(name), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert find(built(name), "NetworkPolicy")["spec"]["egress"] == []


def test_kserve_pods_are_restricted(kserve: list[Manifest]) -> None:
    predictor = find(kserve, "InferenceService")["spec"]["predictor"]
    for container in containers(kserve):
        _is_restricted(container, predictor["securityContext"])
    assert predictor["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", COMPONENTS)
def test_mounts_exist_and_are_read_by_the_service(built: Build, name: str) -> None:
    spec = pod(built(name))
    (container,) = spec["containers"]
    everyone = [*spec["containers"], *spec.get("initContainers", ())]
    mounts = {mount["name"] for each in everyone for mount in each.get("volumeMounts", ())}
    assert mounts == {volume["name"] for volume in spec.get("volumes", ())}
    places = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
    paths = [Path(value) for value in variables(container).values() if value.startswith("/")]
    for path in paths:
        assert any(path.is_relative_to(place) for place in places)
    assert len(places) == len(paths)
    assert all(mount["readOnly"] for mount in container.get("volumeMounts", ()))


def test_gpu_overlay_requests_a_gpu(built: Build) -> None:
    assert pod(built("gpu"))["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in pod(built("cpu"))["containers"][0]["resources"]["limits"]
    surge = find(built("gpu"), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert surge == {"maxSurge": 0, "maxUnavailable": 1}


def test_manifest_images_are_those_of_compose(built: Build) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name in ("cpu", "gpu"):
        (container,) = pod(build(FOLDER / "overlays" / name))["containers"]
        assert container["image"] == compose[name]["image"]
        (container,) = pod(built(name))["containers"]
        assert container["image"] == f"registry.example.org:5000/{compose[name]['image']}"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert compose["cpu"]["image"] == f"retinaserve:{version}-cpu"
    (container,) = containers(build(FOLDER / "kserve"))
    assert container["image"] == compose["cpu"]["image"]


@pytest.mark.parametrize("name", COMPONENTS)
def test_autoscaler_uses_an_exported_metric(built: Build, name: str) -> None:
    scaler = find(built(name), "HorizontalPodAutoscaler")["spec"]
    followed = [each["pods"]["metric"]["name"] for each in scaler["metrics"] if "pods" in each]
    assert followed == ["retinaserve_predicted_wait_seconds"]
    assert f"`{followed[0]}`" in (ROOT / "docs" / "observability.md").read_text()
    assert scaler["minReplicas"] == (1 if name.startswith("gpu") else 2)
    (rule,) = yaml.safe_load(blocks("seriesQuery")[0])["rules"]
    assert followed[0] in rule["seriesQuery"]


def test_kubernetes_page_shows_valid_manifests(mine: Path) -> None:
    manifests = build(mine / "cells")
    for manifest in manifests:
        validate(manifest)
    (claim,) = (yaml.safe_load(block) for block in blocks("kind: PersistentVolumeClaim"))
    validate(claim)
    (container,) = pod(manifests)["containers"]
    assert unknown_variables(variables(container)) == []
    assert variables(container)["RETINASERVE_DEFAULT_MODEL"] == "cells"
    (volume,) = pod(manifests)["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["namespace"] == find(manifests, "Namespace")["metadata"]["name"]


def test_kubernetes_page_names_existing_folders() -> None:
    named = set(re.findall(r"deploy/[\w./-]+\w", PAGE.read_text()))
    assert {"deploy/kubernetes/overlays/cpu", "deploy/kubernetes/kserve"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for path in FOLDER.glob("components/*"):
        assert path.name in PAGE.read_text()


def test_alert_rules_become_a_prometheus_rule() -> None:
    (line,) = re.findall(r"^\$ (\{ printf .* \}) \| kubectl ", PAGE.read_text(), re.MULTILINE)
    run = subprocess.run(["bash", "-c", line], cwd=ROOT, check=True, capture_output=True, text=True)
    made = yaml.safe_load(run.stdout)
    assert made["kind"] == "PrometheusRule"
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert made["spec"] == rules
