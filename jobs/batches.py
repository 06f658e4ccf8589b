"""The batches of a block: a function of the plan and the block alone, never of the worker or of what ran before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from actcache.schemas.plan import BatchRule


@dataclass(frozen=True)
class Batch:
    """Sequences run together.

    `keep` (sequence, position) marks the block's own tokens, in the order of the token axis; `starts` is each sequence's
    first token on that axis.
    """

    sequences: range
    starts: np.ndarray
    lengths: np.ndarray
    keep: torch.Tensor


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Sequences of tokens: `input_ids` and `attention_mask` are (sequence, position), int64, padded on the right."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def touching(sequence_start: np.ndarray, start: int, stop: int) -> range:
    """The sequences that have a token in [start, stop)."""
    first = int(np.searchsorted(sequence_start, start, side="right")) - 1
    last = int(np.searchsorted(sequence_start, stop, side="left"))
    return range(first, last)


def batches(rule: BatchRule, sequence_start: np.ndarray, start: int, stop: int) -> Iterator[Batch]:
    """The batches of the block [start, stop); tokens outside it are run and not kept."""
    wanted = touching(sequence_start, start, stop)
    for first in range(wanted.start, wanted.stop, rule.size):
        sequences = range(first, min(first + rule.size, wanted.stop))
        starts = sequence_start[sequences.start : sequences.stop]
        lengths = sequence_start[sequences.start + 1 : sequences.stop + 1] - starts
        position = np.arange(int(lengths.max()))
        token = starts[:, None] + position
        keep = (position < lengths[:, None]) & (token >= start) & (token < stop)
        yield Batch(sequences, starts, lengths, torch.from_numpy(keep))


def with_tokens(batch: Batch, pad_token_id: int, token_id: np.ndarray, offset: int) -> TokenBatch:
    """A batch with its tokens, padded on the right to the longest. `token_id[i]` is the token at `offset + i`."""
    ids = np.full(tuple(batch.keep.shape), pad_token_id, np.int64)
    for row, (begin, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        ids[row, :length] = token_id[begin - offset : begin - offset + length]
    mask = np.arange(ids.shape[1]) < batch.lengths[:, None]
    return TokenBatch(
        batch.sequences,
        batch.starts,
        batch.lengths,
        batch.keep,
        torch.from_numpy(ids),
        torch.from_numpy(mask.astype(np.int64)),
    )


def recomputed_fraction(sequence_start: np.ndarray, n_tokens: int, block_tokens: int) -> float:
    """Tokens that are run a second time since their sequence crosses a block's border, per token of the dataset."""
    borders = np.arange(block_tokens, n_tokens, block_tokens)
    owner = np.searchsorted(sequence_start, borders, side="right") - 1
    crossed = sequence_start[owner] < borders
    owner = owner[crossed]
    return float((sequence_start[owner + 1] - sequence_start[owner]).sum() / n_tokens) if len(owner) else 0.0
