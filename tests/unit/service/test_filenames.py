"""File names at the border, and files that no command replaces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.bulk.files import full_name
from service.errors import DataError
from service.filenames import csv_cell, one_line, refuse_to_replace, written

LATIN = os.fsdecode(b"caf\xe9 \\xe9.jpg")


def test_written_name_is_unicode_and_leads_back_to_the_file() -> None:
    assert written("images/日本\n.jpg") == "images/日本\n.jpg"
    assert written(f"/data/{LATIN}") == "file:///data/caf%E9%20%5Cxe9.jpg"
    assert written(LATIN) == f"file://{Path.cwd()}/caf%E9%20%5Cxe9.jpg"
    assert full_name(written(f"/data/{LATIN}")) == f"/data/{LATIN}"


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r", "\n", "'"])
def test_csv_cell_is_no_formula_and_keeps_the_text(begin: str) -> None:
    assert csv_cell(f"{begin}1+1") == f"'{begin}1+1"
    assert csv_cell(f"a{begin}") == f"a{begin}"
    assert csv_cell("") == ""


def test_one_line_escapes_what_does_not_print() -> None:
    assert one_line("é\n\x1b[2J\u202e") == "é\\n\\x1b[2J\\u202e"
    one_line(LATIN).encode()


def test_target_that_is_a_source_is_refused_by_whatever_name(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.jpg"
    source.parent.mkdir()
    source.write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "hard.jpg").hardlink_to(source)
    (tmp_path / "soft.jpg").symlink_to("in/a.jpg")
    (tmp_path / "folder").symlink_to("in")
    names = ("in/a.jpg", "out/../in/a.jpg", "hard.jpg", "soft.jpg", "folder/a.jpg")
    for target in (tmp_path / name for name in names):
        for given in (source, tmp_path):
            with pytest.raises(DataError, match="would replace"):
                refuse_to_replace([tmp_path / "new", target], [given])
    (tmp_path / "out" / "a.jpg").write_bytes(b"")
    refuse_to_replace([tmp_path / "out" / "a.jpg", tmp_path / "in" / "b.jpg"], [source.parent])
