"""`kustomize build`, as far as deploy/kubernetes uses it; whatever else is asked for is an error.

resources, components, patches (strategic merges for one target each), images, namespace. The
tests compare it with the real program wherever that is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KINDS = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}
FIELDS = {"apiVersion", "kind", "resources", "components", "patches", "images", "namespace"}
MERGE_KEYS = {
    "containers": "name", "initContainers": "name", "env": "name", "ports": "containerPort",
    "volumes": "name", "volumeMounts": "mountPath",
}  # fmt: skip
"""Lists of a pod whose entries are merged by this key; every other list is replaced."""


def build(folder: Path) -> list[Manifest]:
    """The manifests that a folder's kustomization makes."""
    return _apply(folder, [])


def find(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def merged(base: Manifest, patch: Manifest) -> Manifest:
    """A strategic merge of a patch into a manifest."""
    result = copy.deepcopy(base)
    for name, value in patch.items():
        old = result.get(name)
        assert value is not None, f"{name}: deleting by null is not supported"
        if isinstance(value, dict):
            assert "$patch" not in value, f"{name}: directives are not supported"
            result[name] = merged(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list) and name in MERGE_KEYS:
            result[name] = _merged_list(old or [], value, MERGE_KEYS[name])
        else:
            result[name] = copy.deepcopy(value)
    return result


def in_order(value: Any, name: str = "") -> Any:
    """The same with merged lists sorted: in which order a merge leaves them has no meaning."""
    if isinstance(value, dict):
        return {key: in_order(each, key) for key, each in value.items()}
    if isinstance(value, list):
        items = [in_order(each) for each in value]
        key = MERGE_KEYS.get(name)
        if key is not None and all(isinstance(each, dict) and key in each for each in items):
            return sorted(items, key=lambda each: str(each[key]))
        return items
    return value


def _merged_list(old: list[Manifest], new: list[Manifest], key: str) -> list[Manifest]:
    entries = {entry[key]: entry for entry in old}
    for entry in new:
        entries[entry[key]] = merged(entries.get(entry[key], {}), entry)
    return list(entries.values())


def _apply(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    path = folder / "kustomization.yaml"
    file = yaml.safe_load(path.read_text())
    assert file["apiVersion"] == KINDS[file["kind"]], path
    assert file.keys() <= FIELDS, f"{path}: {file.keys() - FIELDS} is not supported"
    manifests = list(manifests)
    for name in file.get("resources", ()):
        place = (folder / name).resolve(strict=True)
        manifests += build(place) if place.is_dir() else list(yaml.safe_load_all(place.read_text()))
    for name in file.get("components", ()):
        manifests = _apply((folder / name).resolve(strict=True), manifests)
    for patch in file.get("patches", ()):
        manifests = _patched(folder, manifests, patch)
    if "namespace" in file:
        for manifest in manifests:
            # A Namespace is renamed, everything else moves into it.
            field = "name" if manifest["kind"] == "Namespace" else "namespace"
            manifest["metadata"][field] = file["namespace"]
    for image in file.get("images", ()):
        assert image.keys() <= {"name", "newName", "newTag"}, f"{path}: {image}"
        for manifest in manifests:
            _rename(manifest, image)
    return manifests


def _patched(folder: Path, manifests: list[Manifest], patch: dict[str, Any]) -> list[Manifest]:
    assert patch.keys() in ({"path", "target"}, {"patch", "target"}), patch
    assert patch["target"].keys() == {"kind", "name"}, patch
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
    content = yaml.safe_load(text)
    wanted = patch["target"]["kind"], patch["target"]["name"]
    hits = [(each["kind"], each["metadata"]["name"]) == wanted for each in manifests]
    assert sum(hits) == 1, f"{patch} fits {sum(hits)} manifests"
    return [
        merged(each, content) if hit else each for each, hit in zip(manifests, hits, strict=True)
    ]


def _rename(manifest: Manifest, image: dict[str, str]) -> None:
    for container in _containers(manifest):
        name, tag = _split(container["image"])
        if name == image["name"]:
            tag = image.get("newTag", tag)
            name = image.get("newName", name)
            container["image"] = f"{name}:{tag}" if tag else name


def _split(reference: str) -> tuple[str, str]:
    """An image's name and tag; a colon before the last slash belongs to a port."""
    folder, slash, last = reference.rpartition("/")
    name, _, tag = last.partition(":")
    return folder + slash + name, tag


def _containers(value: Any) -> Iterator[Manifest]:
    if isinstance(value, dict):
        for name, each in value.items():
            if name in ("containers", "initContainers"):
                yield from each
            else:
                yield from _containers(each)
