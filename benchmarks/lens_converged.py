"""How long our training and plain Adam from zero take to come within 2 % of a lens that is trained to convergence, in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actcache.clients.lens.training import Course
from actcache.clients.lens.translators import Lens
from actcache.clients.states import States
from benchmarks.lens_adam import Adam
from benchmarks.lens_data import Clock, divergence, fitted
from benchmarks.ratio import Result, Times, compare

WITHIN, GOAL = 1.02, 0.1
LONG, PASSES = 8, 16
"""Passes of our training to convergence, and Adam's at most."""
CHECKS_A_PASS = 8
CONVERGED = 1e-3
"""The part of its KL that no layer may win in a pass any more."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
KEPT = 2
"""Of the rates, those that go on after a first pass."""
COSINES = (1, 2, 4, 8, 16)
"""Passes of the courses whose rate falls to zero."""
OURS = (0, 12, 25, 50, 75, 100, 150, 200, 300, 400)
"""Steps of our courses; 0 is ridge alone."""
ROUNDS = 4


@dataclass(frozen=True)
class Adams:
    """A course of Adam's: the rate and whether it falls to zero over so many steps."""

    rate: float
    steps: int
    cosine: bool

    def __str__(self) -> str:
        return f"Adam, {'falling' if self.cosine else 'constant'} rate {self.rate:g}"


@dataclass(frozen=True)
class Point:
    """A lens on the way: how it was come by, its steps, its seconds of clock and processor, and its held-out KL by layer in nats."""

    course: Adams | None
    steps: int
    wall: float
    cpu: float
    kl: np.ndarray

    def line(self, reference: np.ndarray) -> str:
        """What is printed; the worst layer is by its part of the converged lens's KL."""
        name = str(self.course) if self.course else "ridge" if not self.steps else "ridge and natural gradient"
        worst = float(np.max(self.kl / reference)) - 1
        return f"    {name}, {self.steps:,} steps: {self.wall:,.1f} s ({self.cpu:,.1f} s of processor), worst layer {worst:+.1%}"


def run(read: States, held_out: States) -> Iterator[Result]:
    """Find the fastest course of either side, then let the two take turns."""
    size = Course.of(read, None).size
    a_pass = math.ceil(len(read) / size)
    print(
        f"  {len(read):,} tokens to train on, a pass of {a_pass} steps of {size:,}; {len(held_out):,} held-out tokens. Clocks stand still\n"
        "  while a lens is looked at. Both sides have the same head code and products in the same precision",
        flush=True,
    )
    long = _ours(read, held_out, LONG * a_pass)
    print(long.line(long.kl) + f": {LONG} passes, the first reference", flush=True)
    ours = _ladder(read, held_out, long.kl)
    adams = _adams(read, held_out, a_pass, long.kl)
    reference = np.min([point.kl for point in (long, *ours, *adams)], axis=0)
    print(
        "  converged lens, the best of every course in each layer, nats: " + " ".join(f"{kl:.4f}" for kl in reference)
    )
    best, fastest = (_first(points, reference) for points in (ours, adams))
    if best is None:
        yield _failed(f"ours came that near in no course of up to {OURS[-1]} steps")
        return
    if fastest is None:
        fastest = max(adams, key=lambda point: point.steps)
        print(
            "  Adam came that near in no course; its longest stands for it, so that the ratio is at most what follows"
        )
    print("  the fastest course of either side:")
    print(best.line(reference))
    print(fastest.line(reference), flush=True)
    assert fastest.course is not None
    yield from _duel(read, best.steps, fastest.course, fastest.steps)


def _duel(read: States, steps: int, course: Adams, stop: int) -> Iterator[Result]:
    """Ours in full, after each part of Adam's course."""
    wall: Times = {"ours": [], "Adam": []}
    cpu: Times = {"ours": [], "Adam": []}
    done: list[int] = []
    clock = Clock()

    def take_turns(step: int, _: Lens) -> bool:
        own = Clock()
        fitted(read, steps, own)
        done.append(step)
        for times, ours, total in ((wall, own.wall, clock.wall), (cpu, own.cpu, clock.cpu)):
            times["ours"].append(ours)
            times["Adam"].append(total)
        return step >= stop

    adam = Adam(read, Course(Course.of(read, None).size, course.steps), course.rate, course.cosine)
    adam.timed(math.ceil(stop / ROUNDS), take_turns, clock)
    for what, times in (("wall time", wall), ("processor time", cpu)):
        a_step = np.diff(times["Adam"], prepend=0.0) / np.diff(done, prepend=0)
        times["Adam"] = (a_step * stop).tolist()
        yield compare(
            "lens",
            f"within {WITHIN - 1:.0%} of convergence in every layer, ours ÷ {course}, {stop:,} steps, {what}",
            times,
            "ours",
            "Adam",
            goal=GOAL,
            better="lower",
        )


def _adams(read: States, held_out: States, a_pass: int, reference: np.ndarray) -> list[Point]:
    """Every rate for a pass, the best two to convergence; with a rate that falls these and the next higher, then the best of those."""
    found: list[Point] = []

    def best(rates: Sequence[float], steps: int, cosine: bool, kept: int) -> list[float]:
        """Try some rates; those whose worst layer is best in the end."""
        after = {}
        for rate in rates:
            found.extend(_adam(read, held_out, Adams(rate, steps, cosine), a_pass, reference))
            after[rate] = float(np.max(found[-1].kl / reference))
        return sorted(after, key=after.__getitem__)[:kept]

    kept = best(RATES, a_pass, False, KEPT)
    best(kept, PASSES * a_pass, False, KEPT)
    higher = [rate for rate in RATES if rate > max(kept)][:1]
    rates = [*kept, *higher]
    for passes in COSINES:
        quickest = _first(found, reference)
        if quickest is None or passes * a_pass < quickest.steps:
            rates = best(rates, passes * a_pass, True, 1)
    return found


def _adam(read: States, held_out: States, course: Adams, a_pass: int, reference: np.ndarray) -> list[Point]:
    """A course, looked at a few times a pass if its rate is constant, and then over when a pass wins next to nothing."""
    found: list[Point] = []
    passed, before = 0, np.full(read.n_layers - 1, np.inf)
    adam = Adam(read, Course(Course.of(read, None).size, course.steps), course.rate, course.cosine)
    clock = Clock()

    def look(step: int, lens: Lens) -> bool:
        nonlocal passed, before
        kl = divergence(lens, held_out)
        found.append(Point(course, step, clock.wall, clock.cpu, kl))
        if step // a_pass == passed:
            return False
        converged = bool(np.all(kl > (1 - CONVERGED) * before))
        passed, before = step // a_pass, kl
        return converged

    adam.timed(course.steps if course.cosine else math.ceil(a_pass / CHECKS_A_PASS), look, clock)
    print(found[-1].line(reference), flush=True)
    return found


def _ladder(read: States, held_out: States, reference: np.ndarray) -> list[Point]:
    """Our courses, ever longer, until one is near enough."""
    found: list[Point] = []
    for steps in OURS:
        found.append(_ours(read, held_out, steps))
        print(found[-1].line(reference), flush=True)
        if np.all(found[-1].kl <= WITHIN * reference) and len(found) > 1 and _first(found[:-1], reference) is not None:
            break  # one more than is needed, for the reference may yet be bettered
    return found


def _ours(read: States, held_out: States, steps: int) -> Point:
    clock = Clock()
    lens = fitted(read, steps, clock)
    return Point(None, steps, clock.wall, clock.cpu, divergence(lens, held_out))


def _first(points: Sequence[Point], reference: np.ndarray) -> Point | None:
    """The one with the fewest steps that is near enough in every layer."""
    near = [point for point in points if np.all(point.kl <= WITHIN * reference)]
    return min(near, key=lambda point: point.steps, default=None)


def _failed(why: str) -> Result:
    return Result(
        "lens", f"within {WITHIN - 1:.0%} of convergence: {why}", math.inf, math.inf, math.inf, 0, GOAL, "lower"
    )
