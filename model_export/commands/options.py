"""Options that several commands of the `train` extra have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = _RECIPES / "light.yaml"


class Recipe(click.ParamType[Path]):
    """A YAML file, or the name of one that ships with the package."""

    name = "recipe"

    def __init__(self, folder: Path = _RECIPES) -> None:
        self._folder = folder

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Return the file's path."""
        if isinstance(value, Path):
            return value
        known = {path.stem: path for path in sorted(self._folder.glob("*.yaml"))}
        path = known.get(value, Path(value))
        if not path.is_file():
            self.fail(f"{value!r} is neither a file nor one of {', '.join(known)}", param, ctx)
        return path


licence_option = click.option(
    "--licence",
    "licences",
    multiple=True,
    metavar="TEXT",
    help="Licence of the data or of the weights, kept in the model file; repeatable.",
)


def _split_names(_context: Any, _parameter: Any, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",")]


def _pair_names(_context: Any, _parameter: Any, value: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in value]
    for text, (_, separator, _) in zip(value, pairs, strict=True):
        if not separator:
            raise click.BadParameter(f"{text!r}: expected OLD=NEW")
    return {old.strip(): new.strip() for old, _, new in pairs} or None


def label_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --format, --classes and --remap, passed on as `labels`: settings of a DataConfig."""

    @click.option(
        "--format",
        "layout",
        type=click.Choice(["auto", "voc", "coco", "yolo"]),
        help="How the folder is laid out; default: auto, by what is in it.",
    )
    @click.option(
        "--classes",
        metavar="A,B,…",
        callback=_split_names,
        help="Use objects of these classes only, by their new names.",
    )
    @click.option(
        "--remap",
        multiple=True,
        metavar="OLD=NEW",
        callback=_pair_names,
        help="Another name for a class; several may become one; repeatable.",
    )
    @functools.wraps(command)
    def with_labels(
        *, layout: str | None, classes: list[str] | None, remap: dict[str, str] | None, **rest: Any
    ) -> None:
        given = {"format": layout, "classes": classes, "remap": remap}
        command(labels={key: value for key, value in given.items() if value is not None}, **rest)

    return with_labels
