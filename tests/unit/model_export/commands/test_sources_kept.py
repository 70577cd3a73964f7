"""Commands that write never replace a file that they read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import retinaserve


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ("data check cells --json cells/smear-001.xml", "cells/smear-001.xml"),
        ("data check cells --config my.yaml --json my.yaml", "my.yaml"),
        ("evaluate m.onnx --data cells --json m.onnx", "m.onnx"),
        ("evaluate m.onnx --data cells --report cells/smear-001.jpg", "cells/smear-001.jpg"),
        ("evaluate m.onnx --data cells --against n.onnx --report n.onnx", "n.onnx"),
        ("export w.safetensors --output w.safetensors", "w.safetensors"),
        ("export w.safetensors --output x.onnx --save-weights link.safetensors", "link"),
        ("export w.safetensors --data cells --output cells/smear-002.xml", "cells/smear-002.xml"),
        ("import-torchvision w.pth --output w.pth", "w.pth"),
        ("import-torchvision w.pth --labels names.txt --output names.txt", "names.txt"),
        ("train --data cells --config run/config.yaml --output run", "run/config.yaml"),
        ("train --data cells --init run/best.ckpt --output run", "run/best.ckpt"),
        ("train --data cells --output cells", "cells/config.yaml"),
    ],
)
def test_output_that_is_an_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    drawn = run(retinaserve, ["data", "sample", "cells", "--pictures", "2", "--size", "96x64"])
    assert drawn.exit_code == 0
    for name in ("m.onnx", "n.onnx", "w.safetensors", "w.pth", "names.txt"):
        Path(name).write_text("RBC\n")
    for name in ("my.yaml", "run/config.yaml", "run/best.ckpt", "cells/config.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("epochs: 1\n")
    Path("link.safetensors").symlink_to("w.safetensors")
    before = digests(tmp_path)
    result = run(retinaserve, arguments.split())
    assert result.exit_code == 2, result.output
    assert f"retinaserve: error: {target}" in result.stderr
    assert "would replace" in result.stderr
    assert digests(tmp_path) == before
