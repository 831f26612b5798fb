"""Which waiting texts are computed together: a batch of a token budget, taken from all requests in turn.

Requests wait in the order of their arrival. A batch takes one text of each request, the oldest request first, and goes round
again while texts fit. So the oldest request is in every batch, a request of one text is not held up by one of hundreds, and
that one gets on with each batch, too.

An engine that has lanes (sentiment/engines.py) computes what takes it a moment on all its threads, which is soonest done, and
what waits in a longer line side by side, which gets more done: the threads of a lane wait for nobody, whatever else takes a share
of the cores.

Clients that were answered together come back together, but for a moment. A batch that is not full waits for them that long: one
batch of four costs less than one of one and one of three.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Protocol

import numpy as np

ALTOGETHER = 1.5  # batches that all of the engine computes at once at least, so that no text is left over for one of its own
BATCHES = 4  # whose company the next one waits for
LOOK_AHEAD = 4  # texts, beyond those that fit, that may go before one of them
USUAL = 0.9  # tokens that are computed for a usual batch's cost of one
STEP = 32  # tokens that a lane's batch is padded to a multiple of (sentiment.packing.row_width)
SHORTEST = 4  # tokens that a text takes at least (sentiment.packing.capacity)


class Engine(Protocol):
    """What computes a batch."""

    @property
    def batch_tokens(self) -> int: ...

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray: ...


class Loaded(Engine, Protocol):
    """What the batcher needs of a model: an engine, and perhaps lanes, which compute side by side, though not beside it."""

    @property
    def lanes(self) -> Sequence[Engine]: ...


@dataclass(eq=False)
class Request:
    """Texts of one request as token ids, for the model that made them.

    `done` is called once, with an exception, or, unless the batcher has a `deliver`, with the logits.
    """

    model: Any
    reviews: list[np.ndarray]
    done: Callable[[Any], None]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    left: list[int] = field(default_factory=list)  # indices of the texts that still wait
    answered: int = 0
    failed: bool = False
    logits: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = list(range(len(self.reviews)))

    @property
    def tokens_left(self) -> int:
        """Tokens of the texts that still wait."""
        return sum(len(self.reviews[k]) for k in self.left)

    def keep(self, index: int, values: np.ndarray) -> bool:
        """Keep the logits of a text; whether that was the last one."""
        self.logits = self.logits or [None] * len(self.reviews)
        self.logits[index] = values
        self.answered += 1
        return self.answered == len(self.reviews) and not self.failed


Picked = list[tuple[Request, int]]


class FullError(Exception):
    """Too many requests or texts wait; come again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; come again in {retry_after} s")
        self.retry_after = retry_after


class Batcher:
    """The waiting requests, and the threads that compute them.

    `deliver` is given the requests that a batch completes, with all of their `logits`. A batch that is not full waits for company
    `wait_seconds` at most, and `wait_share` of the time that the last one took. All of the engine computes what takes it
    `together_seconds`, where it has lanes, too.
    """

    def __init__(
        self,
        places: int,
        text_places: int = 1024,
        wait_seconds: float = 0.0,
        observe: Callable[[int, int, float], None] | None = None,
        lanes: int = 1,
        deliver: Callable[[Sequence[Any]], None] | None = None,
        wait_share: float = math.inf,
        together_seconds: float = 0.0,
    ) -> None:
        self.places, self.text_places = places, text_places
        self.wait_seconds, self.wait_share, self.together_seconds = wait_seconds, wait_share, together_seconds
        self.observe = observe
        self.deliver = deliver or each_done
        self.requests: deque[Request] = deque()
        self.waiting = 0
        self.waiting_tokens = 0
        self.computing = 0  # texts
        self.computing_tokens = 0
        self.ended = 0.0  # when a batch was last computed, by time.monotonic
        self.took = 0.0  # seconds
        self.most = (0, 0)  # texts that waited or were computed at a time since the last batch began, and tokens
        self.lately: deque[tuple[int, int]] = deque(maxlen=BATCHES)  # ... and between the batches before
        self.tokens_per_second = 1000.0
        self.changed = threading.Condition()
        self.closed = False
        self.busy: list[Engine] = []
        self.threads = [threading.Thread(target=self.run, name=f"inference {k}", daemon=True) for k in range(lanes)]

    def start(self) -> None:
        """Begin to compute."""
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Compute what waits, then end."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            if thread.ident:
                thread.join()

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
            texts, tokens = self.here()
            self.most = max(texts, self.most[0]), max(tokens, self.most[1])
            self.changed.notify()

    def seconds_to_wait(self) -> int:
        """How long what waits will take, by the speed of the last batches: whole seconds, at least 1."""
        return min(60, 1 + int(self.waiting_tokens / max(1.0, self.tokens_per_second)))

    def run(self) -> None:
        """Take batch after batch until closed and empty."""
        while work := self.take():
            engine, picked = work
            try:
                self.compute(engine, picked)
            finally:
                with self.changed:
                    self.busy.remove(engine)
                    self.computing -= len(picked)
                    self.computing_tokens -= tokens_in(picked)
                    self.ended = time.monotonic()
                    self.changed.notify_all()

    def take(self) -> tuple[Engine, Picked] | None:
        """The next batch and what computes it, waiting for both; nothing once closed and empty."""
        while True:
            with self.changed:
                if not (late := self.late()):
                    if self.requests and (engine := self.free_engine(self.requests[0].model)):
                        if (seconds := self.seconds_for_company(engine)) <= 0 or self.closed:
                            self.busy.append(engine)
                            return engine, self.pick(engine, engine is not self.requests[0].model)
                        self.changed.wait(seconds)
                    elif self.closed and not self.requests:
                        return None
                    else:
                        self.changed.wait()
            for request in late:  # who is told may be slow to listen
                request.done(TimeoutError("the answer took too long"))

    def here(self) -> tuple[int, int]:
        """The texts that wait or are computed, and their tokens."""
        return self.waiting + self.computing, self.waiting_tokens + self.computing_tokens

    def together(self, engine: Engine) -> float:
        """The tokens that all of the engine computes at once."""
        return max(ALTOGETHER * engine.batch_tokens, self.together_seconds * self.tokens_per_second)

    def free_engine(self, model: Loaded) -> Engine | None:
        """What is to compute the next batch: all of the engine for a lone text or what takes it a moment, else the lanes.

        What was here lately counts, too: to turn from one way to the other costs more than either.
        """
        few = max(tokens for _, tokens in (self.here(), *self.lately)) <= self.together(model)
        if not self.busy and (self.waiting == 1 or few or not model.lanes):
            return model
        if few or any(each not in model.lanes for each in self.busy):
            return None
        return next((lane for lane in model.lanes if lane not in self.busy), None)

    def pick(self, engine: Engine, lane: bool) -> Picked:
        """Take a batch out of the line."""
        self.lately.append(self.most)
        budget = engine.batch_tokens
        if not lane and self.waiting_tokens <= self.together(engine):
            budget = max(budget, self.waiting_tokens + SHORTEST * self.waiting)
        picked = pick(self.requests, self.requests[0].model, budget, STEP if lane else 1)
        self.computing += len(picked)
        self.computing_tokens += tokens_in(picked)
        for request, index in picked:
            self.waiting -= 1
            self.waiting_tokens -= len(request.reviews[index])
        self.most = self.here()
        self.requests = deque(request for request in self.requests if request.left)
        if self.requests:
            self.changed.notify()  # another thread may have a lane for them
        return picked

    def seconds_for_company(self, engine: Engine) -> float:
        """How long a batch that is not full may wait for as many texts as were here lately; none for a text that comes alone.

        Clients that were answered together mostly come back together, a little later.
        """
        lately = max((texts for texts, _ in self.lately), default=0)
        if self.busy or self.waiting_tokens >= self.together(engine) or self.waiting >= lately:
            return 0.0
        wait = min(self.wait_seconds, self.wait_share * self.took)
        return max(self.requests[0].arrived, self.ended) + wait - time.monotonic()

    def late(self) -> list[Request]:
        """Take out of the line whose client has stopped waiting."""
        now = time.monotonic()
        found = [each for each in self.requests if each.deadline < now]
        for request in found:
            self.requests.remove(request)
            self.waiting -= len(request.left)
            self.waiting_tokens -= request.tokens_left
        return found

    def compute(self, engine: Engine, picked: Picked) -> None:
        """Compute a batch, and hand over the requests that are complete with it."""
        reviews = [request.reviews[index] for request, index in picked]
        tokens, start = sum(map(len, reviews)), time.perf_counter()
        try:
            logits: Any = engine.logits(reviews)
        except Exception as error:
            for request in {id(request): request for request, _ in picked}.values():
                self.give_up(request, error)
            return
        seconds = time.perf_counter() - start
        with self.changed:
            rate = tokens * len(self.busy) / max(seconds, 1e-6)
            self.tokens_per_second += 0.1 * (rate - self.tokens_per_second)
            self.took = seconds
            complete = [request for (request, index), values in zip(picked, logits, strict=True) if request.keep(index, values)]
        if complete:
            self.hand_over(complete)
        if self.observe:
            self.observe(len(picked), tokens, seconds)

    def hand_over(self, complete: Sequence[Request]) -> None:
        """Deliver requests that are complete; a defect in that is theirs, and not the end of this thread."""
        try:
            self.deliver(complete)
        except Exception as error:
            for request in complete:
                self.give_up(request, error)

    def give_up(self, request: Request, error: Exception) -> None:
        """Take what is left of a failed request out of the line."""
        with self.changed:
            if request in self.requests:
                self.requests.remove(request)
                self.waiting -= len(request.left)
                self.waiting_tokens -= request.tokens_left
            first, request.failed = not request.failed, True
        if first:
            request.done(error)


def each_done(requests: Sequence[Request]) -> None:
    """Hand each request its logits."""
    for request in requests:
        request.done(np.stack(request.logits))


def pick(requests: deque[Request], model: Loaded, budget: int, step: int = 1) -> Picked:
    """Texts of all requests in turn, the oldest first, that make a batch of at most `budget` tokens; they are taken.

    The oldest is always among them, however long. Of those that follow it as far as the budget goes, and a few more, it takes
    what fills a multiple of `step` tokens best: what it leaves will be computed with what comes next.
    """
    line = in_turn(requests, model)
    picked = [next(line)]
    first = tokens_of(*picked[0])
    after: Picked = []
    room = budget - first
    while room > 0 and (waiting := next(line, None)):
        after.append(waiting)
        room -= tokens_of(*waiting)
    after += islice(line, LOOK_AHEAD) if room < 0 else ()
    lengths = [tokens_of(*each) for each in after]
    picked += [after[k] for k in filling(first, lengths, budget, step)]
    for request, index in picked:
        request.left.remove(index)
    return picked


def filling(first: int, lengths: Sequence[int], budget: int, step: int) -> list[int]:
    """Which texts make the best batch with one of `first` tokens, as indices of `lengths`; the older ones if it is equal.

    Computing n tokens costs as much as n rounded up to a multiple of `step`; those left over cost 1 / USUAL each later.
    The sums that can be had are the bits of a number (Bellman 1957).
    """
    if first >= budget:
        return []
    sums = [1 << first]
    within = (1 << (budget + 1)) - 1
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & within)
    possible = (n for n in range(first, budget + 1) if sums[-1] >> n & 1)
    total = max(possible, key=lambda n: n / USUAL - -(-n // step) * step)
    chosen = []
    for k in reversed(range(len(lengths))):
        if not sums[k] >> total & 1:
            chosen.append(k)
            total -= lengths[k]
    return chosen[::-1]


def tokens_of(request: Request, index: int) -> int:
    """What a text takes of a batch."""
    return max(len(request.reviews[index]), SHORTEST)


def tokens_in(picked: Picked) -> int:
    """The tokens of what was taken."""
    return sum(len(request.reviews[index]) for request, index in picked)


def in_turn(requests: deque[Request], model: Loaded) -> Iterator[tuple[Request, int]]:
    """The texts that wait for a model: one of each request, then another one of each."""
    for turn in count():
        left = [request for request in requests if request.model is model and len(request.left) > turn]
        if not left:
            return
        for request in left:
            yield request, request.left[turn]
