"""docs/third-party.md is about what the lock files install, under licences somebody looked at."""

from __future__ import annotations

import re
import zipfile
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from docs import third_party
from tests.unit.test_packaging import ROOT

PAGE = third_party.PAGE.read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition(third_party.BEGIN)[2].partition(third_party.END)[0].splitlines()[3:]
    if line
]


@pytest.mark.parametrize("variant", third_party.VARIANTS)
def test_licence_table_matches_the_lock_files(variant: str) -> None:
    listed = {name: version for name, version, _, images, _ in ROWS if variant in images.split()}
    assert listed == third_party.locked(variant), "run make notices"
    assert len(listed) > 30


def test_licences_are_reviewed() -> None:
    """What is not permissive has a paragraph."""
    found = {name for row in ROWS for name in third_party.names(row[2])}
    assert found <= third_party.JUDGED.keys()
    kinds = {third_party.JUDGED[name] for name in found} - {"permissive"}
    assert kinds == set(re.findall(r"^- \*\*(MPL|NVIDIA)", PAGE, flags=re.MULTILINE))


def test_licences_match_installed_distributions() -> None:
    """As far as this environment has the versions that are locked."""
    here = {(canonicalize_name(d.name), d.version): d.metadata for d in distributions()}
    compared = 0
    for name, version, stated, _, _ in ROWS:
        if (metadata := here.get((canonicalize_name(name), version))) is not None:
            message = Message()
            for field in ("Name", "Version", "License", "License-Expression"):
                if field in metadata:
                    message[field] = metadata[field]
            assert third_party.licence(message) == stated
            compared += 1
    assert compared > 0


def test_distributions_without_licence_text_are_named() -> None:
    section = PAGE.partition(third_party.END)[2].partition("\n## ")[0]
    for name, *_, texts in ROWS:
        assert texts != "none" or name in section


def wheel(folder: Path, name: str, licence: str, *more: str) -> Path:
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1\n{licence}\n"
        file.writestr(f"{name}-1.dist-info/METADATA", text)
        for each in more:
            file.writestr(f"{name}-1.dist-info/licenses/{each}", "text")
    return path


def test_licence_table_of_given_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, pins in (("cpu", "a==1 \\\n  --hash=x\n"), ("gpu", "# all\na==1\nb-c==1 ; y\n")):
        (tmp_path / f"requirements-{variant}.lock").write_text(pins)
    monkeypatch.setattr(third_party, "ROOT", tmp_path)
    one = wheel(tmp_path, "a", "License-Expression: MIT OR Apache-2.0", "LICENSE", "NOTICE.txt")
    two = wheel(tmp_path, "b_c", "License: 3-Clause BSD License")
    assert third_party.table([one, two]).splitlines()[2:] == [
        "| a | 1 | MIT OR Apache-2.0 | cpu gpu | 2 |",
        "| b-c | 1 | BSD-3-Clause | gpu | none |",
    ]
    with pytest.raises(ValueError, match="b-c 1: no wheel"):
        third_party.table([one])
    with pytest.raises(ValueError, match=r"a 1: licence 'GPL-3.0-only'; look at it"):
        third_party.table([wheel(tmp_path, "a", "License-Expression: GPL-3.0-only"), two])
    with pytest.raises(ValueError, match="a 1: licence ''"):
        third_party.table([wheel(tmp_path, "a", "Summary: none"), two])


def test_notices_name_the_repository() -> None:
    assert third_party.ROOT == ROOT
