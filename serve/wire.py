"""Messages between the HTTP processes and the model's process: JSON behind its length, over a Unix socket."""

import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import orjson

LENGTH = struct.Struct("!I")
TIMEVAL = struct.Struct("@ll")  # seconds and microseconds, as the system's socket options take them
RETRY_SECONDS = 0.05


class UnreachableError(Exception):
    """The model's process does not answer: it starts, or starts again."""


def packed(message: Any) -> bytes:
    """A message as it goes over the socket."""
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return LENGTH.pack(len(body)) + body


def send(connection: socket.socket, message: Any) -> None:
    """Send a message; raises OSError if it is not taken."""
    connection.sendall(packed(message))


def read(connection: socket.socket) -> Any:
    """The next message, waiting for it; raises ConnectionError at the end."""
    (length,) = LENGTH.unpack(receive(connection, LENGTH.size))
    return orjson.loads(receive(connection, length))


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
