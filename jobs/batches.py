"""The batches of a block: a function of the plan and the block alone, never of the worker or of what ran before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from actcache.jobs.grouping import grouped, padded_length
from actcache.schemas.plan import BatchRule


@dataclass(frozen=True)
class Batch:
    """Sequences run together.

    `sequences` (sequence) are their indices; `starts` and `lengths` (sequence) say where on the token axis each begins and how
    long it is. `keep` (sequence, position) marks the block's own tokens, and `tokens` (kept) is the index on the token axis of
    each of these, in the order of `keep`'s rows.
    """

    sequences: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    keep: torch.Tensor
    tokens: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether every position is kept."""
        return len(self.tokens) == self.keep.numel()


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
    lengths = np.diff(sequence_start[wanted.start : wanted.stop + 1])
    for group in grouped(rule, lengths):
        starts = sequence_start[wanted.start + group]
        position = np.arange(padded_length(rule, lengths[group]))
        token = starts[:, None] + position
        keep = (position < lengths[group][:, None]) & (token >= start) & (token < stop)
        yield Batch(wanted.start + group, starts, lengths[group], torch.from_numpy(keep), token[keep])


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
        batch.tokens,
        torch.from_numpy(ids),
        torch.from_numpy(mask.astype(np.int64)),
    )
