"""The short way of POST /predict: which requests take it, and that nobody can tell it from the long one but by the clock."""

import json
import socket
import time
from itertools import pairwise

import pytest

import models
from serve.direct import LONGEST, Direct, head_of
from serve.settings import Settings
from serving import Service
from test_serve_contract import served

BODY = json.dumps({"text": "adorei o produto"}).encode()


def request(*fields, body=BODY, start="POST /predict HTTP/1.1", length=None):
    """The bytes of a request."""
    lines = [start, "Host: localhost", f"Content-Length: {len(body) if length is None else length}", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def test_a_plain_request_is_read_as_gunicorn_would():
    data = request("X-Request-ID:  eu-1 ", "Content-Type: application/json", "Connection: keep-alive")
    head = head_of(data, "203.0.113.9")
    assert head.environ | {"HTTP_CONTENT_TYPE": ""} == {
        "REQUEST_METHOD": "POST", "PATH_INFO": "/predict", "REMOTE_ADDR": "203.0.113.9", "HTTP_HOST": "localhost",
        "HTTP_CONTENT_LENGTH": str(len(BODY)), "HTTP_X_REQUEST_ID": "eu-1", "HTTP_CONTENT_TYPE": "",
        "HTTP_CONNECTION": "keep-alive",
    }  # fmt: skip
    assert data[head.begins : head.ends] == BODY


def test_a_head_whose_body_is_still_to_come_is_one():
    data = request()
    assert head_of(data[:-5], "").ends == len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        request()[:-40],
        request(start="GET /predict HTTP/1.1"),
        request(start="POST /predict HTTP/1.0"),
        request(start="POST /predict/ HTTP/1.1"),
        request(start="POST /predict?a=1 HTTP/1.1"),
        request(start="POST  /predict HTTP/1.1"),
        request(start="post /predict HTTP/1.1"),
        request("Transfer-Encoding: chunked"),
        request("Expect: 100-continue"),
        request("Upgrade: h2c"),
        request("Connection: close"),
        request("Connection: keep-alive, upgrade"),
        request("Content-Encoding: gzip"),
        request("Host: other"),
        request("host: other"),
        request("Content-Length: 3"),
        request("X-Forwarded-For: 1.2.3.4", "X-Forwarded-For: 5.6.7.8"),
        request("X_Request_ID: a"),
        request("X-Request-ID : a"),
        request(" folded: a"),
        request("X-Request-ID: a\r\n b"),
        request("X-Request-ID: a\rb"),
        request("X-Request-ID: a\nHost: b"),
        request("X-Request-ID: caf\xe9"),
        request("X-Request-ID: a\0"),
        request(length="+5"),
        request(length="-1"),
        request(length="0x10"),
        request(length=""),
        request(length="99999"),
        request(length="\xb2"),
        request(body=b"a" * LONGEST),
        request("X-A: " + "a" * 5000),
        request(*[f"X-{k}: a" for k in range(101)]),
        request().replace(b"Host: localhost\r\n", b""),
        request().replace(b"localhost", b"a" * 64),
        request().replace(b"localhost", b"a..b"),
        request().replace(b"\r\n", b"\n"),
    ],
)  # fmt: skip
def test_anything_else_is_left_to_gunicorn(data):
    assert head_of(data, "") is None


@pytest.fixture(scope="module")
def service(environment, tmp_path_factory):
    folder = models.model_folder(tmp_path_factory.mktemp("model"), temperature=0.01)
    settings = served(folder, tmp_path_factory.mktemp("engines")) | {"read_seconds": 2}
    with Service(tmp_path_factory.mktemp("service"), environment, **settings) as made:
        yield made


class Connection:
    """A connection by which bytes are sent as they are."""

    def __init__(self, service):
        self.socket = socket.create_connection(("127.0.0.1", service.port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, *parts):
        """Send parts of a request, a moment between them; status, header fields by their names, and body of the answer."""
        for k, part in enumerate(parts):
            time.sleep(0.1 * bool(k))
            self.socket.sendall(part)
        return self.answer()

    def answer(self):
        status = int(self.file.readline().split()[1])
        fields = {}
        while line := self.file.readline().rstrip(b"\r\n"):
            name, _, value = line.decode().partition(": ")
            fields[name] = value
        return status, fields, json.loads(self.file.read(int(fields["Content-Length"])))


def test_both_ways_answer_alike(service):
    with Connection(service) as connection:
        short = connection.ask(request("X-Request-ID: um"))
        long = connection.ask(request("X-Request-ID: um", "Accept: a", "Accept: b"))
    assert short[0] == long[0] == 200
    assert short[2] == long[2]
    assert short[1].keys() == long[1].keys()
    assert {**short[1], "Date": ""} == {**long[1], "Date": ""}


def test_both_ways_ignore_a_byte_order_mark(service):
    body = b"\xef\xbb\xbf" + BODY
    with Connection(service) as connection:
        plain, *marked = [
            connection.ask(each) for each in (request(), request(body=body), request("Accept: a", "Accept: b", body=body))
        ]
    assert [each[0] for each in marked] == [200, 200]
    assert [each[2] for each in marked] == [plain[2]] * 2
    head = head_of(request(body=body), "")
    assert Direct(Settings()).asked(None, request(body=body), head).text == "adorei o produto"


def test_both_ways_log_and_count_alike(service):
    with Connection(service) as connection:
        for way in (["X-Request-ID: curto"], ["X-Request-ID: longo", "Accept: a", "Accept: b"]):
            assert connection.ask(request(*way))[0] == 200
    lines = {}
    for name in ("curto", "longo"):
        service.wait(lambda name=name: len([line for line in service.log() if f"id={name} " in line]) == 2)
        own = [line.split(" ", 3)[3].split() for line in service.log() if f"id={name} " in line]
        lines[name] = [[part.partition("=")[0] if part.startswith(("ms=", "id=")) else part for part in line] for line in own]
    assert lines["curto"] == lines["longo"]
    metrics = service.get("/metrics")[2].decode()
    assert 'sentiment_http_requests_total{method="POST",route="/predict",status="200"}' in metrics


HOSTS = {"sentiment.example.org:8000": 200, "a" * 63: 200, "a.": 200, "[::1]:8000": 200, "a" * 3000: 400, "a..b": 400}


@pytest.mark.parametrize(("host", "status"), HOSTS.items(), ids=lambda each: str(each)[:30])
def test_both_ways_take_the_same_hosts(service, host, status):
    data = [each.replace(b"localhost", host.encode()) for each in (request(), request("Accept: a", "Accept: b"))]
    with Connection(service) as connection:
        assert [connection.ask(each)[0] for each in data] == [status] * 2


@pytest.mark.parametrize("cuts", [[30], [-5], [30, 60], [-9, -5]])
def test_a_request_may_come_in_pieces(service, cuts):
    data = request()
    places = [0, *[cut % len(data) for cut in cuts], len(data)]
    with Connection(service) as connection:
        for _ in range(2):
            parts = [data[begin:end] for begin, end in pairwise(places)]
            assert connection.ask(*parts)[0] == 200


def test_several_at_once_over_one_connection_are_answered_in_turn(service):
    texts = ["adorei", "detestei isto", "nada demais, mas serve"]
    alone = [service.predict(text)["score"] for text in texts]
    with Connection(service) as connection:
        connection.socket.sendall(b"".join(request(body=json.dumps({"text": text}).encode()) for text in texts))
        assert [connection.answer()[2]["score"] for _ in texts] == alone


def test_a_bad_text_is_refused_and_the_connection_goes_on(service):
    with Connection(service) as connection:
        assert connection.ask(request(body=b'{"text": "  "}'))[0] == 400
        assert connection.ask(request(body=b'{"text": ""}'))[0] == 422
        assert connection.ask(request(body=b'["text"]'))[0] == 422
        assert connection.ask(request(body=b'{"text": NaN}'))[0] == 422
        assert connection.ask(request())[0] == 200


@pytest.mark.parametrize("sent", [b"", request()[:30], request()[:-5]])
def test_who_does_not_send_a_request_to_its_end_is_hung_up_on(service, sent):
    with Connection(service) as connection:
        connection.socket.sendall(sent)
        assert connection.socket.recv(1) == b""


def test_a_client_that_leaves_before_its_answer_harms_nobody(service):
    for _ in range(20):
        with Connection(service) as connection:
            connection.socket.sendall(request())
    assert service.predict()["sentiment"] in ("negativo", "positivo")
