"""Gunicorn's threaded worker, which hangs up on clients that take too long to send their request."""

import contextlib
import select
import signal
import socket
import threading
import time
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

from serve.settings import load

LINGER_SECONDS = 0.05
READ = "sentiment.read"  # in a request's environ: call it once the request has been read


class Worker(ThreadWorker):  # type: ignore[misc]
    """A worker whose threads no client can hold: one that does not send its request in time loses its connection."""

    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reading: dict[TConn, float] = {}
        self.read_seconds = load().read_seconds
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
        """Answer a request, its reading watched."""
        self.reading[conn] = time.monotonic() + self.read_seconds
        self.local.conn = conn
        try:
            return super().handle(conn)
        finally:
            self.reading.pop(conn, None)

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
            environ[READ] = lambda: self.reading.pop(conn, None)
            return application(environ, start_response)

        self.wsgi = watched

    def murder_keepalived(self, force: bool = False) -> None:
        """Hang up on slow clients, at each turn of Gunicorn's loop."""
        super().murder_keepalived(force)
        now = time.monotonic()
        for conn, deadline in list(self.reading.items()):
            if deadline < now:
                with contextlib.suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)
