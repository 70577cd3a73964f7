"""Paths of requests."""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

PROBES: Final = frozenset(
    {"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)


def route_path(scope: Scope) -> str:
    """Return the path of a request below its `root_path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path
