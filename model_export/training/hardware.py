"""Hardware of a run: devices, precision, compiler, loader workers."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
from typing import Any, Final

import torch

from service.errors import DataError, DeviceError

_DEVICE: Final = re.compile(r"cpu|cuda(?::(\d+))?")

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX. Nothing is mapped by itself, and the heap's
# end stays.
_MALLOPT: Final = {-1: 2**31 - 1, -2: 64 << 20, -4: 0}

_log = logging.getLogger(__name__)


def accelerator_for(device: str, count: int) -> tuple[str, int | list[int]]:
    """Return Lightning's accelerator and the devices of `count` processes on this machine.

    Raises DeviceError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = _DEVICE.fullmatch(device)
    if known is None:
        raise DeviceError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return "cpu", count
    if known[1] is not None and count > 1:
        raise DeviceError(f"--device {device} is one GPU, but {count} processes want one each")
    found = torch.cuda.device_count()
    first = int(known[1] or 0)
    if first + count > found:
        seen = "no CUDA device" if found == 0 else f"{found} CUDA device(s)"
        wanted = "" if count == 1 else f" for {count} processes"
        raise DeviceError(
            f"--device {device}{wanted}: this torch sees {seen}; use --device cpu or auto"
        )
    return "cuda", list(range(first, first + count))


def precision_for(asked: str, accelerator: str) -> Any:
    """Return Lightning's name of a precision. Raises DataError if the device lacks it."""
    if asked == "fp16" and accelerator == "cpu":
        raise DataError("precision fp16 needs a GPU; on a CPU use bf16, 32 or auto")
    if asked == "auto":
        if accelerator == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        asked = "bf16" if fast else "32"
    return {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[asked]


def workers_for(asked: int | None, accelerator: str, processes: int) -> int:
    """Return the number of loader workers for each of `processes` on this machine."""
    if asked is not None:
        return asked
    return 0 if accelerator == "cpu" else min(8, max(1, (os.cpu_count() or 1) // processes))


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed for the next allocation, in this process.

    Otherwise it returns every large activation to the kernel, and a fifth of a step on CPUs is
    spent on fetching its pages again. Its environment variables do not reach above 32 MB. Other
    C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def compiler_works(accelerator: str) -> bool:
    """Return whether torch.compile works here; log a warning if not."""
    try:
        torch.compile(torch.add)(torch.ones(8, device=accelerator), 1)
    except Exception as error:
        # Without a compiler or with a broken one, anything may come.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _log.warning("torch.compile does not work here (%s); training continues without it", reason)
        return False
    return True
