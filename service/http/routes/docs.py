"""GET /docs: the API's documentation, without files from other hosts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Response
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>retinaserve API</title>
<link rel="icon" href="static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="docs-assets/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs-assets/swagger-ui-bundle.js"></script>
<script src="docs.js"></script>
</body>
</html>
"""
_SCRIPT: Final = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
});
"""
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    # Swagger UI sets inline styles and draws its icons from data: addresses.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}


def add_routes(app: FastAPI) -> None:
    """Add the page to an application whose own documentation pages are disabled."""
    assets = Path(str(files("fastapi_offline"))) / "static"

    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers=_HEADERS)

    async def script() -> Response:
        return Response(_SCRIPT, headers=_HEADERS, media_type="text/javascript")

    app.add_api_route("/docs", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/docs.js", script, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/docs-assets", StaticFiles(directory=assets), name="docs-assets")
