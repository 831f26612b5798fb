"""Forward and backward recorded once as CUDA graphs and replayed for every batch of the same shape.

A step of a small model is some hundred kernels of microseconds, and a process takes longer to launch them one by one than a GPU
to compute them. A recorded step is one launch; what it reads is copied to where it was when it was recorded.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from sentiment.feed import Inputs

WARM_UP = 3  # computations before the recording: libraries choose their kernels, torch.compile compiles
Loss = Callable[[Inputs], torch.Tensor]


class Replay:
    """The gradients of a loss, times a scale, for inputs of one shape.

    The parameters' gradients lie in the graphs' own memory: `begin` makes them those that are added to.
    """

    def __init__(self, loss: Loss, backward: Callable[[torch.Tensor], None], parameters: list[Any], inputs: Inputs) -> None:
        self.loss, self.backward, self.parameters = loss, backward, parameters
        self.device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        self.inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        self.scale = torch.ones((), device=self.device)

    def record(self) -> Self:
        """Record both graphs; no random number is drawn by it."""
        with torch.random.fork_rng([self.device.index or 0]), no_collection():
            self.drop_gradients()
            self.setting, self.set_loss = self.graph(None)
            self.gradients = [parameter.grad for parameter in self.parameters]
            self.adding, self.added_loss = self.graph(self.setting.pool())
        self.drop_gradients()
        return self

    def warm_up(self) -> None:
        """Compute some times on a stream of its own, as a recording needs it; no random number is drawn by it."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.random.fork_rng([self.device.index or 0]), torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute()
                self.drop_gradients()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def compute(self) -> torch.Tensor:
        """The loss, its gradients added to what the parameters have."""
        loss = self.loss(self.inputs) * self.scale
        self.backward(loss)
        return loss.detach()

    def graph(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of `compute`, and where it leaves the loss."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            loss = self.compute()
        return graph, loss

    def drop_gradients(self) -> None:
        """Leave the parameters without gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def begun(self) -> bool:
        """Whether the parameters have gradients that are added to; raises RuntimeError if some are not the graphs' own."""
        found = [parameter.grad for parameter in self.parameters]
        if all(each is None for each in found):
            return False
        if any(each is not gradient for each, gradient in zip(found, self.gradients, strict=True)):
            raise RuntimeError("gradients that a recorded step would not add to; call Replay.begin before they are computed")
        return True

    def begin(self) -> None:
        """Let the parameters have their gradients where the graphs leave them, all 0, for a batch that is not replayed."""
        if not self.begun():
            torch._foreach_zero_([gradient for gradient in self.gradients if gradient is not None])
            self.attach()

    def attach(self) -> None:
        """Let the parameters have their gradients where the graphs leave them."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, inputs: Inputs, scale: float) -> torch.Tensor:
        """The loss times `scale`; its gradients are added to those that there are, or are the first."""
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                self.inputs[name].copy_(value, non_blocking=True)
        self.scale.fill_(scale)
        if self.begun():
            self.adding.replay()
            return self.added_loss.clone()
        self.setting.replay()
        self.attach()
        return self.set_loss.clone()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection but one before: an older graph that is destroyed while one is recorded spoils the recording."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
