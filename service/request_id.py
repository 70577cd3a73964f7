"""The id that ties a request, its log lines and its errors together."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="-")
"""Id of the request that the current task works for."""
