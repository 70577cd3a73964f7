"""Memory of a training process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from model_export.training.hardware import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
# glibc finds an aligned place anew a few times before one fits all.
for _ in range(30):
    torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the call is glibc's")
def test_freed_activations_are_used_again_without_new_pages() -> None:
    """Ten tensors of 64 MB: 16,384 pages each, if the kernel has to bring them anew."""
    counts = {
        way: int(subprocess.check_output([sys.executable, "-c", _FAULTS, way], text=True))
        for way in ("keep", "return")
    }
    assert counts["keep"] < 1000 < 100_000 < counts["return"]
