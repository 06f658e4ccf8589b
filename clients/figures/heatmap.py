"""Measures along two axes, as fields of colours with their numbers in them where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients.figures.canvas import drawable, plain, spoken, with_unit
from actcache.clients.figures.colours import SEQUENTIAL, diverging, ink
from actcache.clients.figures.lines import ticks
from actcache.clients.results import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED = 14
FEW, FAR = 0.05, 0.5
"""What is beyond the 5th or 95th percentile by half of what is between these has the colour at that end: it would hide all others."""
SIGNED = ("penalty", "difference")
"""Words in the name of a measure that is about 0 on both sides, whatever the values are."""


def draw_heatmap(
    figure: Figure,
    axes: Axes,
    name: str,
    measure: Measure,
    down: Sequence[str],
    across: Sequence[str],
    numbers_at: float = 6,
) -> None:
    """Draw a measure (down, across) with a colour bar; small ones with numbers, `numbers_at` points high."""
    import matplotlib
    from matplotlib.colors import Normalize

    values = np.asarray(measure.value, np.float64)
    low, high = _ends(values[np.isfinite(values)])
    if signed(name, values):
        most = max(abs(low), abs(high)) or 1.0
        low, high = min(low, 0.0), max(high, 0.0)
        name_of_map, norm = None, Normalize(-most, most)
    else:
        name_of_map, norm = SEQUENTIAL, Normalize(low, high if high > low else low + 1)
    colours = (matplotlib.colormaps[name_of_map] if name_of_map else diverging()).with_extremes(bad="#ffffff")
    drawn = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    if numbered(values.shape):
        _write(axes, measure.value, colours(norm(values)), numbers_at)
    ticks(axes, "x", across)
    ticks(axes, "y", down, 2 * MOST_NUMBERED)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    plain([axes.set_xlabel(drawable(spoken(measure.axes[1]))), axes.set_ylabel(drawable(spoken(measure.axes[0])))])
    plain(axes.set_title(drawable(with_unit(name, measure.unit))))
    beyond = (bool((values < low).any()), bool((values > high).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, fraction=0.05, aspect=25, extend=extend)
    bar.outline.set_visible(False)
    if high > low:
        bar.ax.set_ylim(low, high)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """From where to where colours go: from the least value to the largest, but for few that are far beyond all others."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = np.quantile(values, [FEW, 1 - FEW])
    room = FAR * (inner_high - inner_low)
    if room > 0:
        low = float(values[values >= inner_low - room].min())
        high = float(values[values <= inner_high + room].max())
    return low, high


def signed(name: str, values: np.ndarray) -> bool:
    """Whether a measure is about 0 on both sides."""
    return any(word in name for word in SIGNED) or bool((values < 0).any())


def numbered(shape: tuple[int, ...]) -> bool:
    """Whether a field has room for its numbers."""
    return max(shape) <= MOST_NUMBERED


def _write(axes: Axes, values: np.ndarray, colours: Any, size: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column, row, _number(value), ha="center", va="center", fontsize=size, color=ink(colours[row, column])
            )


def _number(value: float | np.integer) -> str:
    """Two digits behind the point, fewer of what is larger, none of a count; no -0."""
    if isinstance(value, np.integer) and abs(int(value)) < 10_000:
        return str(int(value)).replace("-", "\N{MINUS SIGN}")
    value = float(value)
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    if abs(value) >= 10_000:
        return f"{value:.0e}".replace("e+0", "e")
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")
