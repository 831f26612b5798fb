"""Of each request: an id, who asks, a line in the log, a place in the metrics. From its WSGI environ, with Flask or without."""

import logging
import re
import time
import uuid
from email.utils import formatdate
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from serve import logs, metrics
from serve.settings import Settings

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
ID_FIELD = re.compile(rb"(?i)\r\nX-Request-ID:([^\r\n]*)(?=\r\n)")
METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"}
MAPPED = "::ffff:"  # before an address of IPv4 (RFC 4291, 2.5.5.2)
START, ID = "sentiment.start", "sentiment.id"  # in a request's environ: when it came (time.perf_counter), and its id
log = logging.getLogger("serve.request")


def request_id(environ: dict[str, Any]) -> str:
    """The id that the client gave, where it is one, else a new one."""
    given: str = environ.get("HTTP_X_REQUEST_ID", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def id_of(read: bytes) -> str:
    """The id of a request that is refused before it is parsed: the client's, where it is in what was read, else a new one."""
    end = read.find(b"\r\n\r\n")
    given = b",".join(ID_FIELD.findall(read if end < 0 else read[: end + 2]))
    return request_id({"HTTP_X_REQUEST_ID": given.decode("latin-1").strip(" \t")})


def begin(environ: dict[str, Any]) -> None:
    """Note when a request came and its id, unless that is done."""
    environ.setdefault(START, time.perf_counter())
    if ID not in environ:
        environ[ID] = request_id(environ)


def answered(environ: dict[str, Any], settings: Settings, route: str, path: str, status: str) -> None:
    """Log and count an answer to what was asked of `path`, by the handler of `route`."""
    seconds = time.perf_counter() - environ[START]
    method: str = environ["REQUEST_METHOD"]
    metrics.requests.labels(method if method in METHODS else "other", route, status).inc()
    metrics.latency.labels(route).observe(seconds)
    logs.event(
        log, logging.INFO, "request", id=environ[ID], client=client_address(environ, settings), method=method,
        path=path, status=int(status), ms=round(1000 * seconds, 2),
    )  # fmt: skip


def headers(given: str) -> list[tuple[str, str]]:
    """What every answer says, to a request of that id."""
    return [("X-Request-ID", given), ("X-Content-Type-Options", "nosniff")]


@lru_cache(maxsize=4)
def date(second: int) -> str:
    """A time in seconds since the epoch, as HTTP writes it."""
    return formatdate(second, usegmt=True)


def client_address(environ: dict[str, Any], settings: Settings) -> str:
    """Who asks: the last address that no trusted proxy vouches for; without trusted proxies, who is connected."""
    address = plain(environ.get("REMOTE_ADDR") or "unix")
    if not settings.trusted_proxies:
        return address
    hops = [plain(hop.strip()) for hop in environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if hop.strip()]
    while hops and is_trusted(address, settings):
        address = hops.pop()
    return address


def plain(address: str) -> str:
    """An address of IPv4 as one, where a socket of IPv6 maps it to one of its own."""
    return address[len(MAPPED) :] if address.startswith(MAPPED) and "." in address else address


def is_trusted(address: str, settings: Settings) -> bool:
    """Whether an address is one of the trusted proxies."""
    try:
        return any(ip_address(address) in network for network in settings.trusted_proxies)
    except ValueError:
        return False
