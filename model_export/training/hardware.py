"""Hardware of a run: devices, precision, compiler, loader workers."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, Final

import torch

from service.errors import DataError, DeviceError

_DEVICE: Final = re.compile(r"cpu|cuda(?::(\d+))?")

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
