"""Gunicorn's threaded worker, which hangs up on clients that take too long, and refuses as the application does."""

import contextlib
import logging
import select
import signal
import socket
import threading
import time
import uuid
from http import HTTPStatus
from typing import Any

import orjson
from gunicorn.workers.gthread import TConn, ThreadWorker

from serve.logs import event
from serve.problems import TYPE, problem
from serve.settings import load

LINGER_SECONDS = 0.05
REFUSED = {"LimitRequestLine": 414, "LimitRequestHeaders": 431, "ExpectationFailed": 417, "UnsupportedTransferCoding": 501}
log = logging.getLogger("serve.request")
READ = "sentiment.read"  # in a request's environ: call it once the request has been read


class Worker(ThreadWorker):  # type: ignore[misc]
    """A worker whose threads no client can hold: one that does not send its request, or take its answer, loses its connection."""

    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = load()
        self.deadlines: dict[TConn, float] = {}
        self.read_seconds = settings.read_seconds
        self.answer_seconds = settings.timeout_seconds + settings.read_seconds  # for the model, and for the client to read
        self.local = threading.local()

    def init_signals(self) -> None:
        """Leave Ctrl-C, which reaches all processes of a terminal, to the first one."""
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def handle(self, conn: TConn) -> Any:
        """Answer a request, and those that follow it at once over the same connection.

        Gunicorn gives each request of a connection to another thread by way of its main one; a client that asks again and
        again would wait for that each time.
        """
        result = self.handle_one(conn)
        while result is True and self.alive and self.nr_conns <= self.cfg.threads and self.next_comes(conn):
            result = self.handle_one(conn)
        return result

    def handle_one(self, conn: TConn) -> Any:
        """Answer a request, its time watched."""
        self.allow(conn, self.read_seconds)
        self.local.conn = conn
        try:
            return super().handle(conn)
        finally:
            self.deadlines.pop(conn, None)

    def allow(self, conn: TConn, seconds: float) -> None:
        """Let what comes next over a connection take so long."""
        self.deadlines[conn] = time.monotonic() + seconds

    def next_comes(self, conn: TConn) -> bool:
        """Whether the client's next request begins to arrive within a moment."""
        if conn.parser.unreader.buf.getvalue():
            return True
        try:
            waiting = select.poll()
            waiting.register(conn.sock, select.POLLIN)
            return bool(waiting.poll(1000 * LINGER_SECONDS))
        except (OSError, ValueError):  # closed meanwhile
            return False

    def load_wsgi(self) -> None:
        """Let the application say when it has read a request."""
        super().load_wsgi()
        application = self.wsgi

        def watched(environ: dict[str, Any], start_response: Any) -> Any:
            conn = self.local.conn
            environ[READ] = lambda: self.allow(conn, self.answer_seconds)
            return application(environ, start_response)

        self.wsgi = watched

    def murder_keepalived(self, force: bool = False) -> None:
        """Hang up on slow clients, at each turn of Gunicorn's loop."""
        super().murder_keepalived(force)
        now = time.monotonic()
        for conn, deadline in list(self.deadlines.items()):
            if deadline < now:
                with contextlib.suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Answer what Gunicorn refuses by itself (it is no HTTP, or too long) as the application answers its errors."""
        refused = type(exc).__module__.startswith("gunicorn.")
        status = REFUSED.get(type(exc).__name__, 400) if refused else 500
        request_id = uuid.uuid4().hex
        event(
            log, logging.INFO if refused else logging.ERROR, "refused", exc_info=None if refused else exc, id=request_id,
            client=addr[0] if addr else "unix", status=status, error=type(exc).__name__,
        )  # fmt: skip
        detail = "this is no HTTP request that is answered here" if refused else "something failed here"
        body = orjson.dumps(problem(status, detail, request_id))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {TYPE}\r\nX-Request-ID: {request_id}\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
