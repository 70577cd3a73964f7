"""The number of CPUs that this process may use, and their vector width."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def cpu_count(root: Path = Path("/")) -> int:
    """Return the number of CPUs this process may use, by affinity and the container's quota."""
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = min(_quotas(root), default=math.inf)
    # Rounded down: a thread beyond the quota makes the kernel stop all of them for the rest of
    # each period.
    return max(1, int(min(affinity, quota)))


def has_wide_vectors(root: Path = Path("/")) -> bool:
    """Return whether vectors are, or may be, wider than 256 bits: only Linux tells."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        known = (root / "proc/cpuinfo").read_text()
    except OSError:
        return True
    flags = next((line for line in known.splitlines() if line.startswith("flags")), "avx512f")
    return "avx512f" in flags.split()


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of this process's control groups and their parents, v1 and v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            for folder in _upwards(mount, group):
                yield from _quota(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for folder in _upwards(mount / controllers, group):
                yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
            if controllers != "cpu":
                for folder in _upwards(mount / "cpu", group):
                    yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """Yield a group's folder and its parents. In a container the mount itself is the group."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota(*paths: Path) -> Iterator[float]:
    try:
        words = " ".join(path.read_text() for path in paths).split()
        quota, period = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):
        # No such group, no limit ("max"), or not readable.
        return
    if quota > 0 and period > 0:
        yield quota / period
