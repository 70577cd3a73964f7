"""Whether a new run of the benchmarks is worse than the committed one.

    python benchmarks/check.py                       # benchmarks/results against HEAD's
    python benchmarks/check.py --new runs/benchmarks --against v1.0

Compared are figures that hardly depend on the machine, most of them ratios. One is worse where its
median lies beyond all that the committed run saw, the committed median beyond all that this run
saw, and both by a margin. Ends with status 1 where something is worse or gone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = "benchmarks/results"
MARGIN = 0.03
"""Of the committed median."""
FEW = 3
FEW_MARGIN = 0.1
"""With fewer rounds than FEW on either side: they say nothing of the spread."""
Figure = Mapping[str, Any]


def worse(old: Figure, new: Figure) -> str | None:
    """In words, if a figure fell beyond the spread."""
    few = min(len(old["values"]), len(new["values"])) < FEW
    margin = (FEW_MARGIN if few else MARGIN) * abs(old["median"])
    if old["better"] == "higher":
        fell = new["median"] < old["lowest"] - margin and new["highest"] < old["median"] - margin
    else:
        fell = new["median"] > old["highest"] + margin and new["lowest"] > old["median"] + margin
    if not fell:
        return None
    asked = "higher" if old["better"] == "higher" else "lower"
    return (
        f"{old['name']}: {_spread(new)}, it was {_spread(old)}; {asked} is better, and the two "
        f"are further apart than either run's rounds"
    )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is worse in one benchmark, or gone."""
    there = {figure["name"]: figure for figure in new["figures"]}
    found = []
    for figure in old["figures"]:
        name = figure["name"]
        if not figure["ratio"]:
            continue
        if name not in there:
            # A short run sends fewer requests, and says so in the figure's name.
            if old["quick"] == new["quick"]:
                found.append(f"{name}: the new run has no such figure")
        elif reason := worse(figure, there[name]):
            found.append(reason)
    return [f"{old['name']}: {reason}" for reason in found]


def committed(revision: str) -> Iterator[dict[str, Any]]:
    """The results of a commit."""
    listed = _git("ls-tree", "--name-only", revision, f"{RESULTS}/")
    for path in listed.splitlines():
        if path.endswith(".json"):
            yield json.loads(_git("show", f"{revision}:{path}"))


def _spread(figure: Figure) -> str:
    median = f"{figure['median']:.3f}"
    if len(figure["values"]) == 1:
        return median
    return f"{median} ({figure['lowest']:.3f} to {figure['highest']:.3f})"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=Path, default=HERE / "results", help="folder of the new run")
    parser.add_argument("--against", default="HEAD", help="commit to compare with")
    arguments = parser.parse_args()
    found: list[str] = []
    compared = 0
    for old in committed(arguments.against):
        path = arguments.new / f"{old['name']}.json"
        if not path.exists():
            print(f"{old['name']}: not in the new run")
            continue
        new = json.loads(path.read_text())
        if new["machine"] != old["machine"]:
            print(f"{old['name']}: on another machine than the committed run")
        found += compare(old, new)
        compared += 1
    if not compared:
        raise SystemExit(f"nothing to compare: {arguments.against} and {arguments.new} share none")
    print("\n".join(found) or f"no ratio of {compared} benchmarks is worse than it was")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
