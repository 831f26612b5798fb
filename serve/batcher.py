"""Which waiting texts are computed together: a batch of a token budget, taken from all requests in turn.

Requests wait in the order of their arrival. A batch takes one text of each request, the oldest request first, and goes round
again while texts fit. So the oldest request is in every batch, a request of one text is not held up by one of hundreds, and
that one gets on with each batch, too.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Loaded(Protocol):
    """What the batcher needs of a model."""

    @property
    def batch_tokens(self) -> int: ...

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray: ...


@dataclass
class Request:
    """Texts of one request as token ids, for the model that made them; `done(logits or an exception)` is called once."""

    model: Any
    reviews: list[np.ndarray]
    done: Callable[[np.ndarray | Exception], None]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    answered: int = 0
    logits: list[Any] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Texts that are still waiting."""
        return len(self.reviews) - self.taken


Picked = list[tuple[Request, int]]


class FullError(Exception):
    """Too many requests or texts wait; come again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; come again in {retry_after} s")
        self.retry_after = retry_after


class Batcher:
    """The waiting requests, and the thread that computes them."""

    def __init__(
        self,
        places: int,
        text_places: int = 1024,
        wait_seconds: float = 0.0,
        observe: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.places, self.text_places, self.wait_seconds = places, text_places, wait_seconds
        self.observe = observe
        self.requests: deque[Request] = deque()
        self.waiting = 0
        self.waiting_tokens = 0
        self.tokens_per_second = 1000.0
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="inference", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self.thread.start()

    def close(self) -> None:
        """Compute what waits, then end."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread.ident:
            self.thread.join()

    def submit(self, request: Request) -> None:
        """Put a request at the end of the line; raises FullError if all places are taken.

        A request of one text needs a place for a request alone: it gets on however many texts of others wait.
        """
        with self.changed:
            many = len(request.reviews) > 1
            if len(self.requests) >= self.places or (many and self.waiting >= self.text_places):
                raise FullError(self.seconds_to_wait())
            self.requests.append(request)
            self.waiting += len(request.reviews)
            self.waiting_tokens += sum(map(len, request.reviews))
            self.changed.notify()

    def seconds_to_wait(self) -> int:
        """How long what waits will take, by the speed of the last batches: whole seconds, at least 1."""
        return min(60, 1 + int(self.waiting_tokens / max(1.0, self.tokens_per_second)))

    def run(self) -> None:
        """Take batch after batch until closed and empty."""
        while picked := self.take():
            self.compute(picked)

    def take(self) -> Picked:
        """The next batch, waiting for one; nothing once closed and empty."""
        with self.changed:
            while not self.requests and not self.closed:
                self.changed.wait()
            if self.wait_seconds and self.requests and not self.closed:
                self.wait_for_company()
            self.drop_late()
            if not self.requests:
                return [] if self.closed else self.take()
            picked = pick(self.requests, self.requests[0].model)
            for request, index in picked:
                self.waiting -= 1
                self.waiting_tokens -= len(request.reviews[index])
            while self.requests and not self.requests[0].left:
                self.requests.popleft()
            self.requests = deque(request for request in self.requests if request.left)
            return picked

    def wait_for_company(self) -> None:
        """Wait until a batch is full, but not longer than `wait_seconds` after the oldest arrived."""
        until = self.requests[0].arrived + self.wait_seconds
        budget = self.requests[0].model.batch_tokens
        while self.waiting_tokens < budget and (left := until - time.monotonic()) > 0:
            self.changed.wait(left)

    def drop_late(self) -> None:
        """Give up requests whose client has stopped waiting."""
        now = time.monotonic()
        for request in [each for each in self.requests if each.deadline < now]:
            self.requests.remove(request)
            self.waiting -= request.left
            self.waiting_tokens -= sum(len(ids) for ids in request.reviews[request.taken :])
            request.done(TimeoutError("the answer took too long"))

    def compute(self, picked: Picked) -> None:
        """Compute a batch, and hand over the requests that are complete with it."""
        model = picked[0][0].model
        reviews = [request.reviews[index] for request, index in picked]
        tokens, start = sum(map(len, reviews)), time.perf_counter()
        try:
            logits: Any = model.logits(reviews)
        except Exception as error:
            for request in {id(request): request for request, _ in picked}.values():
                self.give_up(request, error)
            return
        seconds = time.perf_counter() - start
        self.tokens_per_second += 0.1 * (tokens / max(seconds, 1e-6) - self.tokens_per_second)
        for (request, index), values in zip(picked, logits, strict=True):
            request.logits = request.logits or [None] * len(request.reviews)
            request.logits[index] = values
            request.answered += 1
            if request.answered == len(request.reviews):
                request.done(np.stack(request.logits))
        if self.observe:
            self.observe(len(picked), tokens, seconds)

    def give_up(self, request: Request, error: Exception) -> None:
        """Take what is left of a failed request out of the line."""
        with self.changed:
            if request in self.requests:
                self.requests.remove(request)
                self.waiting -= request.left
                self.waiting_tokens -= sum(len(ids) for ids in request.reviews[request.taken :])
        request.done(error)


def pick(requests: deque[Request], model: Loaded) -> Picked:
    """One text of each request in turn, the oldest first, again and again while they fit the model's budget of tokens.

    The very first text is always taken, however long. Advances `taken` of each request.
    """
    picked: Picked = []
    room = model.batch_tokens
    progress = True
    while progress and room > 0:
        progress = False
        for request in requests:
            if request.model is not model or not request.left:
                continue
            length = len(request.reviews[request.taken])
            if picked and max(length, 4) > room:
                continue
            picked.append((request, request.taken))
            request.taken += 1
            room -= max(length, 4)
            progress = True
            if room < 4:
                break
    return picked
