"""Where a model comes from: told without folders of one machine, kept over resumptions."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from model_export.provenance import command, provenance, resumed
from tests.unit.model_export import rectangles
from tests.unit.model_export.voc_folder import load_voc


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["retinaserve", "train", "--data", "cells"], "retinaserve train --data cells"),
        (["/opt/bin/retinaserve", "--data", "/home/me/cells/"], "retinaserve --data cells"),
        (["retinaserve", "--data=/srv/a/cells"], "retinaserve --data=cells"),
        (["retinaserve", "--set", "canvas.sizes=[[64, 96]]"],
         "retinaserve --set 'canvas.sizes=[[64, 96]]'"),
        (["retinaserve", "--licence", "MIT, /below"], "retinaserve --licence 'MIT, /below'"),
        (["retinaserve", "../cells", "runs/a"], "retinaserve ../cells runs/a"),
    ],
)  # fmt: skip
def test_commands(arguments: list[str], line: str) -> None:
    assert command(arguments) == line


def test_a_run_is_told_by_names_and_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_voc(rectangles.draw_data(tmp_path / "cells"), "train")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(
        sys, "argv", ["/usr/bin/retinaserve", "train", "--data", str(tmp_path / "cells")]
    )
    found = provenance(
        config={"epochs": 3}, data=data, weights=weights, init=None, licences=["MIT"]
    )
    assert found["command"] == "retinaserve train --data cells"
    assert found["data"] == {"name": "cells", "pictures": 6}
    assert found["weights"] == {
        "file": "weights.pth",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert found["init"] is None
    assert found["licences"] == ["MIT"]
    assert str(tmp_path) not in str(found)


def test_a_resumed_run_keeps_what_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = {"command": "retinaserve train", "weights": {"file": "w.pth"}, "config": {"epochs": 3}}
    monkeypatch.setattr(sys, "argv", ["retinaserve", "train", "--resume"])
    once = resumed(begun, {"epochs": 5})
    twice = resumed(once, {"epochs": 6})
    assert (twice["command"], twice["weights"]) == ("retinaserve train", {"file": "w.pth"})
    assert twice["config"] == {"epochs": 6}
    assert [each["command"] for each in twice["resumed"]] == ["retinaserve train --resume"] * 2
    assert "resumed" not in begun
