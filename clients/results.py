"""What a measurement found: named arrays with units, named axes and intervals, as numbers, text, JSON and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from actcache.schemas.errors import NotFound

DIGITS = 4
MOST_COLUMNS = 12


@dataclass(frozen=True, eq=False)
class Measure:
    """One quantity.

    Attributes:
        value: an array with one axis for each of `axes`.
        unit: `nats`, `share`, … ; `1` for a number without one.
        axes: what each axis counts, such as `layer`.
        low, high: the ends of its interval, shaped as the value; None where there is none.
    """

    value: np.ndarray
    unit: str
    axes: tuple[str, ...] = ("layer",)
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Results(Mapping[str, np.ndarray]):
    """Measures by name. `results["loss"]` is an array; `interval`, `unit` and `axes` tell more of it.

    Attributes:
        measures: each with its unit and interval.
        labels: what the places of an axis are called, by axis.
        facts: what the numbers rest on, such as the number of tokens; JSON takes it.
    """

    measures: Mapping[str, Measure]
    labels: Mapping[str, Sequence[str]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.measure(name).value

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    def __eq__(self, other: object) -> bool:
        return self is other  # arrays have no one answer

    __hash__ = object.__hash__

    def measure(self, name: str) -> Measure:
        """A measure with its unit, axes and interval.

        Raises:
            NotFound: no such measure.
        """
        if name not in self.measures:
            raise NotFound(f"no measure {name!r}; there is {', '.join(self.measures)}")
        return self.measures[name]

    def interval(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The ends of a measure's interval, each shaped as the measure. How it was found is among the `facts`.

        Raises:
            NotFound: no such measure, or it has no interval.
        """
        found = self.measure(name)
        if found.low is None or found.high is None:
            raise NotFound(f"the measure {name!r} has no interval")
        return found.low, found.high

    def unit(self, name: str) -> str:
        """The unit of a measure.

        Raises:
            NotFound: no such measure.
        """
        return self.measure(name).unit

    def axes(self, name: str) -> tuple[str, ...]:
        """What each axis of a measure counts.

        Raises:
            NotFound: no such measure.
        """
        return self.measure(name).axes

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it; what is not a number is null."""
        measures = {
            name: {
                "unit": each.unit,
                "axes": list(each.axes),
                "value": _plain(each.value),
                **({"low": _plain(each.low), "high": _plain(each.high)} if each.low is not None else {}),
            }
            for name, each in self.measures.items()
        }
        return {
            **self.facts,
            "labels": {axis: list(names) for axis, names in self.labels.items()},
            "measures": measures,
        }

    def to_csv(self, path: str | Path) -> Path:
        """Write one line a number: measure, unit, its place on each axis, value, low, high. Returns the path."""
        axes = list(dict.fromkeys(axis for each in self.measures.values() for axis in each.axes))
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["measure", "unit", *axes, "value", "low", "high"])
            for name, each in self.measures.items():
                for place in np.ndindex(each.value.shape):
                    where = dict(zip(each.axes, place, strict=True))
                    named = [self.labels[axis][where[axis]] if axis in where else "" for axis in axes]
                    ends = ["" if end is None else repr(float(end[place])) for end in (each.low, each.high)]
                    lines.writerow([name, each.unit, *named, repr(float(each.value[place])), *ends])
        return path

    def __repr__(self) -> str:
        said = [", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in self.facts.items())]
        said += [
            self._table(axis) for axis in dict.fromkeys(m.axes[0] for m in self.measures.values() if len(m.axes) == 1)
        ]
        said += [self._matrix(name) for name, each in self.measures.items() if len(each.axes) == 2]
        said += [
            f"{name}: {each.value:.{DIGITS}g} {each.unit}" for name, each in self.measures.items() if not each.axes
        ]
        return "\n".join(part for part in said if part)

    def _table(self, axis: str) -> str:
        """The measures along one axis, side by side."""
        names = [name for name, each in self.measures.items() if each.axes == (axis,)]
        heads = [f"{name} ({self.measures[name].unit})" for name in names]
        widths = [max(len(head), 9) + 2 for head in heads]
        if not len(self.labels[axis]):
            return ""
        first = max(len(axis), *map(len, self.labels[axis]))
        lines = [axis.ljust(first) + "".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
        for place, label in enumerate(self.labels[axis]):
            numbers = (_number(self[name][place]).rjust(width) for name, width in zip(names, widths, strict=True))
            lines.append(label.ljust(first) + "".join(numbers))
        return "\n".join(lines)

    def _matrix(self, name: str) -> str:
        """A measure with two axes."""
        each = self.measures[name]
        down, across = (self.labels[axis] for axis in each.axes)
        if not each.value.size:
            return ""
        shown = min(len(across), MOST_COLUMNS)
        first = max(map(len, down))
        lines = [
            f"{name} ({each.unit}), {each.axes[0]} down, {each.axes[1]} across" + (" …" if shown < len(across) else "")
        ]
        lines.append(" " * first + "".join(label.rjust(9) for label in across[:shown]))
        for label, row in zip(down, each.value, strict=True):
            lines.append(label.ljust(first) + "".join(_number(value).rjust(9) for value in row[:shown]))
        return "\n".join(lines)


def _number(value: float | np.integer) -> str:
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    plain = 10**-DIGITS <= abs(value) < 1000 or value == 0 or value != value
    return f"{value:.{DIGITS}f}" if plain else f"{value:.{DIGITS - 2}e}" if abs(value) < 1 else f"{value:.{DIGITS}g}"


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(array: np.ndarray | None) -> Any:
    if array is None:
        return None
    plain = np.asarray(array, object)
    for place in product(*map(range, plain.shape)):
        number = float(array[place])
        plain[place] = number if np.isfinite(number) else None
    return plain.tolist() if plain.shape else plain.item()
