"""README and docs: their settings, commands, paths and links are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner

from service.cli import retinaserve
from service.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = ROOT / "README.md"
SETTINGS: Final = ROOT / "docs" / "settings.md"
PAGES: Final = [
    README,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "service" / "models").rglob("*.md")),
]
GROUPS: Final = ("data", "keys", "study")
"""Commands that have commands of their own."""

LINK: Final = re.compile(r"\]\(([^()\s]+)\)")
CODE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND: Final = re.compile(r"^\$ (retinaserve .*(?:\\\n.*)*)$", re.MULTILINE)
SOURCE: Final = re.compile(
    r"`((?:service|model_export|tests|benchmarks|deploy|docs)/[\w./-]+\.\w+)`"
    r"|`((?:api|e2e|reliability|unit)/[\w/]+\.py)"
)
"""A file in backticks. Those of the second kind are below tests/."""


def setting_rows(page: Path) -> dict[str, tuple[str, str]]:
    """Default and meaning of each setting in the tables of a page."""
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| ([^|]*?) \| (.*) \|$", page.read_text(), re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in rows}


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_settings_page_lists_every_setting() -> None:
    assert setting_rows(SETTINGS).keys() == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_settings_page_has_the_default_of_the_code(name: str) -> None:
    default = Settings.model_fields[name].default
    written, _ = setting_rows(SETTINGS)[name.upper()]
    if isinstance(default, bool | int | float | str):
        assert written == f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    else:
        assert "`" not in written, "a computed default is described in words"


def test_readme_settings_are_rows_of_the_settings_page() -> None:
    rows = setting_rows(README)
    assert rows
    assert rows.items() <= setting_rows(SETTINGS).items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    for command in COMMAND.findall(page.read_text()):
        words = command.partition("|")[0].split()
        names = words[1:3] if words[1] in GROUPS else words[1:2]
        shown = CliRunner().invoke(retinaserve, [*names, "--help"])
        assert shown.exit_code == 0, f"{command}\n{shown.output}"
        assert "\\b" not in shown.output, "click's mark of a paragraph that stays as it is"
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    links = [link for link in LINK.findall(CODE.sub("", page.read_text())) if "://" not in link]
    for link in links:
        target, _, fragment = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not fragment or fragment in anchors(file), link


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_named_source_files_exist(page: Path) -> None:
    for path, test in SOURCE.findall(page.read_text()):
        assert (ROOT / path if path else ROOT / "tests" / test).exists(), path or test
