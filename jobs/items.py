"""Items of a user's own in a corpus's place: what they are by their content, and the token axis of their positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.cache.store import Store
from actcache.jobs.store_axis import store_axis, stored_once
from actcache.jobs.torch_half import torch_half
from actcache.schemas.corpora import CorpusIdentity
from actcache.schemas.grid import token_layouts
from actcache.schemas.plan import Source, TokensRecord

if TYPE_CHECKING:
    from hashlib import _Hash as Hash


@dataclass(frozen=True)
class Items:
    """What a module is called with, one entry a sequence, each of `positions` rows."""

    name: str
    inputs: Sequence[Any]
    positions: int

    @property
    def sources(self) -> tuple[Source, ...]:
        """There are no files."""
        return ()

    @property
    def revision(self) -> None:
        """Items have none."""
        return

    def identity(self) -> CorpusIdentity:
        """The items by their content: names, dtypes, shapes and bytes, in order.

        Raises:
            InvalidInput: an item is not made of tensors.
        """
        hashed = hashlib.sha256(f"{self.positions}\n".encode())
        for index in range(len(self.inputs)):
            for name, value in _parts(self.inputs[index]):
                array = torch_half("inputs").as_array(value, f"{self.name}: item {index} of its inputs")
                fold(hashed, name, array)
        return CorpusIdentity(kind="items", files=len(self.inputs), content=hashed.hexdigest())

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array of the token axis."""
        index = np.arange(start, stop)
        if name == "sequence_start":
            return index * self.positions
        if name == "document_row":
            return np.stack([np.zeros_like(index), index], axis=1)
        owner = index // self.positions
        if name in ("sequence", "document"):
            return owner
        position = index - owner * self.positions
        return np.asarray(position, np.int32 if name == "position" else np.int64)

    def store(self, store: Store, pool: Executor) -> TokensRecord:
        """Store the token axis, or find it stored.

        Raises:
            SpecMismatch: the stored one is another.
        """
        count = len(self.inputs)
        layouts = token_layouts(count * self.positions, count, count, of_tokens=False)
        record = TokensRecord(
            n_tokens=count * self.positions,
            n_sequences=count,
            n_documents=count,
            bos_token_id=None,
            eos_token_id=None,
            content={},
            objects=(),
        )
        return stored_once(store, lambda: store_axis(store, layouts, self.rows, record, pool))


def fold(hashed: Hash, name: str, array: np.ndarray) -> None:
    """Add an array to a hash: its name, dtype, shape and bytes."""
    hashed.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
    hashed.update(array.tobytes())


def _parts(item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, Mapping):
        return sorted(item.items())
    return [(str(index), value) for index, value in enumerate(item if isinstance(item, tuple) else (item,))]
