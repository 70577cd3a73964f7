"""Put the tables of `benchmarks/results` into `docs/benchmarks.md`, between their marks.

    python benchmarks/docs.py            # after a run; prints what changed
    python benchmarks/docs.py --check    # status 1 where the page is not what the results say

A table stands between `<!-- results/NAME.json -->` and `<!-- end -->`; what people write about it
stands outside.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARKED = re.compile(r"<!-- results/([\w-]+)\.json -->\n.*?<!-- end -->", re.DOTALL)


def shown(page: str) -> list[str]:
    """Names of the results that a page has marks for."""
    return MARKED.findall(page)


def filled(page: str, results: Path = RESULTS) -> str:
    """A page with the tables of the results that it has marks for. Raises OSError."""

    def table(mark: re.Match[str]) -> str:
        name = mark[1]
        markdown: str = json.loads((results / f"{name}.json").read_text())["markdown"]
        # The page has a heading of its own.
        body = markdown.split("\n", 1)[1].strip()
        return f"<!-- results/{name}.json -->\n{body}\n<!-- end -->"

    return MARKED.sub(table, page)


def unshown(page: str, results: Path = RESULTS) -> list[str]:
    """Names of results that a page has no marks for."""
    return sorted({path.stem for path in results.glob("*.json")} - set(shown(page)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    before = PAGE.read_text()
    after = filled(before)
    missing = unshown(before)
    for name in missing:
        print(f"{PAGE.name} has no marks for results/{name}.json")
    if before != after:
        print(
            f"{PAGE.name} differs from the results" if arguments.check else f"{PAGE.name} written"
        )
    if not arguments.check:
        PAGE.write_text(after)
    raise SystemExit(bool(missing) or (arguments.check and before != after))


if __name__ == "__main__":
    main()
