"""What the definitions of others say of the fields that deploy/kubernetes uses, as JSON schemas.

No field that is not named here passes. Written from, names and types alone:

- KServe: pkg/apis/serving/v1alpha1/servingruntime_types.go and, below v1beta1, component.go,
  predictor.go and podspec.go (kserve/kserve, 2026). What they embed of Kubernetes' own pod is left
  to Kubernetes' schema: see `pod_parts`.
- Prometheus operator: monitoring.coreos.com_servicemonitors.yaml.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_ANYTHING: Schema = {}
"""Kubernetes' own; validated as a part of a pod."""


def _closed(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _manifest(api_version: str, kind: str, spec: Schema) -> Schema:
    return _closed(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion={"const": api_version}, kind={"const": kind}, spec=spec,
        metadata=_closed("name", name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS),
    )  # fmt: skip


SERVING_RUNTIME = _manifest(
    "serving.kserve.io/v1alpha1",
    "ServingRuntime",
    _closed(
        "containers",
        annotations=_TEXTS,
        labels=_TEXTS,
        supportedModelFormats={
            "type": "array",
            "items": _closed(
                "name", name=_TEXT, version=_TEXT, autoSelect={"type": "boolean"}, priority=_COUNT
            ),
        },
        protocolVersions={"type": "array", "items": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}},
        containers={"type": "array", "minItems": 1, "items": _ANYTHING},
        tolerations=_ANYTHING,
        volumes=_ANYTHING,
        nodeSelector=_ANYTHING,
        affinity=_ANYTHING,
        imagePullSecrets=_ANYTHING,
    ),
)

_POD_FIELDS = (
    "automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext",
    "tolerations", "volumes", "nodeSelector", "affinity", "imagePullSecrets", "serviceAccountName",
)  # fmt: skip

INFERENCE_SERVICE = _manifest(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    _closed(
        "predictor",
        predictor=_closed(
            "model",
            minReplicas={"type": "integer", "minimum": 0},
            maxReplicas=_COUNT,
            scaleMetric={"enum": ["cpu", "memory", "concurrency", "rps"]},
            scaleTarget=_COUNT,
            timeout=_COUNT,
            labels=_TEXTS,
            annotations=_TEXTS,
            model=_closed(
                "modelFormat",
                modelFormat=_closed("name", name=_TEXT, version=_TEXT),
                protocolVersion={"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                runtime=_TEXT,
                storageUri=_TEXT,
            ),
            **dict.fromkeys(_POD_FIELDS, _ANYTHING),
        ),
    ),
)

SERVICE_MONITOR = _manifest(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    _closed(
        "selector", "endpoints",
        selector=_closed(matchLabels=_TEXTS),
        endpoints={
            "type": "array",
            "items": _closed(
                port=_TEXT, path=_TEXT,
                interval={"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"},
            ),
        },
    ),
)  # fmt: skip

SCHEMAS: dict[str, Schema] = {
    "ServingRuntime": SERVING_RUNTIME,
    "InferenceService": INFERENCE_SERVICE,
    "ServiceMonitor": SERVICE_MONITOR,
}


def pod_parts(runtime: dict[str, Any], service: dict[str, Any]) -> dict[str, Any]:
    """The pod that KServe makes of both, without what it adds: for Kubernetes' own schema."""
    predictor = service["spec"]["predictor"]
    of_runtime = ("containers", "tolerations", "volumes", "nodeSelector", "affinity")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": service["metadata"]["name"],
            "annotations": runtime["spec"].get("annotations", {}),
        },
        "spec": {name: runtime["spec"][name] for name in of_runtime if name in runtime["spec"]}
        | {name: predictor[name] for name in _POD_FIELDS if name in predictor},
    }
