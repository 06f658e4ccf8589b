"""Gradients of what a head makes of a state with regard to that state: vector-Jacobian products of its declared operations, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actcache.cache.head import Head, Operation
from actcache.clients.evaluation import Prediction
from actcache.clients.lens.translators import Lens
from actcache.schemas.errors import Unsupported

Pullback = Callable[[np.ndarray], np.ndarray]


def vjp(head: Head, h: np.ndarray) -> tuple[np.ndarray, Pullback]:
    """The logits (n, vocabulary) of states (n, d), and what takes a gradient with regard to them to one with regard to h, (n, d).

    Reverse-mode differentiation, operation by operation (Griewank & Walther 2008, ch. 3). float64 states stay float64,
    others become float32.

    Raises:
        Unsupported: an operation that this version does not know.
        Corrupt: an operation names an array that there is not.
    """
    x = np.asarray(h) if np.asarray(h).dtype == np.float64 else np.asarray(h, np.float32)
    trace = [x]
    for operation in head.operations:
        trace.append(head.apply(operation, trace[-1]))

    def pullback(gradient: np.ndarray) -> np.ndarray:
        for operation, before, after in reversed(list(zip(head.operations, trace[:-1], trace[1:], strict=True))):
            gradient = _back(head, operation, before, after, gradient)
        return gradient

    return trace[-1], pullback


def through(lens: Lens, head: Head, layer: int, h: np.ndarray) -> tuple[np.ndarray, Pullback]:
    """The same through a lens: `vjp` of head(h + W h + b), with W and b of the layer's translator."""
    logits, pullback = vjp(head, lens.translate(layer, h))
    number = lens.translator(layer)
    if number is None or not lens.weight[number].any():
        return logits, pullback

    def translated(gradient: np.ndarray) -> np.ndarray:
        found = pullback(gradient)
        return np.asarray(found + found @ lens.weight[number])

    return logits, translated


def of_losses(
    lens: Lens,
    head: Head,
    layer: int,
    h: np.ndarray,
    targets: Sequence[np.ndarray],
    finals: Sequence[Prediction] = (),
) -> tuple[Prediction, list[np.ndarray]]:
    """What a lens predicts of states (n, d), and gradients with regard to them, each (n, d).

    First, of each of `targets`, (n,) ids, that of their cross-entropy: J^T (q - onehot(target)), with q the prediction and J the
    Jacobian of the logits. Then, of each p of `finals`, that of KL(p ‖ q): J^T (q - p).
    """
    logits, pullback = through(lens, head, layer, h)
    found = Prediction.of(logits)
    gradients = []
    for target in targets:
        wrong = found.probability.copy()
        wrong[np.arange(len(target)), target] -= 1
        gradients.append(pullback(wrong))
    return found, [*gradients, *(pullback(found.probability - final.probability) for final in finals)]


def _back(head: Head, operation: Operation, x: np.ndarray, y: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient with regard to what came in, x, of an operation that made y of it."""
    kind = operation.get("op")
    if kind in ("layer_norm", "rms_norm"):
        centred = x - x.mean(axis=-1, keepdims=True) if kind == "layer_norm" else x
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(operation["eps"]))
        unit = centred / scale
        scaled = gradient * head.array(operation, "gain") if "gain" in operation else gradient
        inner = scaled - unit * (scaled * unit).mean(axis=-1, keepdims=True)
        if kind == "layer_norm":
            inner = inner - scaled.mean(axis=-1, keepdims=True)
        return np.asarray(inner / scale)
    if kind == "linear":
        return np.asarray(gradient @ head.array(operation, "weight"))
    if kind == "first":
        return np.pad(gradient, ((0, 0), (0, x.shape[-1] - gradient.shape[-1])))
    if kind == "scale":
        return gradient * np.float32(operation["factor"])
    if kind == "softcap":
        return np.asarray(gradient * (1 - np.square(y / np.float32(operation["cap"]))))
    raise Unsupported(f"the dataset's head uses operation {kind!r}; upgrade actcache")
