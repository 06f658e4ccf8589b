"""Minimising a smooth convex function that somebody else evaluates: limited-memory BFGS (Liu & Nocedal 1989)."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

MEMORY = 10
DECREASE, CURVATURE = 1e-4, 0.9
NOISE = 1e-6
"""Relative error of a value: differences below it say nothing, and the slopes decide (Hager & Zhang 2005)."""
MOST_STEPS = 30

Search = Generator[np.ndarray, tuple[float, np.ndarray], None]


@dataclass(frozen=True)
class _At:
    """A point, the value there, and the gradient."""

    point: np.ndarray
    value: float
    gradient: np.ndarray


def descent(start: np.ndarray) -> Search:
    """Yields points (n,), float64, and is sent the value and the gradient at each. It ends where no step lowers the value any more.

    Whoever evaluates says when it is enough. Steps obey the weak Wolfe conditions, by bisection (Lewis & Overton 2013).
    """
    here = _At(start, *(yield start))
    history: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=MEMORY)
    while True:
        direction = -_times_inverse(here.gradient, history)
        if not here.gradient @ direction < 0:
            return
        there = yield from _step(here, direction)
        if there is None:
            return
        step, change = there.point - here.point, there.gradient - here.gradient
        if step @ change > 0:
            history.append((step, change))
        here = there


def _times_inverse(gradient: np.ndarray, history: deque[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The inverse Hessian that the last steps tell of, times the gradient: the two loops of Nocedal 1980."""
    found = gradient.copy()
    factors = []
    for step, change in reversed(history):
        factor = (step @ found) / (step @ change)
        factors.append(factor)
        found -= factor * change
    if history:
        step, change = history[-1]
        found *= (step @ change) / (change @ change)
    for (step, change), factor in zip(history, reversed(factors), strict=True):
        found += (factor - (change @ found) / (step @ change)) * step
    return found


def _step(here: _At, direction: np.ndarray) -> Generator[np.ndarray, tuple[float, np.ndarray], _At | None]:
    slope = here.gradient @ direction
    low, high, length = 0.0, np.inf, 1.0
    for _ in range(MOST_STEPS):
        point = here.point + length * direction
        there = _At(point, *(yield point))
        along = there.gradient @ direction
        less = there.value <= here.value + DECREASE * length * slope
        close = there.value <= here.value + NOISE * abs(here.value) and along <= (2 * DECREASE - 1) * slope
        if not (less or close):
            high = length
        elif along < CURVATURE * slope:
            low = length
        else:
            return there
        length = (low + high) / 2 if np.isfinite(high) else 2 * low
    return None
