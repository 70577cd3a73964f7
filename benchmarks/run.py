"""All benchmarks of speed, one after the other, and one summary of them.

    python benchmarks/run.py             # an hour and a half, two thirds of it `bulk`
    python benchmarks/run.py --quick     # below 5; kept apart, in runs/benchmarks
    python benchmarks/run.py --only engine,decode

Each writes its JSON into `benchmarks/results`; `summary.md` beside them shows the tables of all
that are there, the criteria first. The peers run where their environment is (`--peers`, see
`benchmarks/peers.py`), and take longer than all else. Nothing else should run on the machine. Then
`python benchmarks/check.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import HERE, RESULTS, ROOT, figure_line

QUICK_RESULTS = ROOT / "runs" / "benchmarks"
PEERS = Path(".venv-peers/bin/python")
SCRIPTS = {
    "engine": "engine.py",
    "service": "rates.py",
    "ceiling": "service_efficiency.py",
    "decode": "decode.py",
    "startup": "startup.py",
    "bulk": "bulk.py",
    "peers": "peers.py",
}


def run(name: str, options: Sequence[str], results: Path) -> str | None:
    """Run one benchmark; what went wrong, if something did."""
    path = results / f"{name}.json"
    before = path.stat().st_mtime_ns if path.exists() else 0
    command = [sys.executable, str(HERE / SCRIPTS[name]), *options]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not path.exists() or path.stat().st_mtime_ns == before:
        return f"{name}: ended with status {status} and without a result"
    return f"{name}: a criterion does not hold" if status else None


def summary(results: Path) -> str:
    """All results of a folder as one page."""
    order = list(SCRIPTS)
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    found.sort(key=lambda each: order.index(each["name"]) if each["name"] in order else len(order))
    pages = "\n".join(each["markdown"] for each in found)
    return f"# Benchmarks\n\n{criteria(found)}\n\n{pages}"


def criteria(found: Sequence[dict[str, Any]]) -> str:
    """The figures that have a bound, those that miss it first."""
    bounded = [
        (each["name"], figure)
        for each in found
        for figure in each["figures"]
        if figure["holds"] is not None
    ]
    bounded.sort(key=lambda pair: pair[1]["holds"])
    return "\n".join(f"- {name}: {figure_line(figure)}" for name, figure in bounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds")
    parser.add_argument("--results", type=Path, help="folder for the JSON files")
    parser.add_argument("--only", help=f"some of {','.join(SCRIPTS)}")
    parser.add_argument(
        "--peers", type=Path, default=PEERS, help="Python of the peers' environment"
    )
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(SCRIPTS)
    if unknown := set(names) - set(SCRIPTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there is {', '.join(SCRIPTS)}")
    results = arguments.results or (QUICK_RESULTS if arguments.quick else RESULTS)
    results = results.resolve()
    started, wrong = time.monotonic(), []
    for name in names:
        options = ["--quick"] if arguments.quick else []
        if results != RESULTS:
            options += ["--results", str(results)]
        if name == "peers":
            if not (ROOT / arguments.peers).exists():
                print(f"peers: left out, there is no {arguments.peers}\n", flush=True)
                continue
            options += ["--python", str(arguments.peers)]
        if found := run(name, options, results):
            wrong.append(found)
        print(flush=True)
    page = results / "summary.md"
    page.write_text(summary(results))
    print(f"{page}, after {(time.monotonic() - started) / 60:.1f} minutes")
    print("\n".join(wrong) or "every criterion holds")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
