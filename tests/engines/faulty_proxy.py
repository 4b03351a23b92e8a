"""A server in front of a real engine that passes everything on, but for the faults that a test asks for."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PASS, REFUSE, CUT, HANG = "pass", "answer 500", "cut the connection", "never answer"


class FaultyProxy:
    """Listens on a port of its own.

    Attributes:
        url: to use in place of the engine's.
        fault: what to do with the n-th generation (from 0); may be changed at any time.
        generations: asked for so far.
        answers: status and body of what is not passed on, by path.
        delivered: replies with a whole response that were passed on, also to those who had hung up.
    """

    def __init__(self, engine_url: str, fault: Callable[[int], str] = lambda n: PASS):
        self.fault, self.generations, self.delivered = fault, 0, []
        self.answers: dict[str, tuple[int, bytes]] = {}
        self._target = urlsplit(engine_url)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._handle(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        what = PASS
        if request.path == "/generate":
            with self._lock:
                what = self.fault(self.generations)
                self.generations += 1
        if what == HANG:
            self._closing.wait(120)
        if what in (HANG, CUT):
            request.close_connection = True
            return
        if what == REFUSE:
            status, content = 500, b'{"error": "injected"}'
        else:
            status, content = self.answers.get(request.path) or self._forward(request, body)
        if request.path == "/generate" and status == 200 and b'"type":"abort"' not in content:
            self.delivered.append(content)
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._target.hostname, self._target.port, timeout=300)
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
