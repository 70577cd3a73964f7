"""The allocator's settings for the memory of images and of activations in training.

glibc gives a freed image back to the kernel, and the next one pays for getting it again page by
page, which costs a third of what decoding does. Kept, the same few megabytes serve every image.
For activations it is a fifth of a training step on CPUs.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_THRESHOLD: Final = -3
_MMAP_MAX: Final = -4
"""Numbers of glibc's <malloc.h>."""
_LARGEST_KEPT: Final = 4 << 20
"""Larger blocks go back to the kernel at once: they are rare, JPEGs being scaled as they are read,
and what they cost to fetch is little beside what they cost to fill."""
_KEPT: Final = 16 << 20
"""Bytes that each of the allocator's arenas may keep free at its end: all that an image takes on
its way to the canvas, several times over."""
_IMAGES: Final = {_MMAP_THRESHOLD: _LARGEST_KEPT, _TRIM_THRESHOLD: _KEPT}
_ACTIVATIONS: Final = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
"""A step's tensors of hundreds of megabytes come again in the next: all stay in the heap."""


def keep_freed_memory(*, activations: bool = False) -> bool:
    """Make the allocator keep freed memory of images or `activations`. Call it from commands only.

    Return False if it was not done: not glibc, or settings in the environment.
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = _ACTIVATIONS if activations else _IMAGES
    return all(mallopt(parameter, value) for parameter, value in settings.items())
