"""onnxruntime's reports to its maker stay off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def files_left_at_home(home: Path, code: str, **variables: str) -> list[str]:
    """Run `code` in a process with an empty home; what it leaves there."""
    # onnxruntime keeps silent by itself where CI is set, which would hide what is tested.
    silencers = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in silencers}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    return [path.name for path in home.rglob("*") if path.is_file()]


def test_onnxruntime_telemetry_is_off(tmp_path: Path) -> None:
    assert files_left_at_home(tmp_path, "import service.runtime.detector") == []


def test_onnxruntime_telemetry_can_be_enabled(tmp_path: Path) -> None:
    code = "import os, service; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    files_left_at_home(tmp_path, code, ORT_DISABLE_TELEMETRY="0")
