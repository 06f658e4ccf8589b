"""A model's stored head: final norm and unembedding as a declared list of operations, evaluated in numpy.

Operations, in order, on h of shape (n, d_model):

- `layer_norm` (Ba et al. 2016, arXiv 1607.06450): (h - mean(h)) / sqrt(var(h) + eps) · gain + bias
- `rms_norm` (Zhang & Sennrich 2019, arXiv 1910.07467): h / sqrt(mean(h²) + eps) · gain + bias
- `linear`: h @ weight.T + bias
- `first`: h[:, :rows], of an unembedding that was padded to a round number of rows
- `scale`: h · factor
- `softcap` (Gemma 2, arXiv 2408.00118): cap · tanh(h / cap)

Gain and bias are there where the operation names them.
"""

from __future__ import annotations

import math
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
            x = self.apply(operation, x)
        return x

    def apply(self, operation: Operation, x: np.ndarray) -> Any:
        """What one of the operations makes of x (n, width).

        Raises: as `logits`.
        """
        kind = operation.get("op")
        if kind in ("layer_norm", "rms_norm"):
            x = x - x.mean(axis=-1, keepdims=True) if kind == "layer_norm" else x
            x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(operation["eps"]))
            x = x * self.array(operation, "gain") if "gain" in operation else x
            return x + self.array(operation, "bias") if "bias" in operation else x
        if kind == "linear":
            x = x @ self.array(operation, "weight").T
            return x + self.array(operation, "bias") if "bias" in operation else x
        if kind == "first":
            return x[..., : int(operation["rows"])]
        if kind == "scale":
            return x * np.float32(operation["factor"])
        if kind == "softcap":
            cap = np.float32(operation["cap"])
            return np.tanh(x / cap) * cap
        raise Unsupported(f"the dataset's head uses operation {kind!r}; upgrade actcache")

    def check(self, d_model: int) -> None:
        """Check that the operations that this version knows name arrays that fit vectors of `d_model`.

        Raises:
            Corrupt: one does not.
        """
        width = d_model
        for operation in self.operations:
            kind = operation.get("op")
            if kind in ("layer_norm", "rms_norm"):
                fits = _is_number(operation, "eps") and self._fits(operation, ("gain", "bias"), width)
            elif kind == "linear":
                weight = self.array(operation, "weight")
                fits = weight.ndim == 2 and weight.shape[1] == width
                width = weight.shape[0]
                fits = fits and self._fits(operation, ("bias",), width)
            elif kind == "first":
                fits = _is_number(operation, "rows") and 1 <= float(operation["rows"]) <= width
                width = int(float(operation["rows"])) if fits else width
            elif kind in ("scale", "softcap"):
                name = "factor" if kind == "scale" else "cap"
                fits = _is_number(operation, name) and float(operation[name]) != 0
            else:
                return  # of a later version: it tells when it is evaluated
            if not fits:
                raise Corrupt(f"the head's operation {kind!r} does not fit vectors of {width} dimensions")

    def _fits(self, operation: Operation, roles: tuple[str, ...], width: int) -> bool:
        return all(self.array(operation, role).shape == (width,) for role in roles if role in operation)

    def array(self, operation: Operation, role: str) -> np.ndarray:
        """The array that an operation names as its `weight`, `gain` or `bias`.

        Raises:
            Corrupt: there is no such array.
        """
        name = str(operation.get(role))
        if name not in self.arrays:
            raise Corrupt(f"the head's operation {operation.get('op')!r} names no array of the dataset as its {role}")
        return self.arrays[name]


def _is_number(operation: Operation, name: str) -> bool:
    value = operation.get(name)
    return isinstance(value, int | float) and math.isfinite(value)
