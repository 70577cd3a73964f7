"""Log lines: one event a line, for people or for machines, and nothing in them can forge another.

Every logger of the process, uvicorn's too, passes through the same structlog processors. They hang
on the handler and are configured nowhere else, so an application that embeds the service keeps its
own logging.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from service.record import current
from service.request_id import request_id

_BEYOND_ASCII: Final = "\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
_CONTROL: Final = re.compile(f"[\x00-\x1f{_BEYOND_ASCII}\ud800-\udfff]")
"""What moves a cursor, ends a line, turns the direction of writing, or cannot be written."""
_JSON_CONTROL: Final = re.compile(f"[{_BEYOND_ASCII}]")
"""The same, of what JSON lets stand as it is."""
_KEY: Final = re.compile(r"rs_[A-Za-z0-9_-]{40,}")
"""An API key, wherever somebody put one by mistake: into a path, say."""
_QUOTED: Final = re.compile(r'[\s"=]|^$')
_OWN: Final = frozenset({"time", "level", "logger", "request_id", "message", "exception"})
_SAID: Final = frozenset({"method", "path", "route", "status", "milliseconds"})
"""Fields that a request's message says already."""


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def __init__(self, render: Callable[[WrappedLogger, str, EventDict], str]) -> None:
        super().__init__(
            processors=[
                _gather,
                structlog.processors.format_exc_info,
                render,
            ],
        )


class TextFormatter(_Formatter):
    """Lines for people. Of a traceback each further line is indented, which no event ever is."""

    def __init__(self) -> None:
        super().__init__(_text)


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def __init__(self) -> None:
        super().__init__(_json)


def configure_logging(log_format: str, level: str) -> None:
    """Send the lines of this process to stderr. For the command line, not for the factory."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    for chatty in ("uvicorn", "python_multipart", "PIL", "opentelemetry", "urllib3", "grpc"):
        # uvicorn reports start and stop, which the command does in one line of its own.
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.root.level))


def _gather(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What every line has, in the order of reading, then the record's own fields."""
    record: logging.LogRecord = event.pop("_record")
    del event["_from_structlog"]
    line: dict[str, Any] = {
        "time": _stamp(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "request_id": str(getattr(record, "request_id", None) or request_id.get()),
        "message": event.pop("event"),
    }
    request = current.get()
    if request is not None and request.trace_id is not None:
        line |= {"trace_id": request.trace_id, "span_id": request.span_id}
    line.update(getattr(record, "fields", {}))
    line.update(event)
    return line


def _json(_: WrappedLogger, __: str, event: EventDict) -> str:
    try:
        text = orjson.dumps(event, default=str).decode()
    except TypeError:
        # Half a surrogate pair, say, which is no UTF-8.
        text = json.dumps(event, default=str)
    return _KEY.sub("[key]", _JSON_CONTROL.sub(_escape_json, text))


def _text(_: WrappedLogger, __: str, event: EventDict) -> str:
    parts = [
        f"{event['time']} {event['level'].upper():<8} [{event['request_id']}] {event['message']}"
    ]
    said = _OWN | _SAID if "route" in event else _OWN
    parts += [f"{name}={_value(value)}" for name, value in event.items() if name not in said]
    text = _CONTROL.sub(_escape, " ".join(parts))
    for line in event.get("exception", "").splitlines():
        text += "\n  | " + _CONTROL.sub(_escape, line)
    return _KEY.sub("[key]", text)


def _value(value: object) -> str:
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return repr(text) if _QUOTED.search(text) else text


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _escape_json(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
