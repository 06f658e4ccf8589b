"""Where a build's inputs come from: the stored tokens, or items of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.jobs.batches import Batch, TokenBatch, batches, touching, with_tokens
from actcache.jobs.inputs import Inputs, ItemInputs, TokenInputs
from actcache.jobs.items import Items
from actcache.schemas.grid import Grid
from actcache.schemas.plan import BatchRule

ReadTokens = Callable[[int, int], np.ndarray]
"""Gives the ids (n,) of the tokens [start, stop)."""


class Feed(Protocol):
    """Makes batches of a range of the token axis."""

    def batches(self, start: int, stop: int) -> list[Batch]:
        """The batches of the tokens [start, stop), as the plan's rule makes them."""
        ...

    def inputs(self, batch: Batch) -> Inputs:
        """A batch, ready to be run."""
        ...

    def alone(self, sequence: int) -> Inputs:
        """One sequence without padding, ready to be run."""
        ...


def feed_of(grid: Grid, inputs: Items | ReadTokens, sequence_start: np.ndarray, device: torch.device) -> Feed:
    """What makes batches of a plan's inputs; `sequence_start` (n_sequences + 1), int64, are the sequences of tokens."""
    if isinstance(inputs, Items):
        return ItemFeed(inputs, grid, device)
    return TokenFeed(grid.plan.batches, sequence_start, inputs, device)


def token_ids(store: Store, grid: Grid) -> ReadTokens:
    """The tokens of a dataset."""
    return ArrayReader(store, grid.token_arrays()["token_id"]).read


class TokenFeed:
    """Tokens, and `sequence_start` (n_sequences + 1), int64, their sequences."""

    def __init__(self, rule: BatchRule, sequence_start: np.ndarray, read: ReadTokens, device: torch.device) -> None:
        self._rule = rule
        self._sequence_start = sequence_start
        self._device = device
        self._read = read

    @classmethod
    def stored(cls, store: Store, grid: Grid, sequence_start: np.ndarray, device: torch.device) -> TokenFeed:
        """The tokens of a dataset."""
        return cls(grid.plan.batches, sequence_start, token_ids(store, grid), device)

    def batches(self, start: int, stop: int) -> list[Batch]:
        """The batches of the tokens [start, stop), with their tokens."""
        wanted = touching(self._sequence_start, start, stop)
        low, high = int(self._sequence_start[wanted.start]), int(self._sequence_start[wanted.stop])
        tokens = self._read(low, high)
        plain = batches(self._rule, self._sequence_start, start, stop)
        return [with_tokens(batch, self._rule.pad_token_id, tokens, low) for batch in plain]

    def inputs(self, batch: Batch) -> TokenInputs:
        """A batch on the model's device."""
        assert isinstance(batch, TokenBatch)
        return TokenInputs(batch.input_ids.to(self._device), batch.attention_mask.to(self._device))

    def alone(self, sequence: int) -> TokenInputs:
        """One sequence on the model's device."""
        start, stop = int(self._sequence_start[sequence]), int(self._sequence_start[sequence + 1])
        ids = torch.from_numpy(self._read(start, stop).astype(np.int64))[None].to(self._device)
        return TokenInputs(ids, torch.ones_like(ids))


class ItemFeed:
    """Items of a user's own: sequence i is item i, of so many positions."""

    def __init__(self, items: Items, grid: Grid, device: torch.device) -> None:
        self._items = items.inputs
        self._positions = items.positions
        self._rule = grid.plan.batches
        self._sequence_start = np.arange(grid.n_sequences + 1) * items.positions
        self._device = device

    def batches(self, start: int, stop: int) -> list[Batch]:
        """The batches of the rows [start, stop)."""
        return list(batches(self._rule, self._sequence_start, start, stop))

    def inputs(self, batch: Batch) -> ItemInputs:
        """A batch, stacked, on the module's device."""
        return ItemInputs.stack([self._items[index] for index in batch.sequences], self._positions, self._device)

    def alone(self, sequence: int) -> ItemInputs:
        """One item as a batch of one."""
        return ItemInputs.stack([self._items[sequence]], self._positions, self._device)
