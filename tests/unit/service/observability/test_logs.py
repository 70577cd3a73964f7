"""Log lines: what they hold, and that nothing in them can forge another."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.observability import logs
from service.observability.logs import JsonFormatter, LogHandler, TextFormatter
from service.observability.record import Record, current

KEY = "rs_" + "aB3-_" * 9
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
NASTY = "\r\n\x1b]0;owned\x07\x9b31m\u2028\u202e\x7f 2026-01-01T00:00:00.000Z CRITICAL [-] forged"


def record(message: str, *values: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("retinaserve.test", logging.INFO, "f", 1, message, values, None)
    made.fields = fields
    return made


def text(made: logging.LogRecord) -> str:
    return TextFormatter().format(made)


def parsed(made: logging.LogRecord) -> dict[str, object]:
    line = JsonFormatter().format(made)
    assert "\n" not in line
    document: dict[str, object] = json.loads(line)
    return document


@given(st.text(), st.text())
@example(NASTY, NASTY)
def test_log_record_is_one_line(said: str, value: str) -> None:
    made = record("%s", said, field=value)
    line = text(made)
    assert re.fullmatch(STAMP + r" INFO     \[-\] .*", line)
    assert len(line.splitlines()) == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]", line)
    written = JsonFormatter().format(made)
    assert len(written.splitlines()) == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]", written)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example(NASTY)
def test_json_log_keeps_the_message(said: str) -> None:
    document = parsed(record("%s", said, field=said))
    assert (document["message"], document["field"]) == (said, said)


def test_log_traceback_is_indented() -> None:
    made = record("it failed")
    try:
        raise ValueError(NASTY)
    except ValueError:
        made.exc_info = sys.exc_info()
    first, *rest = text(made).splitlines()
    assert first.endswith("it failed")
    assert rest
    assert all(line.startswith("  | ") for line in rest)
    assert any("forged" in line for line in rest)
    document = parsed(made)
    assert str(document["exception"]).startswith("Traceback")


def test_text_log_values_are_unambiguous() -> None:
    line = text(record("done", model="cells", note='a b="c"', count=3, ratio=0.5, nothing=""))
    assert line.endswith("""done model=cells note='a b="c"' count=3 ratio=0.5 nothing=''""")


def test_log_hides_keys() -> None:
    made = record("GET /%s", KEY, path=f"/{KEY}")
    for line in (text(made), JsonFormatter().format(made)):
        assert KEY not in line
        assert "[key]" in line


def test_log_fields_are_the_same_for_all_loggers() -> None:
    made = logging.LogRecord("uvicorn.error", logging.WARNING, "f", 1, "%d bad", (3,), None)
    document = parsed(made)
    assert set(document) == {"time", "level", "logger", "request_id", "message"}
    assert (document["level"], document["logger"]) == ("warning", "uvicorn.error")
    assert document["message"] == "3 bad"
    assert re.fullmatch(STAMP, str(document["time"]))


def test_log_lines_of_traced_requests_have_the_trace_id() -> None:
    request = Record("job-1")
    request.trace_id, request.span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    token = current.set(request)
    try:
        document = parsed(record("within"))
    finally:
        current.reset(token)
    assert document["trace_id"] == request.trace_id
    assert document["span_id"] == request.span_id
    assert "trace_id" not in parsed(record("outside"))


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_log_survives_unwritable_values(formatter: logging.Formatter) -> None:
    line = formatter.format(record("odd", thing=object(), bad="\ud800"))
    assert "odd" in line
    line.encode()


def lines_of(reading: int, count: int) -> list[str]:
    with os.fdopen(reading, encoding="utf-8", closefd=False) as stream:
        return [stream.readline().rstrip("\n") for _ in range(count)]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that holds one page: what to read, and what to write."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    for each in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(each)


def test_log_drops_and_counts_lines_when_full(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_MAX_LINES", 10)
    monkeypatch.setattr(logs, "_CLOSE_SECONDS", 0.05)
    reading, writing = pipe
    handler = LogHandler(writing)
    handler.setFormatter(JsonFormatter())
    # Larger than the pipe: it is being written, and the next ones wait.
    handler.emit(record("x" * 10_000))
    while handler._writer._lines.qsize():
        time.sleep(0.001)
    for number in range(25):
        handler.emit(record("line %d", number))
    got = [json.loads(each) for each in lines_of(reading, 12)]
    assert [each["message"] for each in got[1:-1]] == [f"line {number}" for number in range(10)]
    assert got[-1]["message"] == "15 log lines were dropped: stderr was not read"
    assert got[-1]["level"] == "warning"
    handler.emit(record("the next"))
    handler.close()
    assert "the next" in lines_of(reading, 1)[0]
    assert not handler._writer._thread.is_alive()  # type: ignore[union-attr]


def test_log_close_does_not_wait_for_a_blocked_reader(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_CLOSE_SECONDS", 0.05)
    reading, writing = pipe
    handler = LogHandler(writing)
    handler.emit(record("%s", "x" * 10_000))
    handler.close()
    assert handler._writer._thread.is_alive()  # type: ignore[union-attr]
    assert len(lines_of(reading, 1)[0]) == 10_000, "read late, it is whole"
    handler.close()


def test_log_writer_works_after_close(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    handler = LogHandler(writing)
    for number in range(2):
        handler.emit(record("line %d", number))
        handler.close()
    assert lines_of(reading, 2) == ["line 0", "line 1"]


def test_log_loses_nothing_on_non_blocking_stderr(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    handler = LogHandler(writing)
    for number in range(100):
        handler.emit(record("%0100d", number))
    assert [int(each) for each in lines_of(reading, 100)] == list(range(100))
    handler.close()


def test_log_ignores_broken_stderr(
    pipe: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = pipe
    os.close(reading)
    handler = LogHandler(writing)
    handler.emit(record("to a reader that is gone"))
    handler.close()
    os.close(writing)
    handler.emit(record("to nothing"))
    handler.close()
    assert capfd.readouterr() == ("", "")


def test_log_reports_unformattable_records(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    handler = LogHandler(writing)
    handler.emit(record("%d", "no number"))
    assert "TypeError" in lines_of(reading, 1)[0]
    handler.close()
