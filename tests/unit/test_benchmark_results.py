"""What docs/benchmarks.md shows is what the committed results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import docs

RESULT = {
    "command": "python x.py",
    "versions": {"commit": "abc"},
    "markdown": """## Title

| size | file | ms |
|---|---|---|
| 1 | JPEG | 2.0 |
| 1 | PNG | 3.0 |

- ratio: **0.97**
- lost: **0**
""",
}


def test_benchmarks_page_shows_the_committed_results() -> None:
    page = docs.PAGE.read_text()
    assert docs.filled(page) == page, "run python benchmarks/docs.py"
    assert docs.shown(page) == {path.stem for path in docs.RESULTS.glob("*.json")}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("command", "`python x.py`, commit abc:"),
        ("figures", "- ratio: **0.97**\n- lost: **0**"),
        ("figures | lost", "- lost: **0**"),
        ("table 1 | file = PNG | ms | size", "| ms | size |\n| --- | --- |\n| 3.0 | 1 |"),
        ("table 1 | file != PNG | ms", "| ms |\n| --- |\n| 2.0 |"),
    ],
)
def test_benchmarks_page_selects_parts_of_a_result(what: str, expected: str) -> None:
    assert docs.part(RESULT, what) == expected


def test_benchmarks_page_refuses_an_unknown_column() -> None:
    with pytest.raises(ValueError, match="seconds"):
        docs.part(RESULT, "table 1 | seconds")


def test_gpu_benchmark_without_a_gpu_ends_with_one_line() -> None:
    program = Path(docs.HERE / "gpu_engine.py")
    done = subprocess.run(
        [sys.executable, program, "--device", "cuda:63"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "cuda:63 cannot be used" in done.stderr
