"""Probabilities of logits, and how well a prediction does: in numpy, a block of rows a core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from actcache.cache.threads import spread

BLOCK_VALUES = 1 << 20
"""Logits that are worked on at once by a core: they stay in its cache."""
FEWEST_ROWS = 64
LEAST = np.finfo(np.float32).min / 2
"""The logarithm of what is impossible, as float32 can subtract it."""
MEASURES = {"loss": "nats", "kl": "nats", "entropy": "nats", "agreement": "share"}


@dataclass(frozen=True)
class Prediction:
    """Next-token distributions (n, vocabulary), float32: `log`arithms of probabilities, and the probabilities."""

    log: np.ndarray
    probability: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Prediction:
        """The softmax of logits (n, vocabulary)."""
        log = logits - logits.max(axis=-1, keepdims=True)
        probability = np.exp(log)
        total = probability.sum(axis=-1, keepdims=True)
        log -= np.log(total)
        np.maximum(log, LEAST, out=log)  # what is impossible, such as a row that pads a vocabulary, counts 0 in sums
        probability /= total
        return cls(log, probability)

    def loss(self, target: np.ndarray) -> np.ndarray:
        """Cross-entropy of what came, (n,) ids, in nats."""
        return np.asarray(-self.log[np.arange(len(target)), target])

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of each distribution, (n,), in nats."""
        return -_dot(self.probability, self.log)

    @property
    def best(self) -> np.ndarray:
        """The most probable id of each, (n,)."""
        return np.asarray(self.log.argmax(axis=-1))

    def kl(self, other: Prediction) -> np.ndarray:
        """KL(this ‖ other) of each row, (n,), in nats."""
        return _dot(self.probability, self.log - other.log)

    def measures(self, final: Prediction, target: np.ndarray) -> np.ndarray:
        """Those of `MEASURES`, (4, n): cross-entropy of `target`, KL(final ‖ this), entropy, and whether the best is the final's."""
        return np.stack([self.loss(target), final.kl(self), self.entropy, self.best == final.best])


def cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropy of ids (n,) under logits (n, vocabulary), (n,) in nats: log Σ exp(logits) less the id's own."""
    below = logits - logits.max(axis=-1, keepdims=True)
    own = below[np.arange(len(target)), target]
    np.exp(below, out=below)
    return np.asarray(np.log(below.sum(axis=-1)) - own)


def by_block(rows: int, width: int, work: Callable[[slice], object]) -> None:
    """Call `work` on blocks of rows whose logits, `width` a row, fit a core's cache, on all cores.

    What it raises first is raised.
    """
    step = max(FEWEST_ROWS, BLOCK_VALUES // width)
    with threadpool_limits(1, user_api="blas"):
        spread(work, list(_blocks(rows, step)))


def _blocks(rows: int, step: int) -> Iterator[slice]:
    for low in range(0, rows, step):
        yield slice(low, min(low + step, rows))


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows."""
    return np.asarray(np.einsum("ij,ij->i", a, b))
