"""What the model's process says of the questions that it takes, with a model that only counts words in its place."""

import threading
import time

import numpy as np
import pytest

from serve import metrics, settings
from serve.predictor import Predictor


class Words:
    """A model that answers with the number of a text's words; `batch_tokens` of them at a time, once `go` is set."""

    lanes = ()
    batch_tokens = 8
    version = "v1.0.0"

    def __init__(self):
        self.go = threading.Event()

    def encode(self, texts):
        return [np.zeros(len(value.split()), np.int64) for value in texts], [False] * len(texts)

    def logits(self, reviews):
        self.go.wait(30)
        return np.array([[len(each)] for each in reviews], np.float32)

    def answers(self, logits, cut):
        return [{"words": int(row[0])} for row in logits]


class Peer:
    """Keeps what is sent, with the texts that the metrics said to wait at that moment."""

    def __init__(self):
        self.sent, self.came = [], threading.Condition()

    def send(self, *messages):
        with self.came:
            self.sent += [(message, metrics.queue._value.get()) for message in messages]
            self.came.notify_all()

    def wait_for(self, number):
        with self.came:
            assert self.came.wait_for(lambda: len(self.sent) >= number, 30)
            return self.sent


@pytest.fixture
def predictor(monkeypatch, tmp_path):
    for name in [name for name in settings.os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)
    made = Predictor(settings.load(), tmp_path)
    made.watcher.model = Words()
    made.watcher.looked.set()
    made.batcher.start()
    yield made
    made.watcher.model.go.set()
    made.close()


def question(number, texts, seconds):
    return {"do": "predict", "id": number, "texts": texts, "deadline": time.monotonic() + seconds}


def test_texts_that_nobody_waits_for_any_more_do_not_count_as_waiting(predictor):
    peer = Peer()
    predictor.predict([question(k, ["muito bom"] * 100, -1) for k in range(3)], peer)
    sent = peer.wait_for(3)
    assert [message["status"] for message, _ in sent] == [504] * 3
    assert sent[-1][1] == 0


def test_the_texts_that_wait_are_counted_until_they_are_computed(predictor):
    peer = Peer()
    predictor.predict([question(0, ["bom"] * 4, 60)], peer)
    predictor.predict([question(1, ["muito bom"] * 10, 60)], peer)
    waiting = metrics.queue._value.get()
    assert 10 <= waiting <= 14
    predictor.watcher.model.go.set()
    sent = {message["id"]: message["results"] for message, _ in peer.wait_for(2)}
    assert sent == {0: [{"words": 1}] * 4, 1: [{"words": 2}] * 10}
