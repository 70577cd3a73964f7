"""GET /: the page to drop an image on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_HEADERS: Final = {
    # Browsers revalidate each file, so that a page never runs an old script.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}


class PageFiles(StaticFiles):
    """The page's scripts, styles and images."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Return a file with the page's headers."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_routes(app: FastAPI) -> None:
    """Add the page and its files to an application."""
    folder = Path(str(files("service"))) / "static"

    async def page() -> FileResponse:
        return FileResponse(folder / "index.html", headers=_HEADERS)

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", PageFiles(directory=folder), name="static")
