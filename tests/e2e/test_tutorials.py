"""Tutorials: what a page tells to do works as it stands there, and prints what the page shows."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest
import torch
from click.testing import CliRunner

from service.cli import retinaserve
from service.settings import Settings
from tests.e2e import tutorial
from tests.e2e.browser import ROOT
from tests.unit.model_export.golden import parity

DOCS: Final = ROOT / "docs"
TUTORIALS: Final = sorted((DOCS / "tutorials").glob("*.md"))
PAGES: Final = [
    *TUTORIALS,
    *(p for name in ("bulk", "kubernetes") if (p := DOCS / f"{name}.md").exists()),
]
BLOCKS: Final = [block for page in PAGES for block in tutorial.blocks(page)]
"""Every block, of pages that are written later too."""

ELSEWHERE: Final = "own-data.md"
"""test_whole_path.py runs this page, and goes on with what it leaves."""


def torchvision_weights(folder: Path) -> None:
    """`retinanet.pth`, as torchvision's RetinaNet with 91 classes would save it."""
    torch.save(parity.load("v1").state_dict(), folder / "retinanet.pth")


PREPARATIONS: Final[Mapping[str, Callable[[Path], None]]] = {
    "from-torchvision.md": torchvision_weights,
}
"""What a page says that its reader has already."""


def runs(page: Path) -> bool:
    return any(block.commands and not block.not_tested for block in tutorial.blocks(page))


HERE: Final = [page for page in PAGES if runs(page) and page.name != ELSEWHERE]


def test_tutorials_have_commands_to_run() -> None:
    assert len(TUTORIALS) >= 3
    assert [page.name for page in TUTORIALS if not runs(page)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_tutorial_commands_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    PREPARATIONS.get(page.name, lambda _: None)(tmp_path)
    tutorial.run(page, tmp_path)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.not_tested is not None], ids=str
)
def test_untested_blocks_have_a_reason_and_valid_options(block: tutorial.Block) -> None:
    """As far as can be seen without running it: a shell understands it, and our options exist."""
    assert block.not_tested, f"{block}: {tutorial.NOT_TESTED} REASON"
    assert block.commands, f"{block}: no command"
    for command in block.commands:
        parsed = subprocess.run(["bash", "-n", "-c", command.text], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr
        if command.text.startswith("retinaserve "):
            check_options(shlex.split(command.text, comments=True)[1:])


def check_options(words: list[str]) -> None:
    """That a command has the options it is shown with."""
    names = words[:2] if words[0] in ("data", "keys", "study") else words[:1]
    shown = CliRunner().invoke(retinaserve, [*names, "--help"])
    assert shown.exit_code == 0, shown.output
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in shown.output, f"{' '.join(names)}: {option}"


def test_triton_page_names_existing_settings() -> None:
    text = (DOCS / "tutorials" / "from-triton.md").read_text()
    rows = re.findall(r"^\| `.* \| (.*) \|$", text, flags=re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", row)}
    assert len(names) > 10
    assert names <= {name.upper() for name in Settings.model_fields}


# --- the runner itself ---------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(tutorial, "ROOT", tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "page.md"
        path.write_text(f"# Page\n\n```console\n{text}\n```\n")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("$ true\n$ echo said; false\n$ true", r"page.md:5: echo said; false\n1\n\['said"),
        ("$ echo one\ntwo", r"page.md:4: echo one\nthe page says:\ntwo\nit printed:\none"),
        ("$ sleep 60", "no end within 2"),
        ("# not tested: why not\n$ true", "nothing to run"),
        ("output", "stands before any command"),
    ],
)
def test_tutorial_runner_reports_faults(
    page: Callable[[str], Path], tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        tutorial.run(page(text), tmp_path, seconds=2)


def test_tutorial_runner_uses_one_shell(page: Callable[[str], Path], tmp_path: Path) -> None:
    path = page(
        "$ mkdir inner; cd inner; word=here\n"
        "$ cat > port.txt <<'END'\n> localhost:8000\n>\n> END\n"
        "$ python -c 'import time; time.sleep(600)' &\n"
        "$ echo $word \\\n    and there\nhere …\n"
        "$ cat port.txt\nlocalhost:8000\n"
        "$ test $(cat port.txt) != localhost:80''00"
    )
    tutorial.run(path, tmp_path, seconds=10)
    assert (tmp_path / "inner" / "port.txt").read_text().startswith("localhost:")
