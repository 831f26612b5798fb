"""What clients may rely on, over a real socket: routes, statuses, answers, documentation, keys, client addresses."""

import gzip
import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

import models
from sentiment import conversion
from sentiment.engines import Choice
from serve import observation
from serve.settings import Settings
from serving import Service

CHARS, BYTES, TEXTS = 2000, 30_000, 16  # the service's limits
KEY = "chave-de-teste-0123456789"
PREDICTION = {"sentiment", "score", "probabilities", "truncated"}
PROBLEM = {"type", "title", "status", "detail", "request_id"}
OPEN = ["/", "/health", "/live", "/ready", "/metrics", "/docs", "/openapi.json", "/demo"]
POSTED = {
    "/predict": {"text": "chegou antes do prazo"},
    "/predict/batch": {"texts": ["bom", "ruim"]},
    "/explain": {"text": "bom"},
}


def served(folder, cache):
    """Settings that serve a model at once: the choice of its engine, which is otherwise measured, is in the cache."""
    converted = conversion.folder_of(cache, folder)
    with conversion.locked(converted):
        conversion.write_choice(converted, "torch", Choice("torch", "fp32", why="chosen by the test"))
    return {"model": folder, "engine": "torch", "cache": cache}


@pytest.fixture(scope="module")
def service(environment, tmp_path_factory):
    """A service of two classes, nobody trusted and no key. Of a low temperature, so that every text has its own score."""
    folder = models.model_folder(tmp_path_factory.mktemp("model"), temperature=0.01, threshold=0.4)
    limits = {"max_texts": TEXTS, "max_text_chars": CHARS, "max_body_bytes": BYTES}
    settings = served(folder, tmp_path_factory.mktemp("engines")) | limits
    with Service(tmp_path_factory.mktemp("service"), environment, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(environment, tmp_path_factory):
    """A service with what the other leaves alone: three classes, a key, a proxy at 127.0.0.1, no texts in the log."""
    folder = models.model_folder(tmp_path_factory.mktemp("model"), labels=("ruim", "médio", "bom"), temperature=0.01)
    settings = served(folder, tmp_path_factory.mktemp("engines"))
    settings |= {"api_key": KEY, "trusted_proxies": "127.0.0.1", "log_text": "off"}
    with Service(tmp_path_factory.mktemp("guarded"), environment, **settings) as made:
        yield made


def refused(answer, status):
    """Check that an answer is a problem (RFC 9457) with a status, and tells nothing of this machine; returns its detail."""
    given, headers, body = answer
    assert (given, headers["Content-Type"]) == (status, "application/problem+json")
    assert (set(body), body["type"], body["status"]) == (PROBLEM, "about:blank", status)
    assert body["title"]
    assert body["request_id"] == headers["X-Request-ID"]
    assert not re.search(r"Traceback|\.py|/work|/home|/tmp|site-packages", json.dumps(body))
    return body["detail"]


def probabilities(service, text):
    return service.predict(text)["probabilities"]


def total(service, name, **labels):
    """A metric's value, summed over the label sets that have these labels."""
    families = text_string_to_metric_families(service.get("/metrics")[2].decode())
    samples = [each for family in families for each in family.samples if each.name == name]
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


def logged(service, headers):
    """The log's line of the request whose answer had these headers."""
    (line,) = [line for line in service.log() if " serve.request request " in line and f"id={headers['X-Request-ID']} " in line]
    return line


# Predictions.


def test_a_text_is_answered_with_its_sentiment_and_score(service):
    status, headers, body = service.post("/predict", {"text": "Este produto é excelente! Recomendo muito."})
    assert status == 200
    assert set(body) == PREDICTION | {"model_version"}
    assert body["sentiment"] in ("negativo", "positivo")
    assert body["score"] == body["probabilities"][body["sentiment"]]
    assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert body["truncated"] is False
    assert body["model_version"]
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_sentiment_is_decided_by_the_models_threshold(service):
    body = service.predict()
    assert body["sentiment"] == ("positivo" if body["probabilities"]["positivo"] >= 0.4 else "negativo")


def test_a_model_of_three_classes_is_served_with_its_labels_in_its_order(guarded):
    status, _, body = guarded.post("/predict", {"text": "o preço é bom, a entrega nem tanto"}, **{"X-API-Key": KEY})
    assert status == 200
    assert list(body["probabilities"]) == ["ruim", "médio", "bom"] == guarded.get("/health")[2]["labels"]
    assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert body["sentiment"] == max(body["probabilities"], key=body["probabilities"].get)
    assert body["score"] == body["probabilities"][body["sentiment"]]


def test_a_text_that_is_too_long_for_the_model_is_answered_by_its_beginning(service):
    beginning = "muito bom " * 20
    body = service.predict(beginning + "parou de funcionar na primeira semana " * 10)
    assert body["truncated"] is True
    assert body["probabilities"] == pytest.approx(probabilities(service, beginning), abs=1e-5)
    assert body["probabilities"] != pytest.approx(probabilities(service, "parou de funcionar " * 20), abs=1e-5)


def test_truncated_begins_where_the_models_length_ends(service):
    fits = max(n for n in range(20, 40) if not service.predict("bom " * n)["truncated"])
    assert fits == 32 - 2  # [CLS] and [SEP] take two of the model's tokens
    assert all(service.predict("bom " * n)["truncated"] for n in range(fits + 1, 40))


def test_emoji_are_read_as_words(service):
    told = probabilities(service, "chegou ontem rosto furioso")
    for written in ("chegou ontem 😡", "chegou ontem😡"):
        assert probabilities(service, written) == pytest.approx(told, abs=1e-5)
    assert probabilities(service, "chegou ontem 😍") != pytest.approx(told, abs=1e-5)


def test_blanks_around_and_between_words_change_nothing(service):
    tidy = probabilities(service, "veio quebrado do celular")
    assert probabilities(service, "  veio\n\tquebrado\u00a0 do \u200b celular\r\n") == pytest.approx(tidy, abs=1e-5)


WRONG = {
    "an empty text": b'{"text": ""}',
    "no text": b'{"texto": "bom"}',
    "a number": b'{"text": 5}',
    "null": b'{"text": null}',
    "a list": b'{"text": ["bom"]}',
    "an object": b'{"text": {"text": "bom"}}',
    "true": b'{"text": true}',
    "broken JSON": b'{"text": "bom"',
    "two values": b'{"text": "bom"} {"text": "bom"}',
    "single quotes": b"{'text': 'bom'}",
    "an empty body": b"",
    "a string": b'"bom"',
    "a string of JSON": b'"{\\"text\\": \\"bom\\"}"',
    "an array": b'[{"text": "bom"}]',
    "a null": b"null",
    "a form": b"text=bom",
}


@pytest.mark.parametrize("path", ["/predict", "/explain"])
@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_a_body_that_is_not_as_documented_is_422(service, path, body):
    assert refused(service.request("POST", path, body, {"Content-Type": "application/json"}), 422)


def test_a_422_names_the_field_and_does_not_repeat_what_was_sent(service):
    detail = refused(service.post("/predict", {"text": ["segredo"], "outro": "sigilo"}), 422)
    assert detail.startswith("text: ")
    assert not re.search("segredo|sigilo", detail)


@pytest.mark.parametrize("path", ["/predict", "/explain"])
@pytest.mark.parametrize("text", [" ", "\n\n\t", "\0", "\u200b", "\u00a0\u3000", "\ufeff \u2028\u0000"], ids=ascii)
def test_a_text_of_blanks_alone_is_400(service, path, text):
    assert "blanks" in refused(service.post(path, {"text": text}), 400)


def test_a_text_may_have_as_many_characters_as_the_limit_says(service):
    assert service.post("/predict", {"text": "ã" * CHARS})[0] == 200
    assert service.post("/predict", {"text": "😍" * CHARS})[0] == 200
    assert str(CHARS) in refused(service.post("/predict", {"text": "ã" * (CHARS + 1)}), 422)


@pytest.mark.parametrize("path", list(POSTED))
def test_a_body_that_is_too_large_is_413(service, path):
    body = json.dumps(POSTED[path]).encode().ljust(BYTES)
    assert service.request("POST", path, body)[0] == 200
    refused(service.request("POST", path, body + b" "), 413)


@pytest.mark.parametrize("path", list(POSTED))
def test_a_body_in_chunks_that_is_too_large_is_413(service, path):
    body = json.dumps(POSTED[path]).encode().ljust(BYTES)
    assert service.request("POST", path, iter([body[:100], body[100:]]))[0] == 200
    refused(service.request("POST", path, iter([body, b" "])), 413)
    refused(service.request("POST", path, iter([body, b"mais"])), 413)


JSON_TYPES = {"none": {}, "charset": {"Content-Type": "application/json; charset=utf-8"}, "curl": {"Content-Type": "text/plain"}}


@pytest.mark.parametrize("headers", JSON_TYPES.values(), ids=JSON_TYPES)
def test_json_is_read_whatever_its_content_type_says(service, headers):
    status, _, body = service.request("POST", "/predict", '{"text": "não gostei"}'.encode(), headers)
    assert (status, body["probabilities"]) == (200, pytest.approx(probabilities(service, "não gostei"), abs=1e-5))


@pytest.mark.parametrize("path", list(POSTED))
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity, gzip"])
def test_a_compressed_body_is_415(service, path, encoding):
    body = gzip.compress(json.dumps(POSTED[path]).encode())
    detail = refused(service.request("POST", path, body, {"Content-Encoding": encoding}), 415)
    assert "Content-Encoding" in detail


def test_a_body_may_be_said_to_be_plain(service):
    assert service.post("/predict", {"text": "bom"}, **{"Content-Encoding": "identity"})[0] == 200


@pytest.mark.parametrize("path", list(POSTED))
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_a_body_in_another_encoding_is_422_and_told_to_be_utf_8(service, path, encoding):
    body = json.dumps(POSTED[path] | {"title": "não"}, ensure_ascii=False).encode(encoding)
    headers = {"Content-Type": f"application/json; charset={encoding}"}
    assert "send it in UTF-8" in refused(service.request("POST", path, body, headers), 422)


@pytest.mark.parametrize(("path", "body"), POSTED.items())
def test_fields_that_nobody_knows_are_ignored(service, path, body):
    assert service.post(path, body | {"lang": "pt", "": None, "model_version": [1]})[0] == 200


# Batches.


def test_a_batch_is_answered_in_its_order_as_each_text_alone(service):
    texts = ["adorei o produto", "não gostei da panela", "veio quebrado", "excelente qualidade " * 30, "bom", "😍"]
    status, _, body = service.post("/predict/batch", {"texts": texts})
    assert (status, set(body)) == (200, {"results", "model_version"})
    assert all(set(result) == PREDICTION for result in body["results"])
    for text, result in zip(texts, body["results"], strict=True):
        alone = service.predict(text)
        assert result["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
        assert (result["sentiment"], result["truncated"]) == (alone["sentiment"], alone["truncated"])
        assert body["model_version"] == alone["model_version"]


BAD = [("", 422), (" \n\u200b", 400), (None, 422), (7, 422), (["bom"], 422), ({"text": "bom"}, 422), ("ã" * (CHARS + 1), 422)]


def test_a_bad_text_in_a_batch_spoils_no_other(service):
    texts = ["veio quebrado", *(text for text, _ in BAD), "funciona bem"]
    status, headers, body = service.post("/predict/batch", {"texts": texts})
    assert status == 200
    first, *middle, last = body["results"]
    assert first["probabilities"] == pytest.approx(probabilities(service, "veio quebrado"), abs=1e-5)
    assert last["probabilities"] == pytest.approx(probabilities(service, "funciona bem"), abs=1e-5)
    assert [list(result) for result in middle] == [["error"]] * len(BAD)
    assert [result["error"]["status"] for result in middle] == [expected for _, expected in BAD]
    assert all(set(result["error"]) == PROBLEM for result in middle)
    assert {result["error"]["request_id"] for result in middle} == {headers["X-Request-ID"]}


def test_a_batch_of_bad_texts_alone_is_answered_with_their_errors(service):
    status, _, body = service.post("/predict/batch", {"texts": [text for text, _ in BAD]})
    assert (status, body["model_version"]) == (200, None)
    assert [result["error"]["status"] for result in body["results"]] == [expected for _, expected in BAD]


@pytest.mark.parametrize("texts", [[], "bom", {"0": "bom"}, None, ["bom"] * (TEXTS + 1)], ids=str)
def test_a_batch_of_no_texts_or_too_many_or_no_list_is_422(service, texts):
    assert refused(service.post("/predict/batch", {"texts": texts}), 422).startswith("texts: ")


def test_a_batch_may_have_as_many_texts_as_the_limit_says(service):
    status, _, body = service.post("/predict/batch", {"texts": ["bom"] * TEXTS})
    assert (status, len(body["results"])) == (200, TEXTS)


# Explanations.


def test_an_explanations_offsets_are_code_points_of_the_text(service):
    text = "😍👩‍🔧 adorei o guarda-roupa,\n não veio quebrado!"
    status, _, body = service.post("/explain", {"text": text})
    assert status == 200
    assert [text[word["start"] : word["end"]] for word in body["words"]] == [word["word"] for word in body["words"]]
    found = [word["word"] for word in body["words"]]
    assert found == ["😍👩‍🔧", "adorei", "o", "guarda-roupa", ",", "não", "veio", "quebrado", "!"]
    assert set(body) == PREDICTION | {"model_version", "method", "explained", "words", "words_left_out"}


def test_a_words_weight_is_what_the_probability_loses_without_it(service):
    body = service.post("/explain", {"text": "adorei o produto mas veio quebrado"})[2]
    label = body["explained"]
    assert (label, body["words_left_out"]) == (body["sentiment"], 0)
    assert body["probabilities"] == pytest.approx(probabilities(service, "adorei o produto mas veio quebrado"), abs=1e-5)
    for k, without in ((0, "o produto mas veio quebrado"), (2, "adorei o mas veio quebrado"), (5, "adorei o produto mas veio")):
        assert body["words"][k]["weight"] == pytest.approx(body["score"] - probabilities(service, without)[label], abs=1e-5)


def test_weights_change_when_the_word_changes(service):
    weights = [
        [each["weight"] for each in service.post("/explain", {"text": f"produto {word} demais"})[2]["words"]]
        for word in ("bom", "péssimo", "quebrado")
    ]
    assert all(max(map(abs, one)) > 5e-6 for one in weights)
    assert len({tuple(one) for one in weights}) == 3


def test_a_text_of_one_word_is_explained(service):
    body = service.post("/explain", {"text": "recomendo"})[2]
    assert [(word["word"], word["start"], word["end"]) for word in body["words"]] == [("recomendo", 0, 9)]
    assert body["words"][0]["weight"] == pytest.approx(body["score"] - probabilities(service, ".")[body["explained"]], abs=1e-5)


def test_words_beyond_what_is_examined_are_counted(service):
    body = service.post("/explain", {"text": "bom " * 40})[2]
    assert len(body["words"]) + body["words_left_out"] == 40
    assert 0 < len(body["words"]) < TEXTS


# Errors, ids, methods, files.

ERRORS = {
    "400": ("POST", "/predict", b'{"text": " "}', 400),
    "404": ("GET", "/nada", None, 404),
    "404 of a POST": ("POST", "/predict/", b'{"text": "bom"}', 404),
    "405": ("GET", "/predict", None, 405),
    "413": ("POST", "/predict", b" " * (BYTES + 1), 413),
    "422": ("POST", "/predict", b"{", 422),
}


@pytest.mark.parametrize(("method", "path", "body", "status"), ERRORS.values(), ids=ERRORS)
def test_every_error_is_a_problem_with_the_clients_request_id(service, method, path, body, status):
    answer = service.request(method, path, body, {"X-Request-ID": "pedido-42"})
    refused(answer, status)
    assert answer[1]["X-Request-ID"] == "pedido-42"


LARGE = {"404": ("/nada", 200_000, 404), "405": ("/health", 300_000, 405), "413": ("/predict", 2_000_000, 413)}


@pytest.mark.parametrize(("path", "size", "status"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_to_more_than_is_read_says_that_its_connection_ends(service, path, size, status, chunked):
    body = b" " * size
    answer = service.request("POST", path, iter([body]) if chunked else body)
    refused(answer, status)
    assert answer[1]["Connection"] == "close"


@pytest.mark.parametrize(
    ("path", "size", "chunked"), [("/nada", 60_000, False), ("/predict", BYTES + 1, False), ("/predict", 9, True)]
)
def test_a_connection_is_kept_where_little_was_left_unread(service, path, size, chunked):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    for _ in range(3):
        connection.request("POST", path, iter([b" " * size]) if chunked else b" " * size)
        first, response = connection.sock, connection.getresponse()
        response.read()
        assert (response.headers["Connection"], connection.sock) == ("keep-alive", first)
    connection.close()


METHODS = [("/predict", "GET"), ("/predict", "PUT"), ("/explain", "DELETE"), ("/predict/batch", "PATCH"), ("/health", "POST")]


@pytest.mark.parametrize(("path", "method"), [*METHODS, ("/docs", "POST"), ("/live", "TRACE")])
def test_a_method_that_a_route_has_not_is_405_with_those_it_has(service, path, method):
    status, headers, _ = service.request(method, path)
    assert status == 405
    assert set(headers["Allow"].split(", ")) == ({"POST", "OPTIONS"} if path in POSTED else {"GET", "HEAD", "OPTIONS"})


@pytest.mark.parametrize("given", ["7f3a", "A.b_c:d-9", "x" * 128])
def test_the_clients_request_id_comes_back(service, given):
    assert service.get("/live", **{"X-Request-ID": given})[1]["X-Request-ID"] == given
    assert service.post("/predict", {"text": "bom"}, **{"X-Request-ID": given})[1]["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "não", "a,b", "id=1", "%0d%0aX: y", "<script>", '"'])
def test_a_malformed_request_id_is_replaced(service, given):
    headers = service.get("/nada", **{"X-Request-ID": given})[1]
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-ID"])


def test_requests_without_an_id_get_different_ones(service):
    assert len({service.get("/live")[1]["X-Request-ID"] for _ in range(20)}) == 20


@pytest.mark.parametrize("path", OPEN)
def test_head_is_answered_as_get_without_a_body(service, path):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    connection.request("HEAD", path)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    assert response.headers["Content-Type"] == service.get(path)[1]["Content-Type"]
    connection.request("GET", "/live")  # a body behind the HEAD's answer would be read as this one's
    assert connection.getresponse().status == 200
    connection.close()


TRAVERSALS = [
    "../app.py", "%2e%2e/app.py", "..%2fapp.py", "..%5capp.py", "%2e%2e%2f%2e%2e%2fREADME.md", "....//app.py",
    "%252e%252e%252fapp.py", "./../../params.yaml", "..%c0%afapp.py", "%2fetc%2fpasswd", "/etc/passwd", "%5cetc%5cpasswd",
    "swagger/../../app.py", "swagger/..%2f..%2f__init__.py", "swagger/../../../../../../../../etc/passwd",
    "swagger/%2fetc%2fpasswd", "demo.html%00.css", "%00", ".", "..", "swagger", "swagger/", "",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_file_outside_the_static_folder_is_served(service, path):
    status, headers, body = service.get(f"/static/{path}")
    if status == 308:  # slashes side by side are merged
        status, headers, body = service.get(urlsplit(headers["Location"]).path)
    refused((status, headers, body), 404)


# What the service says of itself.


def test_the_root_names_the_routes_and_each_is_there(service):
    status, _, body = service.get("/")
    assert (status, body["name"], body["status"]) == (200, "sentiment", "ok")
    assert body["version"] == service.predict()["model_version"]
    assert {route.split()[1] for route in body["routes"]} >= {*OPEN[1:], *POSTED}
    for route in body["routes"]:
        method, path = route.split()
        assert method in service.request("OPTIONS", path)[1]["Allow"].split(", ")


def test_health_names_the_model_and_the_time(service):
    status, headers, body = service.get("/health")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (body["status"], body["model_loaded"], body["device"], body["failure"]) == ("ok", True, "cpu", None)
    assert body["model_version"] == service.predict()["model_version"]
    assert body["text"] == ["text"]
    given = datetime.fromisoformat(body["timestamp"])
    assert given.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - given) < timedelta(minutes=1)


def test_live_and_ready_are_200_with_a_model(service):
    assert service.get("/live")[::2] == (200, {"status": "alive"})
    assert service.get("/ready")[::2] == (200, {"status": "ready"})


def test_metrics_count_every_request_of_all_processes_once(service):
    assert len(service.children()["workers"]) == 2
    answered = {"name": "sentiment_http_requests_total", "method": "POST", "route": "/predict", "status": "200"}
    timed, classified = {"name": "sentiment_http_request_seconds_count", "route": "/predict"}, "sentiment_predictions_total"
    before = total(service, **answered), total(service, **timed), total(service, classified)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: service.predict(), range(60)))
    for _ in range(8):  # whichever process answers
        after = total(service, **answered), total(service, **timed), total(service, classified)
        assert [now - then for now, then in zip(after, before, strict=True)] == [60, 60, 60]


def test_metrics_count_errors_by_route_and_status(service):
    before = [total(service, "sentiment_http_requests_total", status=status) for status in ("422", "404")]
    for _ in range(5):
        service.post("/predict", {"text": ""})
        service.get("/um/caminho/qualquer")
    assert [total(service, "sentiment_http_requests_total", status=s) for s in ("422", "404")] == [each + 5 for each in before]
    assert "/um/caminho/qualquer" not in service.get("/metrics")[2].decode()  # a label of each client's own would fill the memory


def test_metrics_count_truncated_texts_and_name_the_model(service):
    before = total(service, "sentiment_truncated_texts_total")
    service.post("/predict/batch", {"texts": ["bom " * 200, "bom", "ruim " * 200]})
    assert total(service, "sentiment_truncated_texts_total") == before + 2
    version = service.predict()["model_version"]
    assert total(service, "sentiment_model_info", version=version, engine="torch", precision="fp32") == 1
    assert total(service, "sentiment_model_loaded") == 1


# The documentation and the pages.


class Links(HTMLParser):
    """The addresses that a page loads or links to."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "html": "text/html"}


@pytest.mark.parametrize("path", ["/docs", "/demo"])
def test_a_page_loads_only_files_that_are_served_here(service, path):
    status, headers, page = service.get(path)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"http://" not in page
    assert b"https://" not in page
    links = Links(page.decode()).found
    assert links
    for link in links:
        status, headers, data = service.get(urljoin(path, link))
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, TYPES[link.rpartition(".")[2]])
        assert data


@pytest.mark.parametrize("path", ["/docs", "/demo"])
def test_a_page_tells_the_browser_to_load_nothing_from_elsewhere(service, path):
    policy = service.get(path)[1]["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert (rules["default-src"], rules["frame-ancestors"]) == ("'self'", "'none'")
    assert "script-src" not in rules
    assert not re.search(r"http|\*|unsafe-eval", policy)


def test_swagger_ui_shows_this_services_own_document(service):
    script = service.get("/static/docs.js")[2].decode()
    assert 'url: "openapi.json"' in script
    assert "validatorUrl: null" in script  # Swagger's default sends the document's address to swagger.io


@pytest.fixture(scope="module")
def document(service):
    status, headers, body = service.get("/openapi.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return body


def test_the_document_is_openapi_3_1_and_describes_the_routes(service, document):
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    described = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    pages = {"GET /docs", "GET /openapi.json", "GET /demo"}
    assert described | pages == {"GET /"} | set(service.get("/")[2]["routes"])


def schema_of(document, path):
    """The schema of a POST's body."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    return document["components"]["schemas"][name]


def test_the_document_tells_this_services_limits(document):
    text = schema_of(document, "/predict")["properties"]["text"]
    texts = schema_of(document, "/predict/batch")["properties"]["texts"]
    assert (text["minLength"], text["maxLength"]) == (1, CHARS)
    assert (texts["minItems"], texts["maxItems"]) == (1, TEXTS)


def test_the_document_tells_the_statuses_of_bodies_where_there_is_one(document):
    of_bodies = {"413", "415", "422"}
    for methods in document["paths"].values():
        for method, operation in methods.items():
            assert of_bodies & operation["responses"].keys() == (of_bodies if method == "post" else set())


@pytest.mark.parametrize("path", list(POSTED))
def test_the_documents_examples_are_valid_requests(service, document, path):
    schema = schema_of(document, path)
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    whole = [content["example"]] if "example" in content else [each["value"] for each in content.get("examples", {}).values()]
    whole += schema.get("examples", [])
    fields = {name: each["examples"] for name, each in schema["properties"].items() if each.get("examples")}
    bodies = whole or [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    assert bodies
    for body in bodies:
        status, _, answer = service.post(path, body)
        assert status == 200
        assert "error" not in json.dumps(answer)


# The API key.

WRONG_KEYS = {
    "none": {},
    "empty": {"X-API-Key": ""},
    "another": {"X-API-Key": "chave-de-teste-9876543210"},
    "its beginning": {"X-API-Key": KEY[:-1]},
    "longer": {"X-API-Key": KEY + "0"},
    "another bearer": {"Authorization": "Bearer outra"},
    "basic": {"Authorization": "Basic Y2hhdmU6"},
    "Latin-1": {"X-API-Key": "chave-de-são-paulo"},
    "UTF-8": {"X-API-Key": "chave-😍".encode()},
    "a bearer in UTF-8": {"Authorization": "Bearer ção".encode()},
}


@pytest.mark.parametrize("path", list(POSTED))
@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_prediction_without_the_key_is_401(guarded, path, headers):
    refused(guarded.post(path, POSTED[path], **headers), 401)


def test_a_401_to_more_than_is_read_says_that_its_connection_ends(guarded):
    answer = guarded.request("POST", "/predict", b" " * 200_000, WRONG_KEYS["another"])
    refused(answer, 401)
    assert answer[1]["Connection"] == "close"


@pytest.mark.parametrize("path", list(POSTED))
@pytest.mark.parametrize("headers", [{"X-API-Key": KEY}, {"x-api-key": KEY}, {"Authorization": f"Bearer {KEY}"}], ids=str)
def test_a_prediction_with_the_key_is_200(guarded, path, headers):
    assert guarded.post(path, POSTED[path], **headers)[0] == 200


def test_the_bearer_scheme_may_be_written_in_any_case(guarded):
    assert guarded.post("/predict", {"text": "bom"}, Authorization=f"bearer {KEY}")[0] == 200


def test_a_401_says_which_scheme_it_wants(guarded):
    assert "Bearer" in guarded.post("/predict", {"text": "bom"})[1].get("WWW-Authenticate", "")


@pytest.mark.parametrize("path", [*OPEN, "/static/demo.css"])
def test_what_is_no_prediction_needs_no_key(guarded, path):
    assert guarded.get(path)[0] == 200


def test_the_document_tells_that_a_key_is_needed(guarded):
    document = guarded.get("/openapi.json")[2]
    (name,) = document["paths"]["/predict"]["post"]["security"][0]
    assert document["components"]["securitySchemes"][name]["name"] == "X-API-Key"
    assert "security" not in document["paths"]["/health"]["get"]


def test_no_key_that_was_sent_is_in_the_log(guarded):
    guarded.post("/predict", {"text": "bom"}, **{"X-API-Key": KEY})
    guarded.post("/predict", {"text": "bom"}, **{"X-API-Key": "chave-errada-12345"})
    assert not re.search(f"{KEY}|chave-errada-12345", guarded.log_file.read_text(encoding="utf-8") + guarded.tail())


def test_no_text_is_in_the_log_where_log_text_is_off(guarded):
    headers = guarded.post("/predict", {"text": "um segredo de família"}, **{"X-API-Key": KEY})[1]
    (line,) = [each for each in guarded.log() if "serve.prediction" in each and headers["X-Request-ID"] in each]
    assert " chars=21" in line
    assert not re.search("segredo|sha256|text=", guarded.log_file.read_text(encoding="utf-8") + guarded.tail())


# Who the client is.


def test_nobodys_word_on_the_clients_address_is_believed_by_default(service):
    headers = service.get("/live", **{"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"})[1]
    assert " client=127.0.0.1 " in logged(service, headers)


FORWARDED = {
    "no header": ({}, "127.0.0.1"),
    "one hop": ({"X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
    "a forged left-most one": ({"X-Forwarded-For": "198.51.100.66, 203.0.113.9"}, "203.0.113.9"),
    "a forged trusted one": ({"X-Forwarded-For": "127.0.0.1, 203.0.113.9"}, "203.0.113.9"),
    "two proxies": ({"X-Forwarded-For": "198.51.100.66, 203.0.113.9, 127.0.0.1"}, "203.0.113.9"),
    "IPv6": ({"X-Forwarded-For": "2001:db8::7"}, "2001:db8::7"),
    "empty": ({"X-Forwarded-For": " , "}, "127.0.0.1"),
    "another header": ({"X-Real-IP": "203.0.113.9", "Forwarded": "for=203.0.113.9"}, "127.0.0.1"),
}


@pytest.mark.parametrize(("headers", "client"), FORWARDED.values(), ids=FORWARDED)
def test_a_trusted_proxys_word_on_the_clients_address_is_believed(guarded, headers, client):
    assert f" client={client} " in logged(guarded, guarded.get("/live", **headers)[1])


MAPPED = {"a proxy": ("::ffff:127.0.0.1", "203.0.113.9"), "a client": ("::ffff:198.51.100.66", "198.51.100.66"),
          "IPv6": ("2001:db8::7", "2001:db8::7")}  # fmt: skip


@pytest.mark.parametrize(("address", "client"), MAPPED.values(), ids=MAPPED)
def test_an_address_of_ipv4_is_one_on_a_socket_of_ipv6_too(address, client):
    settings = Settings(trusted_proxies="127.0.0.0/8")
    environ = {"REMOTE_ADDR": address, "HTTP_X_FORWARDED_FOR": "::ffff:203.0.113.9"}
    assert observation.client_address(environ, settings) == client


def test_a_proxy_may_add_a_header_of_its_own_behind_a_forged_one(guarded):
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=20)
    connection.putrequest("GET", "/live")
    connection.putheader("X-Forwarded-For", "198.51.100.66")
    connection.putheader("X-Forwarded-For", "203.0.113.9")
    connection.endheaders()
    response = connection.getresponse()
    response.read()
    connection.close()
    assert " client=203.0.113.9 " in logged(guarded, response.headers)
