"""Gunicorn's threaded worker, with a short way for POST /predict (serve/direct.py) in its main loop.

It hangs up on clients that take too long, and refuses as the application does.
"""

import contextlib
import errno
import logging
import math
import selectors
import signal
import socket
import threading
import time
from collections import deque
from functools import partial
from http import HTTPStatus
from itertools import count
from typing import Any

import orjson
from gunicorn.http.body import Body, LengthReader
from gunicorn.workers.gthread import TConn, ThreadWorker

from serve import logs, metrics, observation
from serve.direct import LONGEST, Asked, Direct, Head, head_of
from serve.problems import TYPE, problem
from serve.settings import load
from serve.supervisor import socket_path
from serve.wire import Link

FULL_SECONDS = 1.0  # without taking connections, where there is no descriptor for one
LATE_SECONDS = 1.0  # for the model's process to say itself that an answer took too long
LEAVE_SECONDS = 2.0  # for a client to hang up after its last answer
LEFT_BYTES = 4_194_304  # that it may still send meanwhile: closing before it has sent all costs it the answer, too
DRAINED_BYTES = 65_536  # of a body that nobody read, before Gunicorn gives its connection up
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
REFUSED = {"LimitRequestLine": 414, "LimitRequestHeaders": 431, "ExpectationFailed": 417, "UnsupportedTransferCoding": 501}
NO_HTTP = "this is no HTTP request that is answered here"
DETAILS = {
    414: "the request line is too long",
    417: "no expectation but 100-continue can be met",
    431: "the header has too many fields, or one that is too long",
    501: "no transfer coding but chunked is known here",
}
log = logging.getLogger("serve.request")
READ = "sentiment.read"  # in a request's environ: call it once the request has been read


class Connection(TConn):  # type: ignore[misc]
    """A client's connection."""

    held = b""  # of a request that has not come whole
    left = 0  # bytes that came after the last answer


class Worker(ThreadWorker):  # type: ignore[misc]
    """A worker that answers POST /predict in its main loop, and all else in threads, which no client can hold.

    A client that does not send its request, or take its answer, loses its connection.
    """

    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = load()
        self.deadlines: dict[TConn, float] = {}
        self.read_seconds = settings.read_seconds
        self.answer_seconds = settings.timeout_seconds + settings.read_seconds  # for the model, and for the client to read
        self.local = threading.local()
        self.direct = Direct(settings)
        self.link = Link(socket_path())
        self.asked: dict[int, Asked] = {}  # by the id of the question, the oldest first
        self.numbers = count()
        self.leaving: deque[Connection] = deque()  # the first to be closed first
        self.full_until = 0.0
        self.unsent: list[dict[str, Any]] = []

    def init_signals(self) -> None:
        """Leave Ctrl-C and SIGHUP, which a terminal sends to all of its processes, to the first one."""
        super().init_signals()
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    # The main loop.

    def set_accept_enabled(self, enabled: bool) -> None:
        """Take connections or none; none for a moment where there was no descriptor for one."""
        super().set_accept_enabled(enabled and time.monotonic() >= self.full_until)

    def accept(self, listener: socket.socket) -> None:
        """Take a connection, and its first request if that is there already."""
        if self.cfg.is_ssl:  # a handshake takes its time, and a thread
            super().accept(listener)
            return
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in FULL:
                log.error("no connection can be taken: %s", error.strerror)
                self.full_until = time.monotonic() + FULL_SECONDS
                self.set_accept_enabled(False)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        self.nr_conns += 1
        conn = Connection(self.cfg, client, address, listener.getsockname())
        conn.init()
        conn.data_ready = True
        conn.sock.setblocking(False)
        self.receive(conn)

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Take the next request of a kept connection."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self.receive(conn)

    def on_pending_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Take the first request of a connection, or the rest of one."""
        self.poller.unregister(client)
        self.pending_conns.remove(conn)
        self.receive(conn)

    def receive(self, conn: TConn) -> None:
        """Read what has come: a plain question is for the model, the rest of one is waited for once, all else is for a thread."""
        if not isinstance(conn, Connection):
            self.enqueue_req(conn)
            return
        try:
            data = conn.sock.recv(LONGEST)
        except BlockingIOError:
            self.wait_for(conn)
            return
        except OSError:
            data = b""
        if not data and not conn.held:
            self.close(conn)
            return
        held, conn.held = conn.held, b""
        data, more = held + data, bool(data)
        head = head_of(data, conn.client[0] if conn.client else "")
        if head and len(data) < head.ends and more and not held:
            conn.held = data
            self.wait_for(conn)
        elif not head or len(data) != head.ends or not self.ask(conn, data, head):
            self.leave(conn, data)

    def wait_for(self, conn: Connection) -> None:
        """Come back to a connection when there is something to read, and hang up if there is nothing for too long."""
        conn.timeout = time.monotonic() + self.read_seconds
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def leave(self, conn: TConn, data: bytes) -> None:
        """Leave a request, of which `data` has been read, to a thread."""
        conn.parser.unreader.unread(data)
        self.enqueue_req(conn)

    def ask(self, conn: TConn, data: bytes, head: Head) -> bool:
        """Ask the model at the end of this turn of the loop, if the request is a good one and the model's process is there."""
        try:
            asked = self.direct.asked(conn, data, head)
        except Exception as error:  # a defect here must not end the loop
            log.error("a request could not be read the short way", exc_info=error)
            return False
        if not asked:
            return False
        fresh = self.link.connection is None
        connection = self.link.connect()
        if not connection:
            return False
        if fresh:
            self.poller.register(connection, selectors.EVENT_READ, self.on_answers)
        number = next(self.numbers)
        self.asked[number] = asked
        self.unsent.append({"do": "predict", "id": number, "texts": [asked.text], "deadline": asked.deadline})
        return True

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Wait for whatever comes, and ask the model all that came together in one message."""
        super().wait_for_and_dispatch_events(timeout)
        if not self.unsent:
            return
        messages, self.unsent = self.unsent, []
        try:
            taken = self.link.send(messages)
        except OSError:
            self.cut()
            return
        if not taken:
            for message in messages:
                asked = self.asked.pop(message["id"])
                self.leave(asked.connection, asked.data)

    def on_answers(self, _: socket.socket) -> None:
        """Hand on what the model has answered."""
        try:
            answers = self.link.answers()
        except (OSError, ValueError):
            self.cut()
            return
        found = [(asked, answer) for answer in answers if (asked := self.asked.pop(answer["id"], None))]
        with logs.together():  # first, so that who has an answer finds it in the log and in the metrics
            for asked, answer in found:
                self.note(asked, answer)
        for asked, answer in found:
            self.reply(asked, answer)

    def note(self, asked: Asked, answer: dict[str, Any]) -> None:
        """Log and count an answer that is given."""
        try:
            self.direct.note(asked, answer)
        except Exception as error:
            log.error("an answer could not be counted", exc_info=error)

    def cut(self) -> None:
        """Give up the connection to the model's process; what was asked is left to threads, which ask again until it is there."""
        self.poller.unregister(self.link.connection)
        self.link.drop()
        left, self.asked, self.unsent = self.asked, {}, []
        for asked in left.values():
            self.leave(asked.connection, asked.data)

    def reply(self, asked: Asked, answer: dict[str, Any]) -> None:
        """Send an answer; a client that does not take it at once, of so few bytes, loses its connection."""
        conn = asked.connection
        keep = self.alive and bool(self.cfg.keepalive) and len(self.keepalived_conns) < self.max_keepalived
        try:
            data = self.direct.response(asked, answer, keep)
            whole = conn.sock.send(data) == len(data)
        except OSError:
            whole = False
        except Exception as error:
            log.error("an answer could not be written", exc_info=error)
            whole = False
        if not whole:
            self.close(conn)
            return
        if not keep:
            self.part(conn)
            return
        conn.set_timeout()
        self.keepalived_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    def close(self, conn: Connection) -> None:
        """Close a connection that the poller does not know."""
        self.nr_conns -= 1
        conn.close()

    def part(self, conn: Connection) -> None:
        """Say that no more answers come, and wait for the client to hang up: closing at once could cost it the last one.

        Gunicorn waits in its main loop (RFC 9112, 9.6), where all others would wait, too.
        """
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
        except OSError:
            self.close(conn)
            return
        conn.timeout = time.monotonic() + LEAVE_SECONDS
        self.leaving.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_rest, conn))

    def on_rest(self, conn: Connection, client: socket.socket) -> None:
        """Read what a client sends after its last answer; close once it hangs up, or sends too much."""
        try:
            data = client.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        conn.left += len(data)
        if not data or conn.left > LEFT_BYTES:
            self.poller.unregister(client)
            self.leaving.remove(conn)
            self.close(conn)

    def finish_request(self, conn: TConn, fs: Any) -> None:
        """Keep or end a connection whose request a thread has answered."""
        if not isinstance(conn, Connection) or not (fs.cancelled() or fs.exception() or not fs.result()):
            super().finish_request(conn, fs)
        elif conn.sock.fileno() < 0:  # closed in the thread
            self.nr_conns -= 1
        else:
            self.part(conn)

    # Threads.

    def handle(self, conn: TConn) -> Any:
        """Answer a request in a thread, its time watched."""
        self.allow(conn, self.read_seconds)
        self.local.conn = conn
        self.local.read = conn.parser.unreader.buf.getvalue() if conn.parser else b""
        try:
            return super().handle(conn)
        finally:
            self.deadlines.pop(conn, None)

    def allow(self, conn: TConn, seconds: float) -> None:
        """Let what comes next over a connection take so long."""
        self.deadlines[conn] = time.monotonic() + seconds

    def load_wsgi(self) -> None:
        """Let the application say when it has read a request, and its answer that it is the last one where it is."""
        super().load_wsgi()
        application = self.wsgi

        def watched(environ: dict[str, Any], start_response: Any) -> Any:
            conn = self.local.conn
            environ[READ] = lambda: self.allow(conn, self.answer_seconds)

            def start(*answer: Any) -> Any:
                if is_last(environ):
                    start_response.__self__.force_close()  # before it says that the connection is kept
                return start_response(*answer)

            return application(environ, start)

        self.wsgi = watched

    def murder_keepalived(self, force: bool = False) -> None:
        """Hang up on slow and parting clients, and give up questions without an answer, at each turn of Gunicorn's loop."""
        super().murder_keepalived(force)
        now = time.monotonic()
        for conn, deadline in list(self.deadlines.items()):
            if deadline < now:
                with contextlib.suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)
        while self.leaving and self.leaving[0].timeout < now:
            conn = self.leaving.popleft()
            self.poller.unregister(conn.sock)
            self.close(conn)
        while self.asked and (asked := next(iter(self.asked.values()))).deadline + LATE_SECONDS < now:
            del self.asked[next(iter(self.asked))]
            late = {"error": f"no answer within {self.direct.settings.timeout_seconds:g} s", "status": 504}
            self.note(asked, late)
            self.reply(asked, late)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Answer what Gunicorn refuses by itself (it is no HTTP, or too long) as the application answers its errors."""
        refused = type(exc).__module__.startswith("gunicorn.")
        status = REFUSED.get(type(exc).__name__, 400) if refused else 500
        request_id = observation.id_of(self.local.read)
        logs.event(
            log, logging.INFO if refused else logging.ERROR, "refused", exc_info=None if refused else exc, id=request_id,
            client=addr[0] if addr else "unix", status=status, error=type(exc).__name__,
        )  # fmt: skip
        metrics.requests.labels("other", "none", str(status)).inc()
        detail = DETAILS.get(status, NO_HTTP) if refused else "something failed here"
        body = orjson.dumps(problem(status, detail, request_id))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {TYPE}\r\nX-Request-ID: {request_id}\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def is_last(environ: dict[str, Any]) -> bool:
    """Whether no request can follow on this one: its client says so, or more of its body is unread than Gunicorn drains."""
    tokens = environ.get("HTTP_CONNECTION", "").lower().split(",")
    return "close" in map(str.strip, tokens) or unread(environ["wsgi.input"]) >= DRAINED_BYTES


def unread(body: Body) -> float:
    """How many bytes of a body are unread; of one in chunks that nobody read to its end, infinitely many."""
    reader = body.reader
    if isinstance(reader, LengthReader):
        return body.buf.tell() + reader.length
    return math.inf if reader.parser else body.buf.tell() + reader.buf.tell()
