"""The model that an offline command uses."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from service.errors import DataError, UnknownModel, shown
from service.runtime.artifact import (
    VERSION_RULE,
    Artifact,
    entry_of,
    parse_version,
    read_artifact,
    scan_repository,
)
from service.settings import Settings


class FoundModel(NamedTuple):
    """A model file and its name in outputs."""

    name: str
    version: int | None
    """None for a file outside of a repository."""
    artifact: Artifact


def find_model(settings: Settings, model: str | None) -> FoundModel:
    """Find a model file, or NAME[@VERSION] of the repository; None: the default model.

    Raises ArtifactError, DataError or UnknownModel.
    """
    artifact, version = _find(settings, model)
    # In a repository the folder names the model; a file by itself has only its own word.
    name = artifact.metadata.name if version is None else artifact.path.parent.parent.name
    return FoundModel(name, version, artifact)


def _find(settings: Settings, model: str | None) -> tuple[Artifact, int | None]:
    if model is not None and (model.endswith(".onnx") or "/" in model):
        path = Path(model).absolute()
        entry = entry_of(path)
        return read_artifact(path), None if entry is None else entry.version
    name, separator, wanted = (model or "").partition("@")
    version = parse_version(wanted) if separator else None
    if separator and version is None:
        raise DataError(f"--model {shown(model)}: {VERSION_RULE}")
    name = name or settings.default_model or ""
    entries = scan_repository(settings.models_dir)
    if not name and len({entry.name for entry in entries}) > 1:
        names = ", ".join(sorted({entry.name for entry in entries}))
        raise DataError(f"{settings.models_dir} holds several models ({names}); name one: --model")
    fitting = [
        entry
        for entry in entries
        if (not name or entry.name == name) and version in (None, entry.version)
    ]
    if not fitting:
        known = ", ".join(f"{entry.name}@{entry.version}" for entry in entries)
        raise UnknownModel(f"no model {shown(model)} in {settings.models_dir}; there is {known}")
    return read_artifact(fitting[-1].path), fitting[-1].version
