"""Provenance of a model, for its checkpoint and its file."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from model_export.data.datasets import Dataset

# The last part alone, at the beginning or behind a "=".
_ABSOLUTE: Final = re.compile(r"(^|=)/(?:[^/]*/)*([^/]+)/*$")


def provenance(
    *,
    config: Mapping[str, Any],
    data: Dataset,
    weights: Path | None,
    init: Path | None,
    licences: Sequence[str],
) -> dict[str, Any]:
    """Return the inputs of a run. Files are named with their hash, without their folders."""
    return {
        **_program(),
        "config": dict(config),
        "data": {"name": data.root.resolve().name, "pictures": len(data.samples)},
        "weights": _file(weights),
        "init": _file(init),
        "licences": list(licences),
    }


def imported(*, source: Path, config: Mapping[str, Any], licences: Sequence[str]) -> dict[str, Any]:
    """Return the provenance of a checkpoint whose weights another program trained."""
    return {
        **_program(),
        "config": dict(config),
        "weights": _file(source),
        "licences": list(licences),
    }


def resumed(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of a resumed run: its original inputs and its current settings."""
    resumptions = [*before.get("resumed", []), _program()]
    return {**before, "config": dict(config), "resumed": resumptions}


def command(arguments: Sequence[str]) -> str:
    """Return a command line for a shell, absolute paths cut to their last part.

    >>> command(["/usr/bin/retinaserve", "train", "--data=/home/me/cells", "--set", "epochs=3"])
    'retinaserve train --data=cells --set epochs=3'
    """
    return shlex.join(_ABSOLUTE.sub(r"\1\2", each) for each in arguments)


def git_commit(source: Path | None = None) -> str | None:
    """Return the commit of the sources, marked "-dirty" if changed; None without a checkout.

    `source` is the file whose repository is asked, by default this one.
    """
    path = source or Path(__file__)
    # An installed package may lie inside another repository, without being part of it.
    if _git(path.parent, "ls-files", "--error-unmatch", path.name) is None:
        return None
    # Without tags to go by, `describe` names a commit by its hash.
    return _git(path.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _program() -> dict[str, Any]:
    """Return the version, the commit and the command line of this process."""
    return {"retinaserve": _version(), "git_commit": git_commit(), "command": command(sys.argv)}


def _version() -> str | None:
    try:
        return version("retinaserve")
    except PackageNotFoundError:
        return None


def _file(path: Path | None) -> dict[str, str] | None:
    if path is None or not path.is_file():
        return None
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
