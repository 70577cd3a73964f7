"""The id of a request, in its log lines and its errors."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from typing import Final

ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""A valid id from a client; any other is replaced."""

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="-")
"""Id of the current task's request."""


def new_id() -> str:
    """Return an id for a request without a valid one."""
    # Unique, but not a secret: no system call is needed.
    return f"{random.getrandbits(128):032x}"
