"""A setting that is one of several kinds, told apart by its `name`."""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator


def by_name(default: str, *others: str) -> Discriminator:
    """Return a discriminator by `name`; settings without one are those of the default kind."""

    def name_of(value: Any) -> str | None:
        name = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", "")
        return name if isinstance(name, str) else None

    return Discriminator(
        name_of,
        custom_error_type="unknown_name",
        custom_error_message=f"expected a mapping whose `name` is {', '.join((default, *others))}",
    )
