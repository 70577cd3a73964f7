"""What the README says of names and defaults is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import retinaserve
from service.settings import Settings

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def setting_rows() -> dict[str, str]:
    section = README.partition("## Settings")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([A-Z0-9_]+)` \| ([^|]*?) \|", section, flags=re.MULTILINE))


def test_every_setting_is_in_the_table() -> None:
    assert setting_rows().keys() == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_defaults_are_those_of_the_code(name: str) -> None:
    default = Settings.model_fields[name].default
    written = setting_rows()[name.upper()]
    if isinstance(default, bool | int | float | str):
        assert written == f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    else:
        assert "`" not in written, "a default that is worked out is described in words"


@pytest.mark.parametrize("line", re.findall(r"^\$ (retinaserve .*)$", README, flags=re.MULTILINE))
def test_commands_have_the_options_that_are_shown(line: str) -> None:
    words = line.split()
    # Groups have their commands behind them.
    names = words[1:3] if words[1] in ("data", "study") else words[1:2]
    shown = CliRunner().invoke(retinaserve, [*names, "--help"])
    assert shown.exit_code == 0, shown.output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output
