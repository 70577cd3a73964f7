"""Runs the commands of a page of docs/ as a reader would: in order, in one shell, in one folder.

A page shows commands in blocks of the language `console`. `$ ` begins a command, `> ` goes on with
it, and so does the line behind a backslash. Every other line is what the command prints on stdout,
where `…` stands for anything and white space does not count; a command that shows nothing is not
compared. A block whose first line is `# not tested: REASON` is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.e2e.browser import ROOT, free_port

PATIENCE: Final = 400.0
"""Seconds for a page; generous, since the machine may be busy with something else."""

NOT_TESTED: Final = "# not tested:"
_MARK: Final = "\x1e"
_BLOCK: Final = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT: Final = re.compile(r"(?<![\d.])80[01]\d(?!\d)")
"""Ports of servers on a page: 8000 is HTTP, others are whatever the page says."""

# Whatever was started with & is told to stop, and the shell waits until it has.
_ON_EXIT: Final = (
    "trap 'status=$?; set +e; started=$(jobs -p); "
    '[ -z "$started" ] || kill $started; wait; exit $status\' EXIT'
)


@dataclass
class Command:
    """One command of a page and what the page says it prints."""

    line: int
    text: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """One block of commands."""

    page: Path
    line: int
    commands: tuple[Command, ...]
    not_tested: str | None
    """Why it is not run."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        lines = match[1].splitlines()
        reason = None
        if lines and lines[0].startswith(NOT_TESTED):
            reason = lines[0].removeprefix(NOT_TESTED).strip()
            lines[0] = ""
        found.append(Block(page, line, tuple(_commands(lines, line + 1)), reason))
    return found


def _commands(lines: list[str], first: int) -> list[Command]:
    commands: list[Command] = []
    for number, text in enumerate(lines, first):
        if text.startswith("$ "):
            commands.append(Command(number, text.removeprefix("$ ")))
        elif not commands:
            assert not text, f"line {number}: {text!r} stands before any command"
        elif text.startswith("> ") or text == ">" or commands[-1].text.endswith("\\"):
            assert not commands[-1].shown, f"line {number}: goes on behind output"
            commands[-1].text += "\n" + text.removeprefix(">").removeprefix(" ")
        else:
            commands[-1].shown.append(text)
    return commands


def agrees(shown: str, printed: str) -> bool:
    """Whether `printed` is what the page shows.

    >>> agrees("a  …\\nz", "a b\\nc z\\n"), agrees("a", "a b")
    (True, False)
    """
    parts = shown.split("…")
    pattern = ".*".join(r"\s*".join(map(re.escape, [*part.split(), ""])) for part in parts)
    return re.fullmatch(r"\s*" + pattern + r"\s*", printed, re.DOTALL) is not None


def run(page: Path, folder: Path, *, seconds: float = PATIENCE) -> None:
    """Run what a page has to run in `folder`; raises AssertionError with the page's lines.

    The page's ports become free ones; servers that it leaves behind are stopped.
    """
    commands = [each for block in blocks(page) if not block.not_tested for each in block.commands]
    assert commands, f"{page}: nothing to run"
    ports = {port: str(free_port()) for each in commands for port in _PORT.findall(each.text)}
    ports.setdefault("8000", str(free_port()))
    status, outputs, complaints = _execute(commands, folder, ports=ports, seconds=seconds)
    name = page.relative_to(ROOT)
    last = commands[max(0, len(outputs) - 1)]
    assert status == 0, f"{name}:{last.line}: {last.text}\n{status}\n{outputs[-1:]}\n{complaints}"
    wrong = [
        f"{name}:{each.line}: {each.text}\nthe page says:\n{shown}\nit printed:\n{output}"
        for each, output in zip(commands, outputs, strict=True)
        if (shown := "\n".join(each.shown).strip()) and not agrees(shown, output)
    ]
    assert not wrong, "\n\n".join(wrong)


def _execute(
    commands: list[Command], folder: Path, *, ports: Mapping[str, str], seconds: float
) -> tuple[int | str, list[str], str]:
    """Exit status (or what became of it), stdout of every command that began, all of stderr."""
    script = [_ON_EXIT, "set -e"]
    for each in commands:
        script += [f"printf '{_MARK}'", _PORT.sub(lambda match: ports[match[0]], each.text)]
    printed, complaints = folder / ".printed", folder / ".complaints"
    with printed.open("w") as out, complaints.open("w") as err:
        shell = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=folder, env=_environment(ports["8000"]), stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | str = shell.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"no end within {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    back = {mine: theirs for theirs, mine in ports.items()}
    mine = re.compile(rf"(?<!\d)({'|'.join(back)})(?!\d)")
    text = mine.sub(lambda match: back[match[0]], printed.read_text())
    return status, text.split(_MARK)[1:], complaints.read_text()[-4000:]


def _environment(port: str) -> Mapping[str, str]:
    """This interpreter's commands first; no measuring of coverage, which other tests do."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COVERAGE_", "COV_", "RETINASERVE_"))
    }
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "RETINASERVE_DEVICE": "cpu",
        "RETINASERVE_PORT": port,
    }
