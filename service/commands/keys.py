"""`retinaserve keys`."""

from __future__ import annotations

from pathlib import Path

import click

from service.errors import DataError
from service.http.auth.keys import new_key, read_keys, revoke_key
from service.settings import load_settings


def new(name: str, *, admin: bool, file: Path | None) -> None:
    """Make a key and print it, alone on stdout. Raises DataError."""
    path = _path(file)
    key = new_key(path, name, admin=admin)
    click.echo(
        f"{name} is in {path}. The key is not kept anywhere; it is shown this once:", err=True
    )
    click.echo(key)


def list_keys(file: Path | None) -> None:
    """Print a line per key: name, date, and admin or client. Raises DataError."""
    for entry in read_keys(_path(file)):
        click.echo(f"{entry.name}\t{entry.created}\t{'admin' if entry.admin else 'client'}")


def revoke(name: str, file: Path | None) -> None:
    """Remove a key; a running service refuses it about a second later. Raises DataError."""
    path = _path(file)
    revoke_key(path, name)
    click.echo(f"{name} is no longer in {path}", err=True)


def _path(file: Path | None) -> Path:
    chosen = load_settings().api_keys_file if file is None else file
    if chosen is None:
        raise DataError("which keys file? Give --file PATH or set RETINASERVE_API_KEYS_FILE")
    return chosen
