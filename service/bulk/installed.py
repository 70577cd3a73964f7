"""Checks for the packages of the extras, made before anything else is imported."""

from __future__ import annotations

from importlib.util import find_spec

from service.errors import DataError


def check_pyarrow() -> None:
    """Raises DataError with the command that installs it."""
    _check("pyarrow", "`retinaserve bulk`", "pip install 'retinaserve[bulk]'")


def check_ray() -> None:
    """Raises DataError with the command that installs it."""
    for package in ("ray", "pandas"):
        _check(package, "`retinaserve bulk --engine ray`", "pip install 'retinaserve[scale]'")


def check_fsspec(url: str) -> None:
    """Raises DataError with the command that installs it."""
    _check("fsspec", url, "pip install 'retinaserve[bulk]'")


def _check(package: str, what: str, remedy: str) -> None:
    if find_spec(package) is None:
        raise DataError(f"{what} needs the package {package!r}: {remedy}")
