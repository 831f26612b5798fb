"""What the application asks the model, with one in its place that notes it."""

from copy import deepcopy

import pytest

from serve import app, settings


class Noted:
    """Answers texts by their length, each message as another version; `asked` holds their texts."""

    def __init__(self):
        self.asked = []

    def ask(self, message, seconds):
        assert seconds > 0
        self.asked.append(message["texts"])
        values = [round(1 / len(text), 6) for text in message["texts"]]
        results = [
            {"sentiment": "bom", "score": value, "probabilities": {"bom": value, "ruim": 1 - value}, "truncated": False}
            for value in values
        ]
        return {"results": results, "model_version": f"v{len(self.asked)}", "seconds": 0.0}


@pytest.fixture
def client(monkeypatch):
    for name in [name for name in settings.os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SERVE_LOG_FILE", "-")
    monkeypatch.setattr(app.logs, "setup", lambda _: None)
    noted = Noted()
    made = app.create_app(settings.load(), noted).test_client()
    made.noted = noted
    return made


def test_an_explanation_is_of_one_model_though_another_takes_over(client):
    body = client.post("/explain", json={"text": "muito bom mesmo"}).json
    assert client.noted.asked == [["muito bom mesmo", "bom mesmo", "muito  mesmo", "muito bom"]]
    assert body["model_version"] == "v1"
    weights = [1 / 15 - 1 / len(rest) for rest in client.noted.asked[0][1:]]
    assert [word["weight"] for word in body["words"]] == pytest.approx(weights, abs=2e-6)


def test_the_frameworks_own_document_is_left_as_it_is(client):
    own = deepcopy(client.application.api_doc)
    given = [client.get("/openapi.json").json for _ in range(2)]
    assert client.application.api_doc == own != given[0]
    assert given[0] == given[1]


def test_a_batch_is_one_message_without_its_bad_texts(client):
    body = client.post("/predict/batch", json={"texts": ["bom", "", "ruim", 7]}).json
    assert client.noted.asked == [["bom", "ruim"]]
    assert ["error" in each for each in body["results"]] == [False, True, False, True]
