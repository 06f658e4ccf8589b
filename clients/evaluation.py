"""What every evaluation over a dataset needs: next-token pairs, and probabilities of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.whole import Whole
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.view import View


def pairs(ds: View, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every token that has a successor in its sequence, and the successor's id: two (pair,) arrays, int64.

    Only tokens among the first `max_tokens` if that is given.

    Raises:
        InvalidInput: there is none, or it is a selection, whose tokens need not follow each other.
    """
    if not isinstance(ds, Whole):
        raise InvalidInput(f"{ds.url}: a whole dataset is asked for, not a selection")
    ids = ds.tokens["token_id"].astype(np.int64)
    inside = np.ones(len(ids), bool)
    inside[ds.sequence_start[1:] - 1] = False
    token = np.flatnonzero(inside[:max_tokens])
    if not len(token):
        raise InvalidInput(f"{ds.url}: no token has a successor in its sequence")
    return token, ids[token + 1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
