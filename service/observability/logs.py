"""Log lines: one event a line, as text or JSON, which no value in it can forge.

Every logger of the process, uvicorn's too, passes through the same structlog processors. They are
part of the handler, so an application that embeds the service keeps its own logging.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import threading
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from service.observability.record import current
from service.observability.request_id import request_id

_BEYOND_ASCII: Final = "\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
_CONTROL: Final = re.compile(f"[\x00-\x1f{_BEYOND_ASCII}\ud800-\udfff]")
"""Characters that move the cursor, end a line, change the text direction or cannot be encoded."""
_JSON_CONTROL: Final = re.compile(f"[{_BEYOND_ASCII}]")
"""Those of them that JSON does not escape."""
_KEY: Final = re.compile(r"rs_[A-Za-z0-9_-]{40,}")
"""An API key, which a client may have put into a path by mistake."""
_QUOTED: Final = re.compile(r'[\s"=]|^$')
_OWN: Final = frozenset({"time", "level", "logger", "request_id", "message", "exception"})
_IN_MESSAGE: Final = frozenset({"method", "path", "route", "status", "milliseconds"})
"""Fields that the message of a request contains."""
STDERR: Final = 2
_MAX_LINES: Final = 4096
"""Lines that wait for the reader of stderr, some MB. More are dropped."""
_CLOSE_SECONDS: Final = 1.0
"""How long the process waits at its end for a reader that reads no line."""


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
    """Lines of text. The lines of a traceback are indented, as no event is."""

    def __init__(self) -> None:
        super().__init__(_text)


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def __init__(self) -> None:
        super().__init__(_json)


class LineWriter:
    """Writes lines to a file descriptor in its own thread. Thread-safe.

    A pipe that is not read, or a stopped terminal, blocks writes without end. Above 4096 waiting
    lines new ones are dropped; `notice` returns the line that gives their number, written last.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._notice = notice
        # Reentrant: a line can be logged anywhere, in a destructor too.
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._dropped = self._reported = 0
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Write a line, or drop it. Never blocks."""
        if self._lines.qsize() >= _MAX_LINES:
            self._dropped += 1
            return
        self._lines.put(line)
        # A forked process has no thread.
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Return once all lines are written, or none was within a second."""
        thread, before = self._thread, -1
        if thread is None:
            return
        self._lines.put(None)
        while thread.is_alive() and (waiting := self._lines.qsize()) != before:
            before = waiting
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            if self._lines.empty():
                self._report()
        self._report()

    def _report(self) -> None:
        if dropped := self._dropped - self._reported:
            self._reported += dropped
            self._write(self._notice(dropped))

    def _write(self, line: str) -> None:
        rest = f"{line}\n".encode(errors="backslashreplace")
        while rest:
            try:
                # Not sys.stderr: a thread blocked in it holds a lock that Python needs to exit.
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Another process that shares the pipe has changed its mode.
                select.select([], [self._descriptor], [])
            except OSError:
                # The reader has closed the pipe, or the disk is full.
                return


class LogHandler(logging.Handler):
    """Passes lines to a LineWriter, so that serving never waits for a reader of the log."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._writer = LineWriter(descriptor, self._notice)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            self._writer.write(self.format(record))
        except Exception:
            # `handleError` would write to stderr in this thread.
            self._writer.write(f"a log record is lost: {traceback.format_exc()!r}")

    def close(self) -> None:
        """Wait for the writer; called at the end of the process."""
        self._writer.close()
        super().close()

    def _notice(self, dropped: int) -> str:
        text = "%d log lines were dropped: stderr was not read"
        return self.format(
            logging.LogRecord("retinaserve.log", logging.WARNING, "", 0, text, (dropped,), None)
        )


def configure_logging(log_format: str, level: str) -> None:
    """Log to stderr. Called by commands, not by the application factory."""
    handler = LogHandler(STDERR)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    for chatty in ("uvicorn", "python_multipart", "PIL", "opentelemetry", "urllib3", "grpc"):
        # uvicorn logs start and stop, which the command does in one line.
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.root.level))


def _gather(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Return the fields of every line, then the record's own."""
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
        # For example half a surrogate pair, which is not UTF-8.
        text = json.dumps(event, default=str)
    return _KEY.sub("[key]", _JSON_CONTROL.sub(_escape_json, text))


def _text(_: WrappedLogger, __: str, event: EventDict) -> str:
    parts = [
        f"{event['time']} {event['level'].upper():<8} [{event['request_id']}] {event['message']}"
    ]
    said = _OWN | _IN_MESSAGE if "route" in event else _OWN
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
