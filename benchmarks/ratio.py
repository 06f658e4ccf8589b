"""Two or more ways of doing the same, timed in turns, so that the noise of a shared machine hits them all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

ROUNDS = 5
MOST_ROUNDS = 40

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """One ratio. `low` and `high` are the quartiles of the rounds; `better` says on which side of the goal it is met."""

    benchmark: str
    what: str
    ratio: float
    low: float
    high: float
    rounds: int
    goal: float | None = None
    better: Literal["higher", "lower"] = "higher"
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal

    def line(self) -> str:
        """The result as it is printed."""
        sign = "≥" if self.better == "higher" else "≤"
        verdict = "no goal" if self.goal is None else f"goal {sign} {self.goal:g}: {'met' if self.met else 'MISSED'}"
        figures = "; ".join(f"{name} {value:,.3g}" for name, value in self.figures.items())
        head = f"  {self.what}: {self.ratio:.2f} ({self.low:.2f} to {self.high:.2f} in {self.rounds} rounds), {verdict}"
        return f"{head}\n    {figures}" if figures else head


def alternate(sides: Mapping[str, Callable[[], float]], seconds: float, rounds: int = ROUNDS) -> Times:
    """Seconds of each side by round. Each round runs every side once, every other round in the opposite order.

    A side returns the seconds that count, so that it can prepare and tidy up outside them. There is one round to warm up, then at
    least `rounds`, and more until `seconds` are over.
    """
    times: Times = {name: [] for name in sides}
    for side in sides.values():
        side()
    began, order = time.perf_counter(), list(sides)
    for number in range(MOST_ROUNDS):
        if number >= rounds and time.perf_counter() - began > seconds:
            break
        for name in order:
            gc.collect()
            times[name].append(sides[name]())
        order.reverse()
    return times


def fastest(times: Times, prefix: str) -> list[float]:
    """The seconds of that side, among those whose names begin so, which was fastest by its median."""
    return min((seconds for name, seconds in times.items() if name.startswith(prefix)), key=statistics.median)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A side that counts all its time."""

    def side() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return side


def compare(
    benchmark: str,
    what: str,
    times: Times,
    ours: str,
    peer: str,
    *,
    goal: float | None = None,
    better: Literal["higher", "lower"] = "higher",
    amount: float | None = None,
    unit: str = "",
) -> Result:
    """The median over the rounds of our speed ÷ the peer's ("higher"), or of our time ÷ the peer's ("lower").

    With `amount`, the work of one round, the figures are speeds in `unit`, else medians of seconds.
    """
    pairs = list(zip(times[ours], times[peer], strict=True))
    ratios = [theirs / mine if better == "higher" else mine / theirs for mine, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {side: statistics.median(times[side]) for side in (ours, peer)}
    figures = {f"{side}, {unit}": amount / value for side, value in medians.items()} if amount else {}
    figures = figures or {f"{side}, s": value for side, value in medians.items()}
    return Result(benchmark, what, statistics.median(ratios), low, high, len(ratios), goal, better, figures)
