"""Plain Adam from zero, on the same states, batches, head and precision as our own training: what that is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from actcache.clients.lens.natural import Natural
from actcache.clients.lens.ridge import Gram
from actcache.clients.lens.training import Course, Progress, Training
from actcache.clients.lens.translators import Lens, identity
from actcache.clients.states import States
from benchmarks.lens_data import Clock

Look = Callable[[int, Lens], bool]
"""Is given how many steps are done and the lens as it is; whether that is enough."""


class Enough(Exception):
    """A training has come far enough."""


class Adam(Training):
    """torch.optim.Adam (Kingma & Ba 2014, arXiv 1412.6980) on W and b of all layers, which begin at zero.

    Nothing is known of the states: there is no Gram pass and no curvature. The rate is constant, or falls by half a cosine to zero.
    """

    def __init__(self, read: States, course: Course, rate: float, cosine: bool) -> None:
        lens, none = identity(read), np.zeros(read.width)
        nothing = Gram(none, none, np.eye(read.width), np.zeros((read.width, read.width)), 0.0)
        super().__init__(read, lens, [nothing] * len(lens.weight), course)
        self._plain = [_Plain(*each) for each in zip(*map(torch.as_tensor, (lens.weight, lens.bias)), strict=True)]
        self._translators = list[Natural](self._plain)
        self._adam = torch.optim.Adam([part for each in self._plain for part in (each.m, each.c)], rate)
        self._highest, self._cosine, self._done = rate, cosine, 0

    def timed(self, every: int, look: Look, clock: Clock) -> None:
        """Train until it is enough or over. Looking, after every so many steps and in the end, does not count."""

        def report(progress: Progress) -> None:
            if progress.step % every and progress.step != progress.steps:
                return
            clock.stop()
            if look(progress.step, self._result()):
                raise Enough
            clock.start()

        clock.start()
        try:
            self.run(report)
        except Enough:
            return
        clock.stop()

    def _step(self, states: Mapping[str, Tensor], rate: float, looked: bool) -> np.ndarray:
        kl = super()._step(states, rate, False)
        falling = 0.5 * (1 + math.cos(math.pi * self._done / self.course.steps)) if self._cosine else 1.0
        self._adam.param_groups[0]["lr"] = self._highest * falling
        self._adam.step()
        self._done += 1
        return kl

    def _measure_curvature(self, states: Mapping[str, Tensor], step: int) -> None:
        """Adam has no use for it."""


class _Plain(Natural):
    """A translator h + W h + b: M is W and c is b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.m, self.c = weight, bias

    def output(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(h + self.c, h, self.m.T), h

    def step(self, gradient_m: Tensor, gradient_c: Tensor, rate: float) -> None:
        """Leave the gradients where Adam finds them."""
        self.m.grad, self.c.grad = gradient_m, gradient_c

    def translator(self) -> tuple[Tensor, Tensor]:
        return self.m.clone(), self.c.clone()
