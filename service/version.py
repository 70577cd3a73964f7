"""Which version of the project runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Version of the installed distribution; "0" in a checkout that is not installed."""
    try:
        return version("retinaserve")
    except PackageNotFoundError:
        return "0"
