"""Pictures of results: whatever was measured, by its axes and units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.clients.figures.canvas import COLUMN, PAGE, page, picture_path, spoken, with_unit
from actcache.clients.figures.heatmap import draw_heatmap, numbered
from actcache.clients.figures.lines import draw_lines, legend_height, turned_height
from actcache.clients.results import Measure, Results
from actcache.schemas.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES_HIGH = 2.3
ROW_HIGH, AROUND, LEAST_HIGH, MOST_HIGH = 0.23, 0.85, 1.6, 6.5
NARROW = 8
"""Columns of numbers that fit into half a page."""
MOST_PANELS = 24


@dataclass(frozen=True)
class _Panel:
    """What is drawn into one frame: several measures of one axis and unit, or one of two axes."""

    measures: Mapping[str, Measure]

    @property
    def first(self) -> Measure:
        return next(iter(self.measures.values()))

    @property
    def wide(self) -> bool:
        shape = self.first.value.shape
        return len(shape) == 2 and numbered(shape) and shape[1] > NARROW

    def height(self, labels: Mapping[str, list[str]]) -> float:
        shape = self.first.value.shape
        below = turned_height(labels[self.first.axes[-1]])
        if len(shape) == 1:
            return LINES_HIGH + legend_height(len(self.measures)) + below
        return below + (min(max(shape[0] * ROW_HIGH + AROUND, LEAST_HIGH), MOST_HIGH) if numbered(shape) else COLUMN)

    def draw(self, figure: Figure, axes: Axes, labels: Mapping[str, list[str]]) -> None:
        name, first = next(iter(self.measures.items()))
        names = [labels[axis] for axis in first.axes]
        if len(names) == 2:
            draw_heatmap(figure, axes, name, first, names[0], names[1])
            return
        said = with_unit(name, first.unit) if len(self.measures) == 1 else "" if first.unit == "1" else first.unit
        series = {spoken(name, each.unit): each for name, each in self.measures.items()}
        draw_lines(axes, series, names[0], first.axes[0], said)


def draw(results: Results, path: str | Path, measures: Sequence[str] | None = None) -> Path:
    """Draw what was measured, or those `measures` of it, as PNG or SVG by the path's ending. Returns the path.

    Measures along one axis are lines with their intervals as bands, one frame a unit; measures along two axes fields of colours, with
    numbers in them up to 14 × 14, and those of three axes one such field for each place of the first. Colours are centred at 0 where
    values are below it, and for penalties and differences, and end where few values are beyond.
    Single numbers are not drawn, nor measures that have none.

    Raises:
        NotFound: no such measure.
        InvalidInput: another ending, no such folder, nothing that can be drawn, or more than 24 frames.
        Unsupported: matplotlib is not installed.
    """
    asked = {name: results.measure(name) for name in (results if measures is None else measures)}
    asked = {name: each for name, each in asked.items() if each.value.size}
    panels = list(_panels(replace(results, measures=asked)))
    if not 0 < len(panels) <= MOST_PANELS:
        what = f"{len(panels)} frames would be drawn of {', '.join(asked) or 'nothing'}"
        raise InvalidInput(f"{path}: {what}; 1 to {MOST_PANELS} are, of measures with an axis; choose by measures")
    labels = {axis: list(names) for axis, names in results.labels.items()}
    single = len(panels) == 1 or any(panel.wide for panel in panels)
    columns = 1 if single else 2
    width = COLUMN if len(panels) == 1 and not panels[0].wide else PAGE
    rows = [panels[low : low + columns] for low in range(0, len(panels), columns)]
    heights = [max(panel.height(labels) for panel in row) for row in rows]
    with page(path, width, sum(heights)) as figure:
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for number, panel in enumerate(panels):
            panel.draw(figure, figure.add_subplot(grid[number // columns, number % columns]), labels)
    return Path(path)


def draw_together(results: Mapping[str, Results], measure: str, path: str | Path) -> Path:
    """Draw one measure of several results, such as lenses, over the same axis, with a legend. Returns the path.

    Raises:
        InvalidInput: as `draw`, or the results are not along one and the same axis in one unit.
        NotFound: one of the results lacks the measure.
        Unsupported: matplotlib is not installed.
    """
    picture_path(path)
    if not results:
        raise InvalidInput(f"{path}: no results are given")
    found = {}
    for name, each in results.items():
        if measure not in each:
            raise NotFound(f"{name}: no measure {measure!r}; there is {', '.join(each)}")
        found[name] = each.measures[measure]
    name, first = next(iter(found.items()))
    if len(first.axes) != 1:
        raise InvalidInput(f"{path}: {measure!r} has {len(first.axes)} axes; what has one is drawn together")
    labels = list(results[name].labels[first.axes[0]])
    for other, its in found.items():
        if its.axes != first.axes or its.unit != first.unit or list(results[other].labels[its.axes[0]]) != labels:
            raise InvalidInput(
                f"{path}: {measure!r} of {other!r} is along another axis, or in another unit, than of {name!r}"
            )
    with page(path, COLUMN, LINES_HIGH + legend_height(len(found)) + turned_height(labels)) as figure:
        draw_lines(figure.add_subplot(), found, labels, first.axes[0], with_unit(measure, first.unit))
    return Path(path)


def _panels(results: Results) -> Iterator[_Panel]:
    together: dict[tuple[str, str], dict[str, Measure]] = {}
    for name, each in results.measures.items():
        if len(each.axes) == 1:
            together.setdefault((each.axes[0], each.unit), {})[name] = each
    yield from map(_Panel, together.values())
    for name, each in results.measures.items():
        if len(each.axes) == 2:
            yield _Panel({name: each})
        elif len(each.axes) == 3:
            for place, label in enumerate(results.labels[each.axes[0]]):
                part = replace(each, value=each.value[place], axes=each.axes[1:], low=None, high=None)
                yield _Panel({f"{name}, {each.axes[0]} {label}": part})
