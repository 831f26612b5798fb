"""Messages between the processes: where one does not listen, the other hears of it."""

import socket
import subprocess
import sys

import pytest

from serve.predictor import send_limit
from serve.wire import Client, Link, Peer, Stream, packed
from serving import ROOT


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def test_messages_are_found_however_they_are_cut():
    messages = [{"id": k, "texts": ["ação" * k]} for k in range(5)]
    data = b"".join(map(packed, messages))
    for size in (1, 3, 7, 1000):
        stream = Stream()
        assert [found for k in range(0, len(data), size) for found in stream.feed(data[k : k + size])] == messages


def test_who_does_not_take_answers_is_hung_up_on(pair):
    ours, theirs = pair
    send_limit(ours, 0.05)
    with pytest.raises(OSError, match=r"unavailable|timed out"):
        Peer(ours).send({"results": ["x" * 10_000_000]})
    while theirs.recv(1 << 20):
        pass  # to the end, which comes


def test_a_link_has_no_connection_where_nobody_listens_or_takes_any(tmp_path):
    link = Link(tmp_path / "none.sock")
    assert link.connect() is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "full.sock"))
        listener.listen(0)
        links = [Link(tmp_path / "full.sock") for _ in range(4)]
        assert links[0].connect()
        assert [each.connect() for each in links[1:]][-1] is None
        with pytest.raises(Exception, match=r"does not answer|timed out"):
            Client(tmp_path / "full.sock").ask({"do": "describe"}, 0.2)
        for each in links:
            each.drop()


def test_a_dead_thread_ends_the_models_process():
    code = """
import threading
from serve import predictor
threading.excepthook = predictor.end
thread = threading.Thread(target=lambda: 1 / 0, name="inference 0")
thread.start()
thread.join()
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "inference 0" in done.stderr
