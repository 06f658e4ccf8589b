"""A model's stored head: final norm and unembedding as a declared list of operations, evaluated in numpy.

Operations, in order, on h of shape (n, d_model):

- `layer_norm` (Ba et al. 2016, arXiv 1607.06450): (h - mean(h)) / sqrt(var(h) + eps) · gain + bias
- `linear`: h @ weight.T
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.schemas.errors import Corrupt, Unsupported

Operation = Mapping[str, str | float]


@dataclass(frozen=True)
class Head:
    """Operations, and the arrays that they name, float32."""

    operations: Sequence[Operation]
    arrays: Mapping[str, np.ndarray]

    def logits(self, h: np.ndarray) -> np.ndarray:
        """The logits (n, vocabulary) of residual vectors (n, d_model), float32.

        Raises:
            Unsupported: an operation that this version does not know.
        Corrupt: an operation names an array that there is not.
        """
        x = np.asarray(h, np.float32)
        for operation in self.operations:
            x = self._apply(operation, x)
        return x

    def _apply(self, operation: Operation, x: np.ndarray) -> Any:
        kind = operation.get("op")
        if kind == "layer_norm":
            centred = x - x.mean(axis=-1, keepdims=True)
            variance = np.square(centred).mean(axis=-1, keepdims=True)
            normal = centred / np.sqrt(variance + np.float32(operation["eps"]))
            return normal * self._array(operation, "gain") + self._array(operation, "bias")
        if kind == "linear":
            return x @ self._array(operation, "weight").T
        raise Unsupported(f"the dataset's head uses operation {kind!r}; upgrade actcache")

    def check(self, d_model: int) -> None:
        """Check that the operations that this version knows name arrays that fit vectors of `d_model`.

        Raises:
            Corrupt: one does not.
        """
        for operation in self.operations:
            kind = operation.get("op")
            if kind == "layer_norm":
                fits = isinstance(operation.get("eps"), float) and all(
                    self._array(operation, role).shape == (d_model,) for role in ("gain", "bias")
                )
            elif kind == "linear":
                weight = self._array(operation, "weight")
                fits, d_model = weight.ndim == 2 and weight.shape[1] == d_model, weight.shape[0]
            else:
                return  # of a later version: it tells when it is evaluated
            if not fits:
                raise Corrupt(f"the head's operation {kind!r} does not fit vectors of {d_model} dimensions")

    def _array(self, operation: Operation, role: str) -> np.ndarray:
        name = str(operation.get(role))
        if name not in self.arrays:
            raise Corrupt(f"the head's operation {operation.get('op')!r} names no array of the dataset as its {role}")
        return self.arrays[name]
