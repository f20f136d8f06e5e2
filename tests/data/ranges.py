"""A server of files that answers ranges, as stores do; the standard library's gives whole files only."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server: Any = self.server
        if server.is_over:  # a connection that was kept alive outlives the server
            self.close_connection = True
            return
        path: Path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            begin, end = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            server.ranges.append((path.name, begin, end))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}")
            body = content[begin:end]
        else:
            self.send_response(200)
            body = content
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """The URL of a folder, and the ranges that are asked for: name, begin, end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.folder, ranges = folder, list[tuple[str, int, int]]()  # type: ignore[attr-defined]
        server.ranges, server.is_over = ranges, False  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", ranges
        finally:
            server.is_over = True  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()
