"""The command line. Heavy imports wait until their command runs, so that --help is quick."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

import click

from service.commands.bulk_cli import bulk
from service.commands.options import Number, PathOption, devices_option, models_option
from service.errors import (
    ArtifactError,
    DataError,
    InvalidParameter,
    MalformedImage,
    RetinaserveError,
    TooLarge,
    UnknownModel,
    UnsupportedMedia,
)
from service.filenames import one_line
from service.system.process import open_standard_files, stop_signals

COMMAND_GROUP: Final = "retinaserve.commands"
_BAD_INPUT: Final = (
    ArtifactError,
    DataError,
    InvalidParameter,
    MalformedImage,
    TooLarge,
    UnknownModel,
    UnsupportedMedia,
)
_SUMMARIES: Final = {
    "train": "Train a detector on labelled images.",
    "evaluate": "COCO metrics of a model file on labelled images.",
    "export": "Write a checkpoint as a model file.",
    "data": "What is in labelled images, what is wrong; which images to label next.",
    "import-torchvision": "Turn a RetinaNet of torchvision's into a checkpoint.",
    "pull": "Make a model file of a published detector.",
    "study": "The paper's exhibits: loss curves, distributions, ablations.",
}
"""Lines for --help: loading a command to ask it may take seconds."""


class LazyCommand(click.Command):
    """A command of another package, which is loaded when it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(
            entry.name,
            short_help=_SUMMARIES.get(entry.name, ""),
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        )
        self._entry = entry

    def invoke(self, ctx: click.Context) -> Any:
        """Load the command and hand the arguments on."""
        try:
            command: click.Command = self._entry.load()
            return command.main(
                list(ctx.params["arguments"]),
                prog_name=ctx.info_name,
                standalone_mode=False,
                parent=ctx.parent,
            )
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("service", "model_export"):
                raise
            raise click.UsageError(
                f"`{ctx.command_path}` needs the package {package!r}: "
                "pip install 'retinaserve[train]'"
            ) from error


class Commands(click.Group):
    """Own commands, and those that the entry points name. One-line errors, exit 1 or 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command by name; nothing is loaded."""
        return sorted({*super().list_commands(ctx), *_entries()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = _entries().get(cmd_name)
        return None if entry is None else LazyCommand(entry)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; errors that are meant for the user become one line."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                _flush_stdout()
        except RetinaserveError as error:
            click.echo(f"retinaserve: error: {_one_line(error)}", err=True)
            ctx.exit(2 if isinstance(error, _BAD_INPUT) else 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # click ends without a word: `| head` has what it wants.
                raise
            click.echo(f"retinaserve: error: {_one_line(error)}", err=True)
            ctx.exit(1)


def main() -> None:
    """Entry point of the `retinaserve` command."""
    open_standard_files()
    retinaserve(prog_name="retinaserve")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="retinaserve")
def retinaserve() -> None:
    """RetinaNet detectors: train on your images, export one file, serve it over HTTP.

    Settings of the service are environment variables RETINASERVE_<NAME>; options win.
    """


@retinaserve.command()
@models_option
@devices_option
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=int, help="Port to listen on; default 8000; 0: any free one.")
@click.option("--root-path", default="", help="Path prefix that a proxy in front takes off.")
@click.option(
    "--ssl-certfile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Serve HTTPS with this certificate (PEM).",
)
@click.option(
    "--ssl-keyfile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The certificate's key, where it is a file of its own.",
)
def serve(
    models_dir: Path | None,
    device: str | None,
    host: str | None,
    port: int | None,
    root_path: str,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
) -> None:
    """Run the service."""
    # The imports below take a second or two, and as process 1 of a container a process without a
    # handler does not even see the signal. At once, since a model may be loading in native code,
    # and Python would not end well beside that.
    for number in stop_signals():
        signal.signal(number, lambda *_: os._exit(0))
    # What is imported stays: to look through it for garbage, again and again, only takes time.
    gc.disable()
    from service.commands import serve as command

    command.run(
        given={"models_dir": models_dir, "device": device, "host": host, "port": port},
        root_path=root_path,
        certificate=ssl_certfile,
        key=ssl_keyfile,
    )


@retinaserve.command()
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="PATH…"
)
@click.option(
    "--model",
    metavar="NAME[@VERSION]|FILE.onnx",
    help="Model of the repository, or a model file; default: the default model.",
)
@click.option(
    "--score-threshold",
    type=Number(0.0, 1.0),
    help="Only detections that score above this; default: the model's own.",
)
@click.option(
    "--max-detections",
    type=click.IntRange(1, 1000),
    help="At most this many detections of an image; default: the model's own.",
)
@click.option(
    "--tile",
    default="off",
    show_default=True,
    metavar="off|auto|N",
    help="Cut large images into overlapping tiles; auto: of the model's canvas size, where the "
    "image would shrink to less than half; N: with N pixels on the longer side.",
)
@click.option("--device", help="auto, cpu, cuda or cuda:1.")
@click.option(
    "--output", type=click.Choice(["json", "coco", "csv"]), default="json", show_default=True
)
@click.option(
    "--like",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="With --output coco: take the ids of images, by file name, and of categories, by class "
    "name, from this COCO annotation file, and round nothing; to compare as `evaluate` does, add "
    "--score-threshold 0.01 --max-detections 300.",
)
@click.option(
    "--save-dir",
    type=PathOption(file_okay=False, path_type=Path),
    help="Write the images with boxes drawn here; copies of an earlier run are replaced, images "
    "that are detected on never.",
)
def detect(
    paths: tuple[Path, ...],
    model: str | None,
    score_threshold: float | None,
    max_detections: int | None,
    tile: str,
    device: str | None,
    output: str,
    like: Path | None,
    save_dir: Path | None,
) -> None:
    """Detect objects in files and folders, without a server.

    A file that does not decode is reported, the others go on, and the exit code is 2. Links to
    folders are not followed. A name that is not UTF-8 is written as a file: URL; in CSV, text that
    a spreadsheet would take for a formula has a quote in front.
    """
    from service.commands import detect as command
    from service.engine.tiling import parse_tile

    if like is not None and output != "coco":
        raise click.UsageError("--like goes with --output coco: it gives COCO results their ids")
    failed = command.run(
        paths,
        model=model,
        score_threshold=score_threshold,
        device=device,
        output=output,
        save_dir=save_dir,
        tile=parse_tile(tile),
        max_detections=max_detections,
        like=like,
    )
    sys.exit(2 if failed else 0)


_LABEL_EXAMPLE = """\b
Example:
  retinaserve label new-images --model models/cells/1/model.onnx \\
      --output to-correct --format voc
"""


@retinaserve.command(epilog=_LABEL_EXAMPLE)
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="PATH…"
)
@click.option(
    "--model",
    metavar="NAME[@VERSION]|FILE.onnx",
    help="Model of the repository, or a model file; default: the default model.",
)
@click.option(
    "--output",
    type=PathOption(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the images and their labels, outside of PATH.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["voc", "yolo", "coco", "label-studio"]),
    default="voc",
    show_default=True,
    help="voc: for labelImg and CVAT; yolo: for Ultralytics, CVAT and FiftyOne; coco: for FiftyOne "
    "and CVAT; label-studio: for Label Studio.",
)
@click.option(
    "--score-threshold",
    type=Number(0.0, 1.0),
    help="Only detections that score above this; default: the model's own.",
)
@click.option(
    "--tile",
    default="off",
    show_default=True,
    metavar="off|auto|N",
    help="Cut large images into overlapping tiles, as `detect` does.",
)
@click.option("--device", help="auto, cpu, cuda or cuda:1.")
@click.option("--link", is_flag=True, help="Link the images (symbolic links) instead of copying.")
@click.option(
    "--overwrite", is_flag=True, help="Replace labels that are there; images are never replaced."
)
def label(tile: str, **options: Any) -> None:
    """Write detections as labels, to be opened in a tool and corrected.

    \b
    DIR gets copies of the images, and for each FORMAT:
      voc           NAME.xml beside NAME.jpg
      yolo          images/, labels/ and data.yaml (dataset.yaml is the same)
      coco          data/ and labels.json
      label-studio  images/, tasks.json and config.xml (the labelling interface)

    All images are in one folder, as most tools need it: a/b.jpg becomes a_b.jpg. Boxes are pixels
    of the upright image, after EXIF orientation. Images that have labels in DIR already are left
    out, so an interrupted run continues; labels.json and tasks.json must not be there. A file that
    does not decode is reported, the others go on, and the exit code is 2.
    """  # noqa: D301 (click needs the character itself)
    from service.commands import label as command
    from service.engine.tiling import parse_tile

    failed = command.run(tile=parse_tile(tile), **options)
    sys.exit(2 if failed else 0)


@retinaserve.command()
@devices_option
def doctor(device: str | None) -> None:
    """Which hardware, providers and models are really usable."""
    from service.commands import doctor as command

    command.run(device)


@retinaserve.command()
@click.argument(
    "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="MODEL.onnx"
)
@click.option(
    "--set-threshold",
    "thresholds",
    multiple=True,
    metavar="SCORE|CLASS=SCORE",
    help="Change the default score threshold, in general or of one class; repeatable.",
)
def inspect(path: Path, thresholds: tuple[str, ...]) -> None:
    """What a model file says of itself."""
    from service.commands import inspect as command

    command.run(path, thresholds)


@retinaserve.group()
def keys() -> None:
    """API keys of the service."""


_keys_file = click.option(
    "--file",
    type=PathOption(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="The keys file; default: RETINASERVE_API_KEYS_FILE.",
)


@keys.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key may load, unload and choose models.")
@_keys_file
def new(name: str, admin: bool, file: Path | None) -> None:
    """Make a key and show it, once."""
    from service.commands import keys as command

    command.new(name, admin=admin, file=file)


@keys.command("list")
@_keys_file
def list_keys(file: Path | None) -> None:
    """Names of the keys, when each was made, and what it may do."""
    from service.commands import keys as command

    command.list_keys(file)


@keys.command()
@click.argument("name")
@_keys_file
def revoke(name: str, file: Path | None) -> None:
    """Take a key away; a running service notices within seconds."""
    from service.commands import keys as command

    command.revoke(name, file)


retinaserve.add_command(bulk)


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}


def _flush_stdout() -> None:
    """Write what is buffered while an error can be told. Raises OSError."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again at its end, and fail with a message and a status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _one_line(error: Exception) -> str:
    return one_line(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
