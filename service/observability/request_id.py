"""The id that ties a request, its log lines and its errors together."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from typing import Final

ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""What a client may call its request; anything else is replaced."""

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="-")
"""Id of the request that the current task works for."""


def new_id() -> str:
    """For a request whose client has given none that may be repeated."""
    # Not a secret, only one of its kind: the kernel need not be asked for each.
    return f"{random.getrandbits(128):032x}"
