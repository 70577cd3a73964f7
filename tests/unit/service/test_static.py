"""The page's files: what can be said of them without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import service
from service.engine.drawing import class_colour

STATIC = Path(service.__file__).with_name("static")


class Links(HTMLParser):
    """Every address in a page, and whatever a strict content policy would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src"):
                self.addresses.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.inline.append(tag)


@pytest.fixture(scope="module")
def links() -> Links:
    parser = Links()
    parser.feed((STATIC / "index.html").read_text(encoding="utf-8"))
    return parser


def test_page_addresses_are_relative(links: Links) -> None:
    assert links.addresses
    absolute = [address for address in links.addresses if re.match(r"/|\w+:", address)]
    assert absolute == []


def test_page_files_exist(links: Links) -> None:
    files = [address for address in links.addresses if address.startswith("static/")]
    modules = {
        match
        for script in STATIC.glob("*.js")
        for match in re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))
    }
    for name in [*files, *(f"static/{module}" for module in modules)]:
        assert (STATIC.parent / name).is_file(), name


def test_page_has_no_inline_code(links: Links) -> None:
    assert links.inline == []


def test_page_scripts_use_relative_addresses() -> None:
    for script in STATIC.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert re.findall(r"""(?:fetch|call|new URL)\(\s*["'`](?:/|https?:)""", text) == []


def test_page_and_drawn_images_share_colours() -> None:
    script = (STATIC / "drawing.js").read_text(encoding="utf-8")
    match = re.search(r"PALETTE = \[([^\]]+)\]", script)
    assert match is not None
    palette = re.findall(r"#([0-9a-f]{6})", match[1])
    assert len(palette) >= 7
    assert [bytes(class_colour(index)).hex() for index in range(len(palette))] == palette
    # White text on them: the contrast that WCAG asks of bold text.
    assert all(_contrast_with_white(class_colour(index)) >= 4.0 for index in range(40))


def _contrast_with_white(colour: tuple[int, int, int]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (part / 255 for part in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05)
