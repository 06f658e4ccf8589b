"""Measures along one axis, as lines with their intervals as bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.figures.canvas import drawable, plain, spoken
from actcache.clients.figures.colours import LINES, MARKERS
from actcache.clients.results import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 13
MOST_MARKED = 40
"""Lines of more points have no markers."""
BAND = 0.2
MOST_INSIDE, LEGEND_COLUMNS, LEGEND_LINE = 2, 2, 0.16
BESIDE, CHARACTER = 42, 0.065
"""Characters that stand beside each other below a frame of half a page, and the inches that one takes."""
LINE = 36
"""Characters of a line beside an axis."""


def draw_lines(axes: Axes, series: Mapping[str, Measure], labels: Sequence[str], across: str, said: str) -> None:
    """Draw series by name over one axis; `said` is what stands beside the other one. More than one have a legend."""
    places = np.arange(len(labels))
    for number, (name, measure) in enumerate(series.items()):
        colour = LINES[number % len(LINES)]
        marker = MARKERS[number % len(MARKERS)] if len(labels) <= MOST_MARKED else ""
        style = ("-", "--", ":")[number // len(LINES) % 3]
        axes.plot(places, measure.value, style, marker=marker, color=colour, label=drawable(name), zorder=3)
        if measure.low is not None and measure.high is not None:
            axes.fill_between(places, measure.low, measure.high, color=colour, alpha=BAND, linewidth=0, zorder=2)
    ticks(axes, "x", labels)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.5)
    plain([axes.set_xlabel(drawable(spoken(across))), axes.set_ylabel(fill(drawable(said), LINE))])
    if len(series) > MOST_INSIDE:
        above = axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=LEGEND_COLUMNS)
        plain(above.get_texts())
    elif len(series) > 1:
        plain(axes.legend().get_texts())


def turned_height(labels: Sequence[str]) -> float:
    """Inches more that the names below a frame take where they stand upright: see `ticks`."""
    named = [labels[place] for place in _named(labels, MOST_TICKS)]
    return CHARACTER * max(map(len, named)) if _turned(named) else 0.0


def legend_height(series: int) -> float:
    """Inches that a legend takes above its frame: one of few series is in it."""
    return LEGEND_LINE * -(-series // LEGEND_COLUMNS) if series > MOST_INSIDE else 0.0


def ticks(axes: Axes, which: str, labels: Sequence[str], most: int = MOST_TICKS) -> None:
    """Name places of an axis, as many as have room; round numbers where not all have. Long names below a frame stand upright."""
    places = _named(labels, most)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(places)
    named = [labels[place] for place in places]
    plain(axis.set_ticklabels([drawable(name) for name in named]))
    if which == "x" and _turned(named):
        axis.set_tick_params(rotation=90)


def _turned(named: Sequence[str]) -> bool:
    """Whether so many names are too long to stand beside each other below half a page."""
    return len(named) > 1 and sum(map(len, named)) + len(named) > BESIDE


def _named(labels: Sequence[str], most: int) -> list[int]:
    """The places that are named."""
    step = next(step for step in _STEPS if len(labels) <= most * step)
    numbers = {place: int(label) for place, label in enumerate(labels) if label.isdecimal()}
    if step == 1 or len(numbers) < len(labels) - 1:
        return list(range(0, len(labels), step))
    return [place for place, number in numbers.items() if number % step == 0]


_STEPS = [factor * 10**power for power in range(12) for factor in (1, 2, 5)]
