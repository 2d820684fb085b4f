"""Mirrors for tests: a web server that answers ranges (or misbehaves), and an S3-compatible server."""

from __future__ import annotations

import http.server
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_S = 60.0
SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

Spoil = Callable[[bytes], bytes]


@dataclass
class WebMirror:
    """What a server was asked for, and how it misbehaves: ``spoil`` changes bodies, ``status`` replaces 206.

    ``passwords``: what it was sent to prove who asks; ``sends_on_to``: another server, to which it redirects.
    """

    url: str = ""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    sent_bytes: int = 0
    spoil: Spoil = lambda data: data
    status: int = 206
    bytes_per_s: float | None = None
    passwords: list[str] = field(default_factory=list)
    sends_on_to: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def web_mirror(folder: Path) -> Iterator[WebMirror]:
    """Serve ``folder`` on localhost."""
    mirror = WebMirror()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, folder, mirror)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    mirror.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: http.server.BaseHTTPRequestHandler, folder: Path, mirror: WebMirror) -> None:
    path = folder / handler.path.lstrip("/")
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if "Authorization" in handler.headers:
        mirror.passwords.append(handler.headers["Authorization"])
    if mirror.sends_on_to:
        handler.send_response(302)
        handler.send_header("Location", mirror.sends_on_to + handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    if not path.is_file():
        handler.send_error(404)
        return
    raw = path.read_bytes()
    first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(raw) - 1)
    with mirror.lock:
        mirror.ranges.append((handler.path, first, last))
    if first >= len(raw):
        handler.send_error(416)
        return
    body = mirror.spoil(raw[first : last + 1] if mirror.status == 206 else raw)
    handler.send_response(mirror.status if asked else 200)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(raw)}")
    handler.end_headers()
    try:
        for start in range(0, len(body), 1 << 14):
            piece = body[start : start + (1 << 14)]
            handler.wfile.write(piece)
            with mirror.lock:
                mirror.sent_bytes += len(piece)
            if mirror.bytes_per_s is not None:
                time.sleep(len(piece) / mirror.bytes_per_s)
    except ConnectionError:
        handler.close_connection = True


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3-compatible server with nothing in it; its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait(endpoint, process)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def _wait(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(endpoint, timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
