"""Finding values above a threshold that is itself being found, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actcache.cache.threads import spread
from actcache.clients.geometry.histogram import Magnitudes
from actcache.clients.states import States
from actcache.schemas.errors import InvalidInput

MOST = 10_000_000
"""Values that are kept at most, at 28 bytes each."""
MARGIN = 0.5


@dataclass(frozen=True)
class Occurrences:
    """Values above their layer's threshold, ordered by layer.

    Attributes:
        layer, dimension, token: where each is: index of its layer, dimension, place on the token axis; (n,) int64.
        value: (n,) float64.
        norm_share: value² over the squared norm of its state, (n,) float64.
        median, largest: the median and the largest magnitude of each layer, (layer,) float64.
        largest_dimension: where that is, (layer,) int64.
        passes: how often the data was read.
    """

    layer: np.ndarray
    dimension: np.ndarray
    token: np.ndarray
    value: np.ndarray
    norm_share: np.ndarray
    median: np.ndarray
    largest: np.ndarray
    largest_dimension: np.ndarray
    passes: int


class _Layer:
    """What has been found of one layer."""

    def __init__(self, absolute: float, ratio: float) -> None:
        self.absolute, self.ratio = absolute, ratio
        self.magnitudes = Magnitudes()
        self.largest, self.largest_dimension = 0.0, 0
        self.restart(0.0)

    def restart(self, floor: float) -> None:
        """Keep what is above another floor, from nothing."""
        self.floor = floor
        self.found: list[tuple[np.ndarray, ...]] = []
        self.count = 0

    @property
    def threshold(self) -> float:
        """By the magnitudes so far."""
        return max(self.absolute, self.ratio * self.magnitudes.quantile(0.5))

    def see(self, states: np.ndarray) -> None:
        """Count the magnitudes of states (n, d)."""
        self.magnitudes.add(states)
        self.floor = max(self.floor, self.absolute, MARGIN * self.ratio * self.magnitudes.quantile(0.5))

    def keep(self, states: np.ndarray, token: np.ndarray) -> None:
        """Keep the values of states (n, d) above the floor."""
        highest, lowest = states.max(axis=0), states.min(axis=0)
        most = np.maximum(highest, -lowest)
        dimension = int(most.argmax())
        if most[dimension] > self.largest:
            self.largest, self.largest_dimension = float(most[dimension]), dimension
        columns = np.flatnonzero(most > self.floor)
        if not len(columns):
            return
        row, place = np.nonzero(np.abs(states[:, columns]) > self.floor)
        value = states[row, columns[place]].astype(np.float64)
        rows, back = np.unique(row, return_inverse=True)
        square = np.square(states[rows].astype(np.float64)).sum(axis=1)[back]
        self.found.append((columns[place], token[row], value, value**2 / square))
        self.count += len(row)


def occurrences(read: States, absolute: float, ratio: float) -> Occurrences:
    """The values of every layer above `absolute` and above `ratio` times the layer's median magnitude.

    Raises:
        InvalidInput: more than ten million values are to be kept.
    """
    layers = [_Layer(absolute, ratio) for _ in read.sites]
    _pass(read, layers, True)
    again = [layer for layer in layers if layer.floor > layer.threshold]
    if again:
        for layer in layers:
            layer.restart(layer.threshold)
        _pass(read, layers, False)
    parts = []
    for number, layer in enumerate(layers):
        for dimension, token, value, share in layer.found:
            above = np.abs(value) > layer.threshold
            parts.append((np.full(above.sum(), number), dimension[above], token[above], value[above], share[above]))
    none = (*[np.empty(0, np.int64)] * 3, *[np.empty(0)] * 2)
    at, dimensions, tokens, values, shares = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    return Occurrences(
        at,
        dimensions,
        tokens,
        values,
        shares,
        median=np.array([layer.magnitudes.quantile(0.5) for layer in layers]),
        largest=np.array([layer.largest for layer in layers]),
        largest_dimension=np.array([layer.largest_dimension for layer in layers]),
        passes=2 if again else 1,
    )


def _pass(read: States, layers: Sequence[_Layer], first: bool) -> None:
    for piece in read.pieces():
        tokens = read.token[piece.low : piece.high]

        def of_layer(number: int, states: Sequence[np.ndarray] = piece.states, token: np.ndarray = tokens) -> None:
            if first:
                layers[number].see(states[number])
            layers[number].keep(states[number], token)

        spread(of_layer, range(len(layers)))
        if sum(layer.count for layer in layers) > MOST:
            raise InvalidInput(
                f"{read.ds.url}: more than {MOST:,} activations are above the thresholds: raise them, or give max_tokens"
            )
