"""The web page at /: files of one folder, which load nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse

PAGE = Path(__file__).parent / "page"

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, folder: Path = PAGE) -> bool:
    """Serve index.html at / and the scripts and styles beside it under their names. False where there is none."""
    if not (folder / "index.html").is_file():
        return False
    for path in sorted(folder.iterdir()):
        if path.suffix in TYPES:
            _add(app, "/" if path.name == "index.html" else f"/{path.name}", path)
    return True


def _add(app: FastAPI, address: str, path: Path) -> None:
    def send() -> FileResponse:
        return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)

    app.add_api_route(address, send, methods=["GET"], include_in_schema=False)
