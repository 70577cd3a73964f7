"""How far each version of each model got, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.models.registry import Registry
from service.observability.model_metrics import ModelKey


class RegistryCollector(Collector):
    """How far each version of each model got."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The samples of this moment."""
        ready = GaugeMetricFamily(
            "retinaserve_model_ready",
            "1 when the version can serve.",
            labels=("model", "version", "state", "sha256"),
        )
        seconds = GaugeMetricFamily(
            "retinaserve_model_load_seconds",
            "How long it took to load and warm the version.",
            labels=("model", "version"),
        )
        for slot in self._registry.slots():
            name = (slot.name, str(slot.version))
            ready.add_metric((*name, slot.state, slot.sha256 or ""), float(slot.state == "ready"))
            if slot.load_seconds is not None:
                seconds.add_metric(name, slot.load_seconds)
        yield ready
        yield seconds


def loaded(registry: Registry) -> Iterator[tuple[ModelKey, tuple[str, ...]]]:
    """Every version that is loaded, with its classes."""
    for slot in registry.slots():
        # Taken once: the version may be unloaded between two looks.
        servable = slot.servable
        if servable is not None:
            yield ModelKey(slot.name, slot.version), servable.metadata.classes
