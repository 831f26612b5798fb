"""Which texts are computed together: budget, order, fairness, back-pressure, deadlines."""

import threading
import time
from collections import deque
from itertools import combinations

import numpy as np
import pytest

from serve.batcher import BATCHES, Batcher, FullError, Request, each_done, filling, pick


class Doubling:
    """A model whose logits are twice the length of each text; it can be held back, and keeps what it was given."""

    lanes = ()

    def __init__(self, batch_tokens=64):
        self.batch_tokens = batch_tokens
        self.batches = []
        self.go = threading.Event()
        self.go.set()

    def logits(self, reviews):
        self.go.wait(10)
        self.batches.append([len(ids) for ids in reviews])
        return np.array([[2.0 * len(ids)] for ids in reviews])


class Client:
    """A request and what it was answered."""

    def __init__(self, model, *lengths, seconds=30.0):
        self.results, self.answered = [], threading.Event()
        self.request = Request(model, [np.ones(n, np.int64) for n in lengths], self.done, time.monotonic() + seconds)

    def done(self, result):
        self.results.append(result)
        self.answered.set()

    def wait(self):
        assert self.answered.wait(10)
        return self.results[0]


def submitted(batcher, model, *lengths):
    client = Client(model, *lengths)
    batcher.submit(client.request)
    return client


def wait_until(what):
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def model():
    return Doubling()


@pytest.fixture
def batcher():
    made = Batcher(places=64)
    made.start()
    yield made
    made.close()


def picked(model, *requests):
    """The lengths picked from requests, given as lists of lengths; which request each is of."""
    line = deque(Client(model, *lengths).request for lengths in requests)
    order = {id(request): number for number, request in enumerate(line)}
    return [(order[id(request)], len(request.reviews[index])) for request, index in pick(line, model, 64)]


def test_a_batch_holds_no_more_than_its_budget(model):
    assert picked(model, [30], [30], [30]) == [(0, 30), (1, 30)]


def test_a_text_longer_than_the_budget_goes_alone(model):
    assert picked(model, [500], [4]) == [(0, 500)]


def test_a_short_text_fills_what_a_long_one_leaves(model):
    assert picked(model, [40], [40], [20]) == [(0, 40), (2, 20)]


def test_the_oldest_request_is_in_every_batch(model):
    line = deque(Client(model, *lengths).request for lengths in ([60], [4], [4], [4], [60]))
    batches = []
    while any(request.left for request in line):
        line = deque(request for request in line if request.left)
        oldest = line[0]
        batches.append(pick(line, model, 64))
        assert batches[-1][0][0] is oldest
    assert len(batches) == 3


def test_one_large_request_does_not_hold_up_the_small_ones(model):
    assert picked(model, [16] * 100, [16], [16]) == [(0, 16), (1, 16), (2, 16), (0, 16)]


def test_texts_of_two_models_are_not_mixed(model):
    other = Doubling()
    line = deque([Client(model, 8).request, Client(other, 8).request, Client(model, 8).request])
    assert [request for request, _ in pick(line, model, 64)] == [line[0], line[2]]


def test_answers_come_in_the_order_of_the_texts(batcher, model):
    client = Client(model, 30, 4, 60, 12, 7)
    batcher.submit(client.request)
    assert client.wait()[:, 0].tolist() == [60, 8, 120, 24, 14]


def test_what_waits_together_is_computed_together(batcher, model):
    model.go.clear()
    first, *rest = [Client(model, 10) for _ in range(7)]
    batcher.submit(first.request)
    while batcher.waiting:
        time.sleep(0.001)
    for client in rest:
        batcher.submit(client.request)
    model.go.set()
    assert [client.wait()[0, 0] for client in (first, *rest)] == [20] * 7
    assert model.batches == [[10], [10] * 6]


def test_a_full_line_refuses_and_says_when_to_come_again(model):
    batcher = Batcher(places=4)  # not started: nothing is taken
    for _ in range(4):
        batcher.submit(Client(model, 10).request)
    with pytest.raises(FullError) as error:
        batcher.submit(Client(model, 10).request)
    assert error.value.retry_after >= 1
    assert batcher.waiting == 4


def test_texts_of_others_keep_out_a_request_of_many_but_not_one_of_a_single_text(model):
    batcher = Batcher(places=64, text_places=10)
    batcher.submit(Client(model, *[8] * 10).request)
    with pytest.raises(FullError):
        batcher.submit(Client(model, 8, 8).request)
    batcher.submit(Client(model, 8).request)


def test_places_are_free_again_after_an_answer(model):
    batcher = Batcher(places=2)
    clients = [Client(model, 10), Client(model, 10)]
    for client in clients:
        batcher.submit(client.request)
    batcher.start()
    for client in clients:
        client.wait()
    batcher.submit(Client(model, 10).request)
    batcher.close()
    assert (batcher.waiting, batcher.waiting_tokens) == (0, 0)


def test_what_a_batch_completes_is_delivered_together(model):
    found = []
    batcher = Batcher(places=64, deliver=lambda requests: found.append([request.logits for request in requests]))
    for lengths in ([10], [11, 30], [12]):
        batcher.submit(Client(model, *lengths).request)
    batcher.start()
    batcher.close()
    assert model.batches == [[10, 11, 12, 30]]
    assert sorted([float(row[0]) for row in logits] for logits in found[0]) == [[20], [22, 60], [24]]


def test_answers_that_cannot_be_delivered_fail_their_requests_and_not_the_next(model):
    found = []

    def deliver(requests):
        found.append(len(requests))
        if len(found) == 1:
            raise ValueError("nada feito")
        each_done(requests)

    batcher = Batcher(places=64, deliver=deliver)
    bad, good = Client(model, 10, 11), Client(model, 8)
    batcher.submit(bad.request)
    batcher.start()
    assert isinstance(bad.wait(), ValueError)
    batcher.submit(good.request)
    assert good.wait()[0, 0] == 16
    batcher.close()
    assert len(bad.results) == 1


def test_a_failing_model_fails_its_requests_and_not_the_next(batcher, model):
    class Failing(Doubling):
        def logits(self, reviews):
            raise ValueError("nada feito")

    bad, good = Client(Failing(), 8, 70, 70), Client(model, 8)
    batcher.submit(bad.request)
    assert isinstance(bad.wait(), ValueError)
    batcher.submit(good.request)
    assert good.wait()[0, 0] == 16
    assert len(bad.results) == 1
    assert (batcher.waiting, batcher.waiting_tokens) == (0, 0)


def test_a_failure_leaves_those_that_wait_beside_it_alone(batcher, model):
    class Failing(Doubling):
        def logits(self, reviews):
            super().logits(reviews)
            raise ValueError("nada feito")

    failing = Failing()
    failing.go.clear()
    bad = [submitted(batcher, failing, 8)]
    wait_until(lambda: batcher.computing)
    bad += [submitted(batcher, failing, 8, 70) for _ in range(3)] + [submitted(batcher, failing, 9)]
    good = submitted(batcher, model, 8)
    failing.go.set()
    assert all(isinstance(client.wait(), ValueError) for client in bad)
    assert good.wait()[0, 0] == 16
    assert [len(client.results) for client in bad] == [1] * 5
    assert (batcher.waiting, batcher.waiting_tokens, batcher.busy) == (0, 0, [])


def test_a_late_request_in_the_middle_of_the_line_is_given_up(model):
    batcher = Batcher(places=64)
    clients = [Client(model, 8, seconds=seconds) for seconds in (30, -1, 30, -1)]
    for client in clients:
        batcher.submit(client.request)
    batcher.start()
    assert [isinstance(client.wait(), TimeoutError) for client in clients] == [False, True, False, True]
    assert model.batches == [[8, 8]]
    batcher.close()


def test_a_client_that_is_slow_to_hear_that_it_is_late_holds_up_nobody(batcher, model):
    heard, late = threading.Event(), Client(model, 9, seconds=-1)
    late.request.done = lambda _: heard.wait(10)
    batcher.submit(late.request)
    wait_until(lambda: not batcher.waiting)
    line = threading.Thread(target=lambda: batcher.submit(Client(model, 8).request))
    line.start()
    line.join(5)
    assert not line.is_alive()
    heard.set()


def test_a_late_request_is_given_up_and_not_computed(batcher, model):
    late, good = Client(model, 9, seconds=-1), Client(model, 8)
    batcher.submit(late.request)
    batcher.submit(good.request)
    assert isinstance(late.wait(), TimeoutError)
    good.wait()
    assert model.batches == [[8]]


def test_what_was_taken_is_finished_at_the_end(model):
    batcher = Batcher(places=64)
    clients = [Client(model, 40) for _ in range(5)]
    for client in clients:
        batcher.submit(client.request)
    batcher.start()
    batcher.close()
    assert all(client.answered.is_set() for client in clients)


@pytest.fixture
def patient(model):
    """A batcher that has computed two texts together, and would wait for such company for long."""
    batcher = Batcher(places=64, wait_seconds=30)
    for client in (clients := [Client(model, 10), Client(model, 10)]):
        batcher.submit(client.request)
    batcher.start()
    assert [client.wait().tolist() for client in clients] == [[[20]], [[20]]]
    yield batcher
    batcher.close()


def test_a_text_waits_for_those_that_came_along_lately(patient, model):
    wait_until(lambda: not patient.computing)
    first = submitted(patient, model, 11)
    time.sleep(0.05)
    assert not first.results
    submitted(patient, model, 12).wait()
    first.wait()
    assert model.batches == [[10, 10], [11, 12]]


def test_it_waits_for_company_a_share_of_the_time_that_a_batch_takes(patient, model):
    patient.wait_share = 0.25
    wait_until(lambda: not patient.computing)
    assert submitted(patient, model, 11).wait()[0, 0] == 22
    assert model.batches == [[10, 10], [11]]


def test_a_full_batch_waits_for_nobody(patient, model):
    wait_until(lambda: not patient.computing)
    assert submitted(patient, model, 100).wait()[0, 0] == 200


def test_company_that_does_not_come_is_forgotten(model):
    batcher = Batcher(places=64, wait_seconds=0.01)
    for _ in range(2):
        batcher.submit(Client(model, 10).request)
    batcher.start()
    for _ in range(BATCHES + 1):
        submitted(batcher, model, 10).wait()
    batcher.wait_seconds = 30
    wait_until(lambda: not batcher.computing)
    assert submitted(batcher, model, 10).wait()[0, 0] == 20
    batcher.close()


def test_what_is_little_more_than_a_batch_is_computed_as_one(model):
    batcher = Batcher(places=64)
    clients = [Client(model, 30) for _ in range(3)]
    for client in clients:
        batcher.submit(client.request)
    batcher.start()
    batcher.close()
    assert model.batches == [[30, 30, 30]]


class Laned(Doubling):
    """A model with lanes of its own kind."""

    def __init__(self, lanes):
        super().__init__(64)
        self.lanes = [Doubling(32) for _ in range(lanes)]


@pytest.fixture
def laned():
    model, batcher = Laned(2), Batcher(places=64, lanes=2)
    batcher.start()
    yield model, batcher
    batcher.close()


def test_what_one_lane_would_hold_is_computed_by_all_of_the_engine(laned):
    model, batcher = laned
    assert [submitted(batcher, model, n).wait()[0, 0] for n in (20, 500)] == [40, 1000]
    assert (model.batches, [lane.batches for lane in model.lanes]) == ([[20], [500]], [[], []])


def test_what_takes_a_moment_is_computed_by_all_of_the_engine():
    model = Laned(2)
    batcher = Batcher(places=64, lanes=2, together_seconds=0.2)
    for _ in range(2):  # together 200 of the 1,000 tokens a second that are supposed at first
        batcher.submit(Client(model, 30, 30, 30).request)
    batcher.start()
    batcher.close()
    assert (model.batches, [lane.batches for lane in model.lanes]) == ([[30] * 6], [[], []])


def test_a_line_is_computed_by_lanes_side_by_side_once_the_engine_is_free(laned):
    model, batcher = laned
    model.go.clear()
    for lane in model.lanes:
        lane.go.clear()
    first = submitted(batcher, model, 30)
    wait_until(lambda: batcher.busy == [model])
    many = submitted(batcher, model, 30, 30, 30, 30)
    time.sleep(0.02)
    assert batcher.busy == [model]
    model.go.set()
    wait_until(lambda: set(map(id, batcher.busy)) == set(map(id, model.lanes)))
    for lane in model.lanes:
        lane.go.set()
    assert first.wait().tolist() == [[60]]
    assert many.wait().tolist() == [[60]] * 4
    assert model.batches[0] == [30]


def test_what_is_left_of_a_line_is_computed_by_the_lanes_as_the_line_was(laned):
    model, batcher = laned
    for lane in model.lanes:
        lane.go.clear()
    client = submitted(batcher, model, 32, 32, 32, 16)
    wait_until(lambda: len(batcher.busy) == 2)
    model.lanes[0].go.set()
    wait_until(lambda: not batcher.waiting)
    model.lanes[1].go.set()
    assert client.wait().tolist() == [[64], [64], [64], [32]]
    assert ([lane.batches for lane in model.lanes], model.batches) == ([[[32], [32], [16]], [[32]]], [])


def test_the_lanes_are_left_once_no_batch_lately_was_of_a_line(laned):
    model, batcher = laned
    submitted(batcher, model, 32, 32, 32, 16).wait()
    for _ in range(BATCHES):
        assert submitted(batcher, model, 20).wait()[0, 0] == 40
    wait_until(lambda: not batcher.computing)
    lanes = sum(len(lane.batches) for lane in model.lanes)
    assert submitted(batcher, model, 20, 20).wait().tolist() == [[40], [40]]
    assert model.batches[-1] == [20, 20]
    assert sum(len(lane.batches) for lane in model.lanes) == lanes


def test_few_tokens_wait_for_all_of_the_engine_while_it_computes(laned):
    model, batcher = laned
    model.go.clear()
    first = submitted(batcher, model, 20)
    wait_until(lambda: batcher.busy == [model])
    rest = [submitted(batcher, model, 20) for _ in range(3)]
    time.sleep(0.02)
    assert (batcher.busy, batcher.waiting) == ([model], 3)
    model.go.set()
    assert [client.wait()[0, 0] for client in (first, *rest)] == [40] * 4
    assert model.batches == [[20], [20] * 3]


def test_a_request_that_fails_in_one_lane_is_answered_once(laned):
    model, batcher = laned
    model.lanes[1].logits = model.lanes[0].logits = lambda reviews: 1 / 0
    client = submitted(batcher, model, *[30] * 6)
    assert isinstance(client.wait(), ZeroDivisionError)
    assert submitted(batcher, Doubling(), 8).wait()[0, 0] == 16
    assert len(client.results) == 1
    assert (batcher.waiting, batcher.waiting_tokens, batcher.busy) == (0, 0, [])


def test_a_new_model_waits_until_the_lanes_of_the_one_before_are_done(laned):
    model, batcher = laned
    for lane in model.lanes:
        lane.go.clear()
    old = [submitted(batcher, model, 32, 32, 32, 32)]
    wait_until(lambda: len(batcher.busy) == 2)
    new = Laned(2)
    client = submitted(batcher, new, 8)
    time.sleep(0.02)
    assert not client.results
    for lane in model.lanes:
        lane.go.set()
    assert client.wait()[0, 0] == 16
    assert old[0].wait().tolist() == [[64]] * 4


@pytest.mark.parametrize(
    ("first", "others", "chosen"),
    [
        (40, [], []),
        (40, [24, 70], [0]),  # 64 of 64, for 134 of 160
        (40, [25, 10, 14], [1, 2]),  # 64 of 64, for 65 of 96
        (30, [2, 34, 60], [0, 1, 2]),  # 126 of 128
        (200, [4], []),
        (192, [4], []),
        (100, [92, 92], [0]),
        (7, [57, 57, 57, 14], [0, 1, 2, 3]),
    ],
)
def test_a_lane_takes_what_fills_its_row(first, others, chosen):
    assert filling(first, others, 192, 32) == chosen


def test_no_choice_fills_a_row_better():
    random = np.random.default_rng(0)
    for _ in range(200):
        first, others = int(random.integers(4, 192)), random.integers(4, 100, 8).tolist()
        sums = {first + sum(each) for size in range(9) for each in combinations(others, size)}
        best = max(total / 0.9 - -(-total // 32) * 32 for total in sums if total <= 192)
        total = first + sum(others[k] for k in filling(first, others, 192, 32))
        assert total <= 192
        assert total / 0.9 - -(-total // 32) * 32 == best
