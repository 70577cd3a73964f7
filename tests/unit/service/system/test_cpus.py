"""CPU quotas of containers, and the kind of CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from service.system.cpus import cpu_count, has_wide_vectors


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("files", "count"),
    [
        pytest.param({}, 8, id="no control groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, id="v2 max"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3, id="v2"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
            2,
            id="v2, rounded down",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
            1,
            id="v2, less than one",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/kubepods/pod/box\n",
                "sys/fs/cgroup/kubepods/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/kubepods/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/kubepods/pod/box/cpu.max": "max 100000\n",
            },
            2,
            id="v2, limited by a parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            4,
            id="v1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
            id="v1, seen from inside the container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
            id="v1 without limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8, id="nonsense"
        ),
    ],
)
def test_cpu_count_respects_cgroup_limits(
    tmp_path: Path, files: dict[str, str], count: int
) -> None:
    assert cpu_count(write(tmp_path, files)) == count


def test_cpu_count_respects_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}
    assert cpu_count(write(tmp_path, files)) == 1


@pytest.mark.parametrize(
    ("machine", "known", "wide"),
    [
        pytest.param("x86_64", "processor\t: 0\nflags\t\t: fpu avx avx2 fma\n", False, id="avx2"),
        pytest.param("x86_64", "flags\t\t: fpu avx2 avx512f avx512vl\n", True, id="avx512"),
        pytest.param("AMD64", None, True, id="not told"),
        pytest.param("x86_64", "processor\t: 0\n", True, id="no flags"),
        pytest.param("aarch64", "Features\t: fp asimd\n", False, id="arm"),
        pytest.param("arm64", None, False, id="a mac"),
    ],
)
def test_wide_vectors_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, known: str | None, wide: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if known is not None:
        write(tmp_path, {"proc/cpuinfo": known})

    assert has_wide_vectors(tmp_path) == wide
