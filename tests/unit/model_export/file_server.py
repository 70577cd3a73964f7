"""An HTTP server of one file that behaves as servers of large files do, well or badly."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class File:
    """What the server answers with; a test may change it between two requests."""

    body: bytes
    etag: str | None = None
    ranges: bool = True
    """Whether it honours Range and If-Range."""
    kind: str = "application/octet-stream"
    announced: int | None = None
    """Content-Length, where it is not the body's."""
    cut: int | None = None
    """Bytes of a response after which the connection ends."""
    stall: bool = False
    """Whether it stops there, with the connection open, instead."""
    chunked: bool = False
    status: int = 200
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Target and headers of each request."""


@contextmanager
def serving(file: File) -> Iterator[str]:
    """Serve a file under every path; yields the URL of the root."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file.requests.append((self.path, dict(self.headers)))
            body, status = file.body, file.status
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if start and file.ranges and self.headers.get("If-Range", file.etag) == file.etag:
                status = 206 if int(start[1]) < len(body) else 416
                body = body[int(start[1]) :]
            self.send_response(status)
            self.send_header("Content-Type", file.kind)
            if file.etag is not None:
                self.send_header("ETag", file.etag)
            sent = body[: file.cut]
            if file.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                sent = b"%x\r\n%s\r\n" % (len(sent), sent) + (b"" if file.cut else b"0\r\n\r\n")
            else:
                length = len(body) if file.announced is None else file.announced
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(sent)
            if file.stall:
                self.wfile.flush()
                over.wait(30)

        def log_message(self, *arguments: Any) -> None:
            """Tests are quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
