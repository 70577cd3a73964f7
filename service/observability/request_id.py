"""The id of a request, in its log lines and its errors."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from typing import Final

_VALID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="-")
"""Id of the current task's request."""


def valid_or_new(given: object) -> str:
    """Return the id that a client gave, or a new one in place of an invalid one."""
    if isinstance(given, str) and _VALID.fullmatch(given):
        return given
    # Unique, but not a secret: no system call is needed.
    return f"{random.getrandbits(128):032x}"
