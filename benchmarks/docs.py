"""Put what is in `benchmarks/results` into `docs/benchmarks.md`, between its marks.

    python benchmarks/docs.py

A mark names a result and the parts of it to show; everything up to `<!-- end -->` is replaced:

    <!-- results/decode.json: command; figures; table 1 | file = JPEG, camera | image | core-ms -->

A table is its number in the result, then conditions on rows (= or !=), and columns; without columns
all. Figures may be chosen by a part of their names: `figures | lost | doubled`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- results/([\w-]+)\.json: (.*?) -->)\n.*?<!-- end -->", re.DOTALL)


def shown(page: str) -> set[str]:
    """Names of the results that a page has marks for."""
    return {name for _, name, _ in MARKED.findall(page)}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with its marks filled. Raises OSError, and ValueError for an unknown column."""

    def replaced(mark: re.Match[str]) -> str:
        opening, name, what = mark.groups()
        result = json.loads((results / f"{name}.json").read_text())
        parts = "\n\n".join(part(result, each) for each in what.split("; "))
        return f"{opening}\n{parts}\n<!-- end -->"

    return MARKED.sub(replaced, page)


def part(result: dict[str, Any], what: str) -> str:
    """One part of a result as Markdown."""
    lines: list[str] = result["markdown"].splitlines()
    if what == "command":
        return f"`{result['command']}`, commit {result['versions']['commit']}:"
    head, *chosen = what.split(" | ")
    if head == "figures":
        found = [line for line in lines if line.startswith("- ") and "**" in line]
        return "\n".join(
            line for line in found if not chosen or any(each in line for each in chosen)
        )
    columns, _, *rows = tables(lines)[int(head.removeprefix("table ")) - 1]
    wanted = []
    for each in chosen:
        column, sign, value = each.partition(" != " if " != " in each else " = ")
        if sign:
            index, equal = columns.index(column), sign == " = "
            rows = [row for row in rows if (row[index] == value) == equal]
        else:
            wanted.append(column)
    wanted = wanted or columns
    indices = [columns.index(each) for each in wanted]
    cells = [wanted, ["---"] * len(wanted), *([row[index] for index in indices] for row in rows)]
    return "\n".join(f"| {' | '.join(each)} |" for each in cells)


def tables(lines: list[str]) -> list[list[list[str]]]:
    """The cells of each table in the lines of a page."""
    found: list[list[list[str]]] = []
    before = ""
    for line in lines:
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return found


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
