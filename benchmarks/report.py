"""What a benchmark found, written once: a Markdown table for people, JSON to compare with later.

    report = Report("engine", "Detector beside a bare session", arguments)
    table = report.table({"canvas": "", "batch": "d", "images/s": ".1f"})
    table.row("384 x 512", 1, 19.03)
    report.figure("detector over bare session", [0.99, 1.0, 0.98], better="higher", bound=0.95)
    report.close()

Rows are printed as they come. `figure` takes one value for each round, and speaks of their median
and of the lowest and the highest; with a bound it is a criterion, and `close` ends the process with
status 1 where one does not hold. `benchmarks/docs.py` puts results into `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import psutil

from service.system.cpus import cpu_count

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DISTRIBUTIONS = ("numpy", "pillow", "uvicorn", "retinaserve")
MOST_KEPT = 3
"""Of so few values none is left out."""
Cell = str | int | float | None
Better = Literal["higher", "lower"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark with a report has."""
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds")
    parser.add_argument("--results", type=Path, help=f"folder for the JSON; default: {RESULTS}")


class Table:
    """Rows that are printed as they come; columns are headings, and how numbers are written."""

    def __init__(self, columns: Mapping[str, str], title: str = "") -> None:
        self.columns = dict(columns)
        self.title = title
        self.rows: list[tuple[Cell, ...]] = []

    def row(self, *cells: Cell) -> None:
        """Keep and print one row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns: {cells}")
        if not self.rows:
            print(self._head(), flush=True)
        self.rows.append(cells)
        print(self._line(cells), flush=True)

    def markdown(self) -> str:
        """The whole table."""
        return "\n".join([self._head(), *map(self._line, self.rows)])

    def content(self) -> dict[str, Any]:
        """As JSON has it: each row with its headings."""
        rows = [dict(zip(self.columns, cells, strict=True)) for cells in self.rows]
        return {"title": self.title, "rows": rows}

    def _head(self) -> str:
        title = f"\n{self.title}\n" if self.title else ""
        return f"{title}\n| {' | '.join(self.columns)} |\n{'|---' * len(self.columns)}|"

    def _line(self, cells: Sequence[Cell]) -> str:
        written = (
            _write(cell, how) for cell, how in zip(cells, self.columns.values(), strict=True)
        )
        return f"| {' | '.join(written)} |"


class Report:
    """The tables and figures of one run of one benchmark."""

    def __init__(self, name: str, title: str, arguments: argparse.Namespace | None = None) -> None:
        """`arguments` come from a parser with `add_options`."""
        self.name = name
        self.title = title
        self.folder: Path = getattr(arguments, "results", None) or RESULTS
        self.quick: bool = getattr(arguments, "quick", False)
        self.machine = machine()
        self.versions = versions()
        self._started = time.time()
        self._tables: list[Table] = []
        self._figures: list[dict[str, Any]] = []
        print(f"## {title}\n\n{self.heading()}", flush=True)

    def heading(self) -> str:
        """Command, machine and versions in two lines."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        return f"`{command()}` on {machine};\n{versions}."

    def table(self, columns: Mapping[str, str], title: str = "") -> Table:
        """A table that becomes part of the report."""
        self._tables.append(Table(columns, title))
        return self._tables[-1]

    def figure(
        self,
        name: str,
        values: Sequence[float],
        *,
        better: Better,
        bound: float | None = None,
        unit: str = "",
    ) -> None:
        """A figure, one value for each round.

        `bound` is what its median must reach.
        """
        self._figures.append(summary(name, values, better, bound) | {"unit": unit})
        if len(self._figures) == 1:
            print()
        print(f"- {figure_line(self._figures[-1])}", flush=True)

    def content(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "name": self.name,
            "title": self.title,
            "command": command(),
            "quick": self.quick,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
            "machine": self.machine,
            "versions": self.versions,
            "tables": [table.content() for table in self._tables],
            "figures": self._figures,
            "markdown": self.markdown(),
        }

    def markdown(self) -> str:
        """As it was printed."""
        tables = [table.markdown() for table in self._tables]
        figures = "\n".join(f"- {figure_line(figure)}" for figure in self._figures)
        return "\n".join([f"## {self.title}\n\n{self.heading()}", *tables, "", figures]) + "\n"

    def save(self) -> Path:
        """Write the JSON file; its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(self.content(), indent=1) + "\n")
        return path

    def close(self) -> None:
        """Save, and end the process with status 1 where a criterion does not hold."""
        self.save()
        raise SystemExit(any(each["holds"] is False for each in self._figures))


def trimmed(values: Sequence[float]) -> list[float]:
    """Without the extreme tenth at either end, one value at least where there are more than three.

    >>> trimmed([9.0, 1.0, 2.0, 3.0, -5.0])
    [1.0, 2.0, 3.0]
    """
    out = max(len(values) // 10, int(len(values) > MOST_KEPT))
    return sorted(values)[out : len(values) - out]


def summary(
    name: str, values: Sequence[float], better: Better, bound: float | None
) -> dict[str, Any]:
    """Median, spread, and whether the bound is kept."""
    if not values:
        raise ValueError(f"{name}: a figure needs at least one value")
    median = statistics.median(values)
    holds = None if bound is None else median >= bound if better == "higher" else median <= bound
    return {
        "name": name,
        "better": better,
        "median": median,
        "lowest": min(values),
        "highest": max(values),
        "values": list(values),
        "bound": bound,
        "holds": holds,
    }


def figure_line(figure: Mapping[str, Any]) -> str:
    """A figure in words."""
    unit = f" {figure['unit']}" if figure["unit"] else ""
    line = f"{figure['name']}: **{figure['median']:.4g}**{unit}"
    if len(figure["values"]) > 1:
        line += f" ({figure['lowest']:.4g} to {figure['highest']:.4g})"
    if figure["bound"] is None:
        return line
    asked = "at least" if figure["better"] == "higher" else "at most"
    held = "holds" if figure["holds"] else "**does not hold**"
    return f"{line}; asked: {asked} {figure['bound']:g}{unit}: {held}"


def machine() -> dict[str, str]:
    """What the benchmark ran on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "CPU": cpu_model(),
        "cores": str(cores),
        "cores by quota": str(cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown"
    )


def versions() -> dict[str, str]:
    """What the benchmark ran with."""
    found = {"Python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit() -> str:
    """The commit that was measured, marked where tracked files differ from it.

    Results do not count: a benchmark before this one has written them.
    """
    told = _git("describe", "--always", "--abbrev=12")
    if told.returncode != 0:
        return "unknown"
    changed = _git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results")
    return told.stdout.strip() + ("-dirty" if changed.returncode else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)


def command() -> str:
    """The command line, as one types it in the repository's root."""
    return shlex.join(["python", _short(sys.argv[0]), *map(_short, sys.argv[1:])])


def _short(argument: str) -> str:
    """A path in the repository, from its root; of others the name, which is all that matters."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _write(cell: Cell, how: str) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else format(cell, how)
