"""Which tokens conditions and masks leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from actcache.clients.conditions import Condition
from actcache.clients.token_index import Listed, Masked, TokenIndex
from actcache.schemas.errors import InvalidInput

AT_ONCE = 1 << 20
"""Tokens that are looked at at once."""


def checked_mask(mask: Any) -> Any:
    """A boolean array, numpy or Dask, of one dimension.

    Raises:
        InvalidInput: it is something else.
    """
    mask = mask if hasattr(mask, "compute") else np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 1:
        raise InvalidInput(f"where(mask): one boolean a token is asked for, not {mask.ndim}-dimensional {mask.dtype}")
    return mask


def kept(
    index: TokenIndex,
    column: Callable[[str, int, int], np.ndarray],
    asked: Sequence[Condition],
    masks: Sequence[Any],
) -> TokenIndex:
    """The tokens of an index for which all conditions and masks hold. `column` reads a field of the positions [low, high).

    Raises:
        InvalidInput: a mask has another length.
    """
    for mask in masks:
        if np.isnan(mask.shape[0]):
            raise InvalidInput("where(mask): a Dask mask of unknown length; call its compute_chunk_sizes() first")
        if mask.shape != (len(index),):
            raise InvalidInput(
                f"where(mask): {mask.shape[0]:,} values for the {len(index):,} tokens of what it is asked of"
            )
    arrays = [mask if isinstance(mask, np.ndarray) else np.asarray(mask.compute()) for mask in masks]
    bits, listed = Masked.empty(index.end), [np.empty(0, np.int64)]
    for low in range(0, len(index), AT_ONCE):
        high = min(low + AT_ONCE, len(index))
        keep = np.ones(high - low, bool)
        for array in arrays:
            keep &= array[low:high]
        for condition in asked:
            keep &= condition.holds(column(condition.field, low, high))
        tokens = index.tokens(low, high)[keep]
        if index.ascending:
            Masked.mark(bits, tokens)
        else:
            listed.append(tokens)
    return Masked(bits) if index.ascending else Listed(np.concatenate(listed))
