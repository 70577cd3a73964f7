"""The allocator's settings, in processes of their own: they last as long as the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from service.system.memory import keep_freed_memory

activations = sys.argv[1] == "activations"
print(keep_freed_memory(activations=activations))
for size in (80, 200) if activations else (1, 3):
    bytearray(size << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        bytearray(size << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(what: str = "images", **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, what],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
@pytest.mark.parametrize("what", ["images", "activations"])
def test_allocator_keeps_freed(what: str) -> None:
    done, *faults = run(what)
    assert done == "True"
    # Each of the 50 would cost a fault for every 4 KiB.
    assert all(int(each) < 50 for each in faults)


def test_allocator_settings_of_the_user_are_kept() -> None:
    done, *faults = run(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert done == "False"
    assert int(faults[0]) > 50
