"""Messages between the HTTP processes and the model's process: JSON behind its length, over a Unix socket."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

LENGTH = struct.Struct("!I")
TIMEVAL = struct.Struct("@ll")  # seconds and microseconds, as the system's socket options take them
RETRY_SECONDS = 0.05
SEND_SECONDS = 1.0  # for the model's process to take the rest of a message
RECEIVED = 1 << 18


class UnreachableError(Exception):
    """The model's process does not answer: it starts, or starts again."""


def packed(message: Any) -> bytes:
    """A message as it goes over the socket."""
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return LENGTH.pack(len(body)) + body


class Stream:
    """The messages in what comes over a socket."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with `data`."""
        self.data += data
        found, place = [], 0
        while place + LENGTH.size <= len(self.data):
            (length,) = LENGTH.unpack_from(self.data, place)
            if place + LENGTH.size + length > len(self.data):
                break
            found.append(orjson.loads(self.data[place + LENGTH.size : place + LENGTH.size + length]))
            place += LENGTH.size + length
        self.data = self.data[place:]
        return found


class Peer:
    """An HTTP process' connection, as the model's process sees it: messages come in turn, answers leave as they are ready."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.stream, self.sending = connection, Stream(), threading.Lock()

    def messages(self) -> Iterator[list[Any]]:
        """What is asked, as much as comes together, to the end of the connection; raises OSError if it breaks."""
        while data := self.connection.recv(RECEIVED):
            if found := self.stream.feed(data):
                yield found

    def send(self, *messages: Any) -> None:
        """Send answers; raises OSError if they are not taken, and ends the connection, so that who asked hears of it."""
        data = b"".join(map(packed, messages))
        with self.sending:
            try:
                self.connection.sendall(data)
            except OSError:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                raise


class Link:
    """The model's process, as the main loop of an HTTP process sees it: many questions at a time over one connection.

    Each has an `id`, which comes back with its answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection: socket.socket | None = None
        self.stream = Stream()

    def connect(self) -> socket.socket | None:
        """The connection, made if need be; None while nobody listens."""
        if self.connection is None:
            connection = None
            try:
                connection = socket.socket(socket.AF_UNIX)
                connection.setblocking(False)
                connection.connect(str(self.path))
            except OSError:
                if connection:
                    connection.close()
                return None
            self.connection, self.stream = connection, Stream()
        return self.connection

    def send(self, messages: Sequence[Any]) -> bool:
        """Ask, unless what was asked before has not been read yet; raises OSError where the connection breaks."""
        assert self.connection is not None  # noqa: S101
        data = b"".join(map(packed, messages))
        try:
            sent = self.connection.send(data)
        except BlockingIOError:
            return False
        if sent < len(data):  # the rest must follow
            self.connection.settimeout(SEND_SECONDS)
            self.connection.sendall(data[sent:])
            self.connection.setblocking(False)
        return True

    def answers(self) -> list[Any]:
        """What has come; raises ConnectionError, or another OSError, at the end."""
        assert self.connection is not None  # noqa: S101
        try:
            data = self.connection.recv(RECEIVED)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionError("the model's process went away")
        return self.stream.feed(data)

    def drop(self) -> None:
        """Close the connection."""
        if self.connection:
            self.connection.close()
            self.connection = None


class Client:
    """The model's process, as an HTTP process sees it: a connection for each thread, made anew when it breaks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.local = threading.local()

    def ask(self, message: dict[str, Any], seconds: float) -> Any:
        """The answer to a message; raises TimeoutError if it takes longer than `seconds`, UnreachableError if nobody is there.

        A message whose connection broke is sent again: asking twice does no harm.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.exchange(packed(message), deadline)
            except TimeoutError:
                self.drop()
                raise
            except OSError as error:
                self.drop()
                if time.monotonic() + RETRY_SECONDS > deadline:
                    raise UnreachableError("the model's process does not answer") from error
                time.sleep(RETRY_SECONDS)

    def exchange(self, data: bytes, deadline: float) -> Any:
        """Send a message over this thread's connection and read the answer."""
        connection: socket.socket | None = getattr(self.local, "connection", None)
        if connection is None:
            connection = socket.socket(socket.AF_UNIX)
            self.local.connection = connection
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(str(self.path))
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.sendall(data)
        (length,) = LENGTH.unpack(receive(connection, LENGTH.size, deadline))
        return orjson.loads(receive(connection, length, deadline))

    def drop(self) -> None:
        """Close this thread's connection: what may still come over it answers nobody."""
        if connection := getattr(self.local, "connection", None):
            connection.close()
            self.local.connection = None


def receive(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Exactly `size` bytes; raises ConnectionError at the end of the stream, TimeoutError at the deadline, if there is one."""
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the model's process went away")
        data += part
    return bytes(data)
