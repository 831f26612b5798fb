"""What no client may do to the service: fill its memory, hold its threads, make it fail, or end one of its processes."""

import contextlib
import http.client
import json
import random
import re
import select
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import models
from serving import Service
from test_serve_contract import served

THREADS = 8
PATHS = ["/predict", "/explain"]
BUNDLE = "/static/swagger/js/swagger-ui-bundle.js"  # the largest answer that there is, of some 1.4 MB


@pytest.fixture(scope="module")
def service(environment, tmp_path_factory):
    """A service that is easily filled up: one HTTP process of 8 threads, 4 places to wait, seconds to be asked and to answer."""
    settings = served(models.model_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("engines"))
    settings |= {"workers": 1, "http_threads": THREADS, "queue": 4, "read_seconds": 1, "timeout_seconds": 5}
    with Service(tmp_path_factory.mktemp("service"), environment, **settings) as made:
        made.first = made.children()
        yield made


@pytest.fixture(autouse=True)
def unharmed(service):
    """After every test: the service is well, and its processes are those that it began with."""
    yield
    assert service.get("/health")[0] == 200
    assert service.children() == service.first


def connect(service, seconds=20):
    return socket.create_connection(("127.0.0.1", service.port), timeout=seconds)


def message(method="POST", path="/predict", headers="", body=b"", last=True):
    """The bytes of a request, in no way checked; `headers` are lines."""
    lines = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}" + ("Connection: close\r\n" if last else "")
    return lines.encode("latin-1") + b"\r\n" + body


def sized(body, **more):
    return message(headers=f"Content-Length: {len(body)}\r\n", body=body, **more)


def received(connection):
    """What comes over a connection until it ends."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


def exchange(service, data):
    """What the service answers to bytes until it hangs up; where it closes before all was sent, what it said until then."""
    with connect(service) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return received(connection)


def statuses(answer):
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]


def refusal(answer):
    """The status of a single answer that is the client's fault, not the service's."""
    (status,) = statuses(answer)
    assert 400 <= status < 500, answer
    return status


def post(service, path, body):
    """The status for a body of bytes."""
    return service.request("POST", path, body, {"Content-Type": "application/json"})[0]


# Bodies.

MEGABYTE = b"a" * 1_000_000
LARGE = {
    "with its length": (b"Content-Length: 50000000", [MEGABYTE] * 50),
    "chunked": (b"Transfer-Encoding: chunked", [b"f4240\r\n" + MEGABYTE + b"\r\n"] * 50 + [b"0\r\n\r\n"]),
    "asking first": (b"Content-Length: 50000000\r\nExpect: 100-continue", []),
    "of a length beyond reason": (b"Content-Length: " + b"9" * 30, [MEGABYTE]),
}


@pytest.mark.parametrize(("header", "pieces"), LARGE.values(), ids=LARGE)
def test_a_body_of_50_mb_is_413_or_cut_off(service, header, pieces):
    with connect(service) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + header + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        assert [status for status in statuses(received(connection)) if status != 100] in ([413], [])
    assert service.predict()


NOT_JSON = {
    "100,000 arrays": b"[" * 100_000 + b"]" * 100_000,
    "100,000 open arrays": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 arrays in a text": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 arrays in texts": b'{"texts": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
    "100,000 arrays in another field": b'{"text": "bom", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "an overlong slash": b'{"text": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "half a character": b'{"text": "\xf0\x9f\x98"}',
    "Latin-1": '{"text": "não"}'.encode("latin-1"),
    "UTF-16": '{"text": "bom"}'.encode("utf-16"),
    "NaN": b'{"text": NaN}',
    "infinity": b'{"text": 1e999}',
    "minus infinity": b'{"text": -Infinity}',
    "a number of 100,000 digits": b'{"text": ' + b"9" * 100_000 + b"}",
    "an exponent of 100,000 digits": b'{"text": 1e' + b"9" * 100_000 + b"}",
    "bytes": bytes(range(256)),
    "NULs": b"\0" * 1000,
}


@pytest.mark.parametrize("path", [*PATHS, "/predict/batch"])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_breaks_parsers_is_422(service, path, body):
    assert post(service, path, body) == 422


FIELDS = ['"a": ' + "9" * 5000, '"a": 1e400', '"a": -1e-400', '"\\u0000": 1', '"__proto__": {}', '"__class__": 1', '"self": 1']


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field[:12])
def test_another_field_breaks_nothing(service, field):
    assert post(service, "/predict", f'{{{field}, "text": "bom"}}'.encode()) in (200, 422)


def test_of_a_key_that_is_there_twice_the_last_counts(service):
    assert post(service, "/predict", b'{"text": "", "text": "bom"}') == 200
    assert post(service, "/predict", b'{"text": "bom", "text": ""}') == 422


# Texts.

SURROGATES = ["\\ud800", "bom \\ud800", "\\udfff bom", "\\ud83d bom \\ude0d", "\\ude0d\\ud83d", "bom \\uD83D"]


@pytest.mark.parametrize("text", SURROGATES)
def test_a_lone_surrogate_is_no_failure_of_the_service(service, text):
    for path in PATHS:
        assert post(service, path, f'{{"text": "{text}"}}'.encode()) in (200, 400, 422)
    assert post(service, "/predict/batch", f'{{"texts": ["bom", "{text}"]}}'.encode()) in (200, 422)
    assert post(service, "/predict", f'{{"{text}": 1, "text": "bom"}}'.encode()) in (200, 422)


STRANGE = {
    "a NUL within": "adorei\0 o produto",
    "NULs": "a\0" * 1000,
    "10,000 emoji": "😍" * 10_000,
    "a family": "👩‍👩‍👧‍👦" * 200,
    "flags": "🇧🇷" * 2000,
    "combining marks": "\u0301" * 5000,
    "a letter under marks": "a" + "\u0301" * 5000,
    "marks that NFC puts in order": "a" + "\u0301\u0316" * 5000,
    "overrides from right to left": "\u202ebom\u202c" * 500,
    "Arabic": "منتج رائع " * 500,
    "Thai": "สินค้าดีมาก" * 500,
    "Chinese": "很好" * 5000,
    "one long word": "a" * 50_000,
    "one long word of no ASCII": "ã" * 50_000,
    "one sign": "!" * 50_000,
    "what NFKC makes long": "\ufdfa" * 5000,
    "Hangul in parts": "\u1112\u1161\u11ab" * 5000,
    "escape sequences": "\x1b[31mbom\x1b[0m" * 100,
    "the tokens of the model": "[CLS] bom [SEP] ruim [MASK] [PAD] [UNK]",
    "HTML": "<script>alert(1)</script>",
    "braces": "{0} {text} %s %d ${jndi:ldap://127.0.0.1/a}",
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_a_strange_text_is_answered(service, path, text):
    assert service.post(path, {"text": text})[0] == 200


INVISIBLE = ["\u202e", "\u200d", "\u200d" * 100, "\ue000", "\U000e0041", "\u0378", "\ufe0f", "\u2028", "\x7f", "\x9b", "\u00ad"]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_of_nothing_that_is_seen_is_answered_or_400(service, text):
    for path in PATHS:
        assert service.post(path, {"text": text})[0] in (200, 400)
        assert service.post(path, {"text": f"bom{text} {text}"})[0] == 200


def test_strange_texts_are_answered_in_a_batch_each_on_its_own(service):
    texts = ["bom", *STRANGE.values(), "ruim"]
    status, _, body = service.post("/predict/batch", {"texts": texts})
    assert status == 200
    assert all("sentiment" in result for result in body["results"])
    assert body["results"][0]["probabilities"] == pytest.approx(service.predict("bom")["probabilities"], abs=1e-5)
    assert body["results"][-1]["probabilities"] == pytest.approx(service.predict("ruim")["probabilities"], abs=1e-5)


# Requests that are none.

INJECTED = [
    "a\r\nSet-Cookie: x=1",
    "a\rSet-Cookie: x=1",
    "a\nSet-Cookie: x=1",
    "a\r\n Set-Cookie: x=1",
    "a\0b",
    "\x1b[31m",
    "a\x85b",
]


@pytest.mark.parametrize("value", INJECTED, ids=ascii)
@pytest.mark.parametrize("name", ["X-Request-ID", "X-Forwarded-For", "X-API-Key", "Range"])
def test_a_header_with_a_newline_makes_no_header_of_the_answer(service, name, value):
    answer = exchange(service, message("GET", "/live", f"{name}: {value}\r\n"))
    (status,) = statuses(answer)
    assert status in (200, 400)
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert not re.search(rb"set-cookie|\x1b|\x85|\0", head)


OVERSIZED = {
    "a path": ("/" + "a" * 20_000, ""),
    "a query": ("/live?" + "a" * 20_000, ""),
    "a header": ("/live", f"X-Long: {'a' * 100_000}\r\n"),
    "a header's name": ("/live", f"X-{'a' * 100_000}: 1\r\n"),
    "a request id": ("/live", f"X-Request-ID: {'a' * 60_000}\r\n"),
    "many headers": ("/live", "".join(f"X-{k}: a\r\n" for k in range(1000))),
}


@pytest.mark.parametrize(("path", "headers"), OVERSIZED.values(), ids=OVERSIZED)
def test_a_head_that_is_too_large_is_refused(service, path, headers):
    assert set(statuses(exchange(service, message("GET", path, headers)))) <= {400, 414, 431}


AMBIGUOUS = {
    "a length and chunks": "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    "two lengths": "Content-Length: 3\r\nContent-Length: 4\r\n",
    "a list of lengths": "Content-Length: 3, 4\r\n",
    "a negative length": "Content-Length: -3\r\n",
    "a length with a sign": "Content-Length: +3\r\n",
    "a length that is none": "Content-Length: três\r\n",
    "a blank before the colon": "Content-Length : 3\r\n",
    "another encoding": "Transfer-Encoding: chunked, identity\r\n",
    "chunked twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
}


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_body_whose_end_two_servers_would_see_differently_is_refused(service, headers):
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = exchange(service, message(headers=headers, body=smuggled, last=False))
    assert refusal(answer) in (400, 501)


BROKEN_CHUNKS = [
    b"zz\r\nabc\r\n0\r\n\r\n",
    b"-1\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"3\r\nabcde\r\n0\r\n\r\n",
    b"\r\n\r\n",
    b"0x3\r\nabc\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("chunks", BROKEN_CHUNKS, ids=ascii)
def test_chunks_that_are_none_are_the_clients_fault(service, chunks):
    with connect(service) as connection:
        connection.sendall(message(headers="Transfer-Encoding: chunked\r\n", body=chunks))
        connection.shutdown(socket.SHUT_WR)
        assert [status for status in statuses(received(connection)) if not 400 <= status < 500] == []


WHOLE = b'{"text": "adorei o produto"}'
CUT_OFF = {
    "before its end": ("Content-Length: 100", WHOLE),
    "in its JSON": ("Content-Length: 100", WHOLE[:-5]),
    "before it began": ("Content-Length: 100", b""),
    "in a chunk": ("Transfer-Encoding: chunked", b"64\r\n" + WHOLE),
    "behind a chunk": ("Transfer-Encoding: chunked", b"1c\r\n" + WHOLE),
    "in the end of a chunk": ("Transfer-Encoding: chunked", b"1c\r\n" + WHOLE + b"\r"),
    "between chunks": ("Transfer-Encoding: chunked", b"1c\r\n" + WHOLE + b"\r\n"),
    "in the last chunk": ("Transfer-Encoding: chunked", b"1c\r\n" + WHOLE + b"\r\n0\r\n"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("header", "sent"), CUT_OFF.values(), ids=CUT_OFF)
def test_a_body_that_was_cut_off_is_400(service, path, header, sent):
    with connect(service) as connection:
        connection.sendall(message(path=path, headers=f"{header}\r\n", body=sent, last=False))
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert refusal(answer) == 400
    assert b'"detail":"the body was cut off"' in answer


FROM_A_PROXY = {
    "a script's name": "SCRIPT_NAME: /outra\r\n",
    "the path's beginning as script's name": "SCRIPT_NAME: /live\r\n",
    "a path": "PATH_INFO: /metrics\r\n",
    "schemes that contradict": "X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n",
    "an address that is none": "X-Forwarded-For: nada, 1.2.3, ,,\r\n",
    "another host": "X-Forwarded-Host: example.org\r\nX-Forwarded-Prefix: /x\r\nX-Original-URL: /metrics\r\n",
}


@pytest.mark.parametrize("headers", FROM_A_PROXY.values(), ids=FROM_A_PROXY)
def test_headers_that_proxies_set_change_nothing_when_no_proxy_is_trusted(service, headers):
    assert statuses(exchange(service, message("GET", "/live", headers))) == [200]


def test_a_redirect_does_not_lead_to_a_host_that_the_client_named(service):
    answer = exchange(service, b"GET /static//demo.css HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n")
    assert b"example.org" not in answer


STRANGE_LINES = [
    b"GET /live HTTP/9.9", b"GET /live HTTP/2.0", b"GET /live", b"GET  /live HTTP/1.1", b"PRI * HTTP/2.0",
    b"\x16\x03\x01\x02\x00", b"\x00" * 20, b": HTTP/1.1", b"G\x00T /live HTTP/1.1", b"A" * 300 + b" /live HTTP/1.1",
    b"TRACE /live HTTP/1.1", b"FOO /predict HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT 127.0.0.1:22 HTTP/1.1",
    b"GET \x1b[31m HTTP/1.1", "GET /é HTTP/1.1".encode(), b"GET http://example.org/nada HTTP/1.1", b"GET nada HTTP/1.1",
    b"GET //nada HTTP/1.1", b"GET /%00 HTTP/1.1", b"GET /%ff%fe HTTP/1.1", b"GET /%zz HTTP/1.1",
]  # fmt: skip


@pytest.mark.parametrize("line", STRANGE_LINES, ids=lambda line: ascii(line[:20]))
def test_a_request_line_that_is_none_is_the_clients_fault(service, line):
    with connect(service) as connection:
        connection.sendall(line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert [status for status in statuses(received(connection)) if not 400 <= status < 500] == []


REFUSED_EARLY = {
    "414": message("GET", "/" + "a" * 20_000),
    "431": message("GET", "/live", f"X-Long: {'a' * 100_000}\r\n"),
    "400": message(headers="Content-Length: 3\r\nContent-Length: 4\r\n"),
}


@pytest.mark.parametrize("data", REFUSED_EARLY.values(), ids=REFUSED_EARLY)
def test_what_gunicorn_refuses_is_a_problem_with_an_id_too(service, data):
    def counted(status):
        line = f'sentiment_http_requests_total{{method="other",route="none",status="{status}"}} '
        return sum(float(each.split()[-1]) for each in service.get("/metrics")[2].decode().splitlines() if each.startswith(line))

    before = {status: counted(status) for status in (400, 414, 431)}
    head, _, body = exchange(service, data).partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert b"x-request-id: " in head.lower()
    status = json.loads(body)["status"]
    assert status == statuses(head)[0]
    assert counted(status) == before[status] + 1


KNOWN = {
    "400": (400, "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", "HTTP"),
    "417": (417, "Expect: 200-ok\r\n", "100-continue"),
    "431": (431, f"X-Long: {'a' * 100_000}\r\n", "too long"),
    "501": (501, "Transfer-Encoding: br\r\n", "chunked"),
}


@pytest.mark.parametrize(("status", "headers", "why"), KNOWN.values(), ids=KNOWN)
def test_what_gunicorn_refuses_keeps_the_clients_id_and_says_why(service, status, headers, why):
    answer = exchange(service, message(headers=f"x-request-id:  eu-{status} \r\n{headers}"))
    assert statuses(answer) == [status]
    assert f"X-Request-ID: eu-{status}\r\n".encode() in answer
    said = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert said["request_id"] == f"eu-{status}"
    assert why in said["detail"]


def test_what_gunicorn_refuses_behind_another_request_keeps_its_own_id(service):
    refused = message(headers="X-Request-ID: dois\r\nExpect: 200-ok\r\n")
    answer = exchange(service, message("GET", "/live", "X-Request-ID: um\r\n", last=False) + refused)
    assert statuses(answer) == [200, 417]
    assert re.findall(rb"X-Request-ID: (\w+)", answer) == [b"um", b"dois"]


NO_IDS = {
    "two": "X-Request-ID: um\r\nX-Request-ID: dois\r\n",
    "one that is none": "X-Request-ID: um dois\r\n",
    "another field's end": "X-A: X-Request-ID: um\r\n",
    "one in the body": "\r\nX-Request-ID: um\r\n",
}


@pytest.mark.parametrize("headers", NO_IDS.values(), ids=NO_IDS)
def test_what_gunicorn_refuses_without_an_id_of_the_client_gets_a_new_one(service, headers):
    answer = exchange(service, message(headers=f"Expect: 200-ok\r\n{headers}"))
    assert refusal(answer) == 417
    assert re.search(rb"\r\nX-Request-ID: [0-9a-f]{32}\r\n", answer)


def test_damaged_requests_are_no_failures_of_the_service(service):
    rng = random.Random(0)
    good = [message("GET", path) for path in ("/", "/health", "/docs", "/static/demo.css", "/metrics")]
    good += [sized(json.dumps({"text": "não gostei"}).encode()), sized(b'{"texts": ["bom"]}', path="/predict/batch")]
    for _ in range(150):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        with connect(service) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert all(status < 500 for status in statuses(received(connection))), bytes(data)


CONDITIONS = [
    "Range: bytes=abc",
    "Range: bytes=9-1",
    "Range: bytes=" + ",".join(["0-1"] * 500),
    "If-Modified-Since: ontem",
    "If-None-Match: \xff",
    "Accept-Encoding: \xff",
    "Cookie: \xff=\xfe",
    "Content-Type: \xff; charset=utf-99",
]


@pytest.mark.parametrize("header", CONDITIONS, ids=lambda header: ascii(header[:30]))
def test_headers_that_make_no_sense_are_no_failures(service, header):
    for path in ("/docs", "/static/demo.css", "/live"):
        (status,) = statuses(exchange(service, message("GET", path, f"{header}\r\n")))
        assert status in (200, 206, 400, 416)


# Clients that take their time.

SLOW = {  # what a client sends at once, and what it then sends byte by byte
    "nothing": (b"", b""),
    "request line": (b"GET /", b"a" * 60),
    "headers": (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a" * 60),
    "body": (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n", b" " * 60),
    "chunks": (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10),
}


class SlowClient:
    """A client that sends a byte whenever it is told to."""

    def __init__(self, service, kind):
        self.connection = connect(service)
        head, self.rest = SLOW[kind]
        self.connection.sendall(head)

    def send_a_byte(self):
        byte, self.rest = self.rest[:1], self.rest[1:]
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(byte)

    def is_hung_up_on(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(65536)
        except ConnectionError:
            return True


def test_clients_of_a_byte_a_second_are_hung_up_on_while_others_are_answered(service):
    clients = {kind: SlowClient(service, kind) for kind in SLOW if kind != "nothing"}  # which holds no thread for long
    left, since = set(clients), time.monotonic()
    while left and time.monotonic() < since + 10:  # read_seconds is 1
        service.predict()
        left -= {kind for kind in left if clients[kind].is_hung_up_on()}
        select.select([clients[kind].connection for kind in left], [], [], 1)
        for kind in left:
            clients[kind].send_a_byte()
    for each in clients.values():
        each.connection.close()
    assert not left


def test_more_slow_clients_than_threads_do_not_keep_a_good_one_from_its_answer(service):
    slow = [SlowClient(service, kind) for _ in range(THREADS // 2) for kind in SLOW]
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(service.post, "/predict", {"text": "bom"})
        while not good.done():
            for each in slow:
                each.send_a_byte()
            time.sleep(0.2)  # their pace
    for each in slow:
        each.connection.close()
    assert good.result()[0] == 200


def test_clients_that_do_not_read_their_answers_do_not_keep_a_good_one_from_its_own(service):
    deaf = []
    try:
        for _ in range(THREADS):
            each = socket.socket()
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect(("127.0.0.1", service.port))
            each.sendall(message("GET", BUNDLE, last=False) * 20)
            deaf.append(each)
        sent = -1
        while (now := sum(BUNDLE in line for line in service.log())) != sent:  # until their buffers are full
            sent = now
            for _ in range(20):
                assert service.request("POST", "/predict", b'{"text": "bom"}', seconds=25)[0] == 200
    finally:
        for each in deaf:
            each.close()


# Clients that go away, and connections that are kept.


@pytest.mark.parametrize("reset", [False, True], ids=["closing", "resetting"])
@pytest.mark.parametrize("cut", [None, -5, 40, 5], ids=["after it", "in its body", "in its headers", "in its first line"])
def test_clients_that_leave_with_their_request_do_no_harm(service, cut, reset):
    for _ in range(2 * THREADS):
        with connect(service) as connection:
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(sized(json.dumps({"text": "muito bom"}).encode())[:cut])
    service.wait(lambda: service.post("/predict", {"text": "bom"})[0] == 200)  # after what they left in the queue


def test_requests_in_one_go_are_answered_in_their_order(service):
    data = b"".join(
        message(path=path, headers=f"X-Request-ID: n{k}\r\nContent-Length: {len(body)}\r\n", body=body, last=k == 7)
        for k, (path, body) in enumerate([("/predict", b'{"text": "bom"}'), ("/nada", b"{}"), ("/predict", b'{"text": ""}'),
                                          ("/predict/batch", b'{"texts": ["bom"]}')] * 2)
    )  # fmt: skip
    answer = exchange(service, data)
    assert statuses(answer) == [200, 404, 422, 200] * 2
    assert re.findall(rb"X-Request-ID: n(\d)", answer) == [b"%d" % k for k in range(8)]


def test_a_connection_serves_fifty_requests_with_errors_among_them(service):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    connection.connect()
    first = connection.sock
    for k in range(50):
        path, body, expected = [("/predict", b'{"text": "bom"}', 200), ("/predict", b"{", 422), ("/nada", b"{}", 404)][k % 3]
        connection.request("POST", path, body)
        response = connection.getresponse()
        response.read()
        assert (response.status, connection.sock) == (expected, first)
    connection.close()


def test_what_a_request_left_unread_is_not_taken_for_the_next_one(service):
    inner = message("GET", "/health", "X-Request-ID: dentro\r\n", last=False)
    outer = message(path="/nada", headers=f"Content-Length: {len(inner)}\r\n", body=inner, last=False)
    answer = exchange(service, outer + message("GET", "/live"))
    assert statuses(answer) == [404, 200]
    assert b"dentro" not in answer


@pytest.mark.parametrize("line", [b"GET /live", b"GET http://localhost/live", b"GET /nada", b"POST /predict"])
def test_a_request_of_http_1_1_without_a_host_is_400(service, line):
    answer = exchange(service, line + b" HTTP/1.1\r\nConnection: close\r\nContent-Length: 28\r\n\r\n" + WHOLE)
    assert refusal(answer) == 400
    assert b"Host" in answer


def test_a_client_of_http_1_0_is_answered_and_hung_up_on(service):
    assert statuses(exchange(service, b"GET /live HTTP/1.0\r\n\r\n")) == [200]


LAST = ["Connection: close, x", "Connection: x,\tClose", "Connection: keep-alive\r\nConnection: close"]


@pytest.mark.parametrize("header", LAST, ids=ascii)
def test_a_connection_ends_where_close_is_among_what_its_client_asks_of_it(service, header):
    body = b'{"text": "bom"}'
    for data in (
        message("GET", "/live", f"{header}\r\n", last=False),
        message(headers=f"{header}\r\nContent-Length: {len(body)}\r\n", body=body, last=False),
    ):
        answer = exchange(service, data)
        assert statuses(answer) == [200]
        assert b"\r\nConnection: close\r\n" in answer


def test_clients_that_do_not_hang_up_after_their_last_answer_hold_up_nobody(service):
    staying = [connect(service) for _ in range(60)]
    for connection in staying:
        connection.sendall(b"GET /live HTTP/1.0\r\n\r\n")
    for connection in staying:
        assert statuses(received(connection)) == [200]  # the answer has an end, though they say nothing
    body = b'{"text": "adorei o produto"}'  # to wait two seconds for each of them would be a minute for each of two processes
    assert service.request("POST", "/predict", body, {"Content-Type": "application/json"}, seconds=20)[0] == 200
    for connection in staying:
        connection.close()


def test_what_comes_after_the_last_answer_does_not_cost_a_client_that_answer(service):
    connection = connect(service)
    connection.sendall(b"GET /live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + b"GET /live HTTP/1.1\r\n" * 100)
    assert statuses(received(connection)) == [200]


def test_nothing_failed_in_all_of_this(service):
    assert [line for line in service.log() if " ERROR " in line or " CRITICAL " in line or "trace=" in line] == []
    assert "Traceback" not in service.output.read_text(encoding="utf-8", errors="replace")
