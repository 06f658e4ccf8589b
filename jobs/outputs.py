"""Per-token outputs: what the model predicts at each token, of one pass over its logits.

With logits z (float32) of a token and Z = log Σ exp(z_i): loss = Z - z_successor, entropy = -Σ p_i log p_i with
p = exp(z - Z), both in nats; `topk` holds the largest z_i, their ids, and Z.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor

import numpy as np
import torch
from torch.nn import functional

from actcache.cache.encoder import encode_shard
from actcache.jobs.batches import TokenBatch
from actcache.jobs.batching import LEAST_POSITIONS
from actcache.jobs.head import to_numpy
from actcache.jobs.parts import ModelParts
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import OutOfRange
from actcache.schemas.outputs import ENTROPY, LOSS, TOPK_LOG_NORMALIZER, TOPK_LOGIT, TOPK_TOKEN_ID

LOGITS_AT_ONCE = 1 << 26
"""Most logits held at once: 256 MiB. A larger batch is taken in portions."""
VALUES_AT_ONCE = 1 << 22
"""Most logits of which more is made at once."""

_NOTHING = -100
"""cross_entropy's word for "no target"."""


class OutputEncoder:
    """Gathers the outputs of the tokens [start, stop) of a block. `layouts` are those of the outputs asked for."""

    def __init__(
        self, layouts: Collection[ArrayLayout], vocabulary: int, start: int, stop: int, pool: Executor
    ) -> None:
        self._layouts = {layout.name: layout for layout in layouts}
        self._arrays = {
            name: np.empty((stop - start, *layout.row_shape), layout.numpy_dtype)
            for name, layout in self._layouts.items()
        }
        self._start = start
        self._pool = pool
        self._positions = max(1, LOGITS_AT_ONCE // max(1, vocabulary))
        self._k = next((layout.shape[1] for layout in layouts if layout.name == TOPK_LOGIT), None)

    @property
    def names(self) -> list[str]:
        """The arrays' names."""
        return list(self._layouts)

    @torch.inference_mode()
    def append(self, parts: ModelParts, state: torch.Tensor, batch: TokenBatch) -> None:
        """Add the kept tokens of a batch of which `state` (sequence, position, width) is what the unembedding is given.

        Raises:
            OutOfRange: the model's logits are not finite.
        """
        successor = functional.pad(batch.input_ids[:, 1:], (0, 1), value=_NOTHING)
        own = functional.pad(batch.attention_mask[:, 1:], (0, 1)) == 1
        following = successor.where(own, _NOTHING)[batch.keep]
        rows = state.reshape(-1, state.shape[-1])[batch.keep.flatten().nonzero().flatten().to(state.device)]
        for low, high in _portions(len(rows), self._positions):
            kept = functional.pad(rows[low:high], (0, 0, 0, max(0, LEAST_POSITIONS - (high - low))))
            logits = parts.logits(kept)[: high - low]
            tokens, after = batch.tokens[low:high], following[low:high]
            for name, values in measure(logits, after.to(state.device), self._layouts, self._k).items():
                found = to_numpy(values)
                _check(name, found, tokens, after.numpy())
                self._arrays[name][tokens - self._start] = found

    def finish(self, name: str) -> memoryview:
        """The bytes of an array's shard."""
        return encode_shard(self._layouts[name], self._arrays.pop(name), self._pool)


def _portions(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Rows in portions of at most `most`, all of about one size."""
    portions = -(-count // most)
    for number in range(portions):
        yield number * count // portions, (number + 1) * count // portions


def measure(
    logits: torch.Tensor, successor: torch.Tensor, wanted: Iterable[str], k: int | None
) -> dict[str, torch.Tensor]:
    """The wanted outputs of logits (position, vocabulary), float32, by the names of their arrays.

    `successor` (position) is each token's next one in its sequence, or -100 where there is none: there the loss is NaN.
    """
    found: dict[str, torch.Tensor] = {}
    names = set(wanted)
    if LOSS in names:
        loss = functional.cross_entropy(logits, successor, reduction="none", ignore_index=_NOTHING)
        found[LOSS] = loss.masked_fill(successor == _NOTHING, torch.nan)
    if ENTROPY in names:
        found[ENTROPY] = torch.cat([_entropy(some) for some in _split(logits, logits.shape[-1])])
    if k is not None:
        values, ids = largest(logits, k)
        found[TOPK_LOGIT], found[TOPK_TOKEN_ID] = values, ids.to(torch.int32)
        found[TOPK_LOG_NORMALIZER] = torch.logsumexp(logits, dim=-1)
    return found


def _split(rows: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Rows in portions, so that what is made of their logits on the way is small beside the logits themselves."""
    return torch.split(rows, max(1, VALUES_AT_ONCE // vocabulary))


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    # entr(p) = -p log p is 0 at p = 0, where p times a log of its own would be NaN; and precise near p = 1
    entropy: torch.Tensor = torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)
    return entropy


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, descending, and where they are; of equal values the lower place comes first.

    `torch.topk` leaves open which of equal values it takes, and models that compute in 16 bits have many.
    """
    values, places = logits.topk(k, dim=-1)
    # Ties across the border of the k: those rows again, with values and places as one number that is never equal.
    torn = ((logits >= values[:, -1:]).sum(dim=-1) > k).nonzero().flatten()
    if len(torn):
        places[torn] = torch.cat([_by_value_and_place(logits[rows], k) for rows in _split(torn, logits.shape[-1])])
    places = places.sort(dim=-1).values
    values = logits.gather(-1, places)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(-1, order), places.gather(-1, order)


def _by_value_and_place(logits: torch.Tensor, k: int) -> torch.Tensor:
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: they are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[-1] - 1
    keys = (ordered << 32) | torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _check(name: str, rows: np.ndarray, tokens: np.ndarray, successor: np.ndarray) -> None:
    """Refuse what logits that are not finite leave. A single logit may be -inf: a token that the model rules out."""
    if name in (TOPK_LOGIT, TOPK_TOKEN_ID):
        return
    bad = ~np.isfinite(rows)
    if name == LOSS:
        bad &= successor != _NOTHING
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise OutOfRange(
            f"{name}, token {tokens[row]}: {float(rows[row])!r} from the model's logits; "
            "try --compute-dtype float32, into another URL"
        )
