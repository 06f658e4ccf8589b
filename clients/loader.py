"""Batches of activations in an order that a seed decides: exact epochs, aligned sites, bounded memory, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from actcache.cache.cores import available_cores
from actcache.cache.reader import AHEAD_BYTES
from actcache.clients.buffered import PLACE_BYTES, READERS, Batch, Buffered, Memory, buffer_places
from actcache.clients.field import Field, fields_of
from actcache.clients.normalise import How
from actcache.clients.recycled import Recycled
from actcache.clients.shuffle import Plan, Share
from actcache.clients.sources import Source, cuts
from actcache.clients.token_index import TokenIndex
from actcache.schemas.canonical import digest
from actcache.schemas.errors import InvalidInput

STATE_VERSION = 1
CHUNK_BYTES = 1 << 20
ONE_PROCESS = (0, 1)
CONTENT = ("dtype", "normalise", "the stored values")
"""What a state tells of each array."""
BUFFER = 1 << 20
"""Tokens of a window, unless asked otherwise."""


class Batches:
    """An epoch of batches: dicts of numpy arrays of the same tokens in the same order, with their places on the token axis as `token`.

    Iterating gives the epoch, and again the same one, unless `set_epoch` is called in between. Every token of the index comes exactly
    once, or as often as a list names it. Without `shuffle` they come in the view's own order. With it, parts of the objects of the
    first site are brought into a random order, cut into windows of equal size of at least `buffer` tokens, and fewer than twice as
    many, and the tokens of each window are permuted. The order is a function of the index, the first site's objects, `size`,
    `shuffle`, `epoch`, `buffer`, rank and workers alone.

    Args:
        sources: the sites' arrays by name, (token, …), all of the same token axis.
        index: the tokens of the view.
        size: tokens of a batch. The last one may be shorter, unless `drop_last`.
        shuffle: the seed, at least 0, or None.
        epoch: which of the orders that the seed has.
        buffer: tokens of a window at least, where there are so many. The larger, the better batches are mixed, and the more memory is
            taken: see `memory_bytes`.
        dtype: of the sites in a batch: `float32`, or `stored`, as they are. Columns have their own.
        normalise: None, `center`, `standard` or `scale`: see `Normaliser.of`.
        statistics: mean and variance of each site, (d,) float64, where `normalise` asks for them.
        columns: other arrays of the token axis that go along.
        drop_last: leave out what would make a short batch; every rank then gives the same number of batches.
        rank, world_size: which of so many parts, whose sizes differ by at most one token.
        prefetch: batches that are made before they are asked for.

    Raises:
        InvalidInput: arguments that make no sense. While iterating: what `Rows.scatter` raises.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        index: TokenIndex,
        size: int = 4096,
        *,
        shuffle: int | None = None,
        epoch: int = 0,
        buffer: int = BUFFER,
        dtype: Literal["float32", "stored"] = "float32",
        normalise: How | None = None,
        statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        columns: Mapping[str, Source] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.size = _whole("size", size, 1)
        self.shuffle = None if shuffle is None else _whole("shuffle", shuffle, 0, "a seed or None")
        self.epoch = _whole("epoch", epoch, 0)
        self.buffer = _whole("buffer", buffer, 1)
        self.prefetch = _whole("prefetch", prefetch, 0)
        self.world_size = _whole("world_size", world_size, 1)
        self.rank = _whole("rank", rank, 0)
        if self.rank >= self.world_size:
            raise InvalidInput(f"rank={rank}: of {world_size} ranks, the last is {world_size - 1}")
        self.drop_last = bool(drop_last)
        self.fields = fields_of(sources, columns or {}, dtype, normalise, statistics or {})
        self._arrays = {
            field.name: _content(field, normalise if field.name in sources else None) for field in self.fields
        }
        self.index = index
        self._cuts = cuts(self.fields[0].source)
        self._recycled = Recycled(self.prefetch + 1)
        self._worker = ONE_PROCESS
        self._begin = 0
        self._given = 0
        self._running: object = None

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, worker: int = 0, workers: int = 1, memory: Memory | None = None) -> Iterator[Batch]:
        """The batches of one of several workers among which this rank's are divided, from where `load_state_dict` said.

        A batch's memory is used again when nobody holds it any more, or comes from `memory`.

        Raises:
            InvalidInput: the state that was loaded is of another worker.
        """
        if self._begin and self._worker != (worker, workers):
            raise InvalidInput(
                f"the state is of worker {self._worker[0]} of {self._worker[1]}, and this is worker {worker} of {workers}; "
                "with workers, torchdata's StatefulDataLoader loads each one's own"
            )
        self._worker = (worker, workers)
        self._given, self._begin = self._begin, 0
        self._running = running = object()
        engine = Buffered(self._plan, self.fields, self.prefetch, self._given, memory or self._recycled)

        def counted() -> Iterator[Batch]:
            for given, batch in enumerate(engine, self._given + 1):
                if self._running is running:
                    self._given = given
                yield batch

        return counted()

    def __len__(self) -> int:
        """Batches of this rank, of all its workers together."""
        return self._plan_of(ONE_PROCESS).n_batches

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives. Another one than now begins at its first batch.

        Raises:
            InvalidInput: not a number from 0 on.
        """
        if _whole("epoch", epoch, 0) != self.epoch:
            self.epoch = int(epoch)
            self._given = self._begin = 0
            self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration that was begun last stands, as JSON takes it: batches that were given out, not those made ahead."""
        arrays = {name: list(content) for name, content in self._arrays.items()}
        return {"version": STATE_VERSION, **self._order, "arrays": arrays, "epoch": self.epoch, "batches": self._given}

    def load_state_dict(self, state: Mapping[str, Any], worker: int = 0, workers: int = 1) -> None:
        """Let the next iteration go on where a state was taken, in its epoch: it is then as if it had not been interrupted.

        A dataset may have been copied elsewhere meanwhile.

        Raises:
            InvalidInput: the state is of another version, of other tokens, of other content or of other arguments.
        """
        self._worker = (worker, workers)
        if state.get("version") != STATE_VERSION:
            raise InvalidInput(f"a state of version {state.get('version')!r}, where {STATE_VERSION} is asked for")
        for name, value in self._order.items():
            if state.get(name) != value:
                raise InvalidInput(
                    f"the state is of {name} {state.get(name)!r}, not {value!r}; use what it was taken with"
                )
        self._check_arrays(state.get("arrays") or {})
        epoch = _whole("the state's epoch", state.get("epoch"), 0)
        self.set_epoch(epoch)
        batches = _whole("the state's batches", state.get("batches"), 0)
        if batches > self._plan.n_batches:
            raise InvalidInput(f"the state is of {batches} batches, and there are {self._plan.n_batches}")
        self._begin = self._given = batches
        self._running = None

    def _check_arrays(self, arrays: Mapping[str, Sequence[Any]]) -> None:
        if set(arrays) != set(self._arrays):
            raise InvalidInput(
                f"the state is of the arrays {', '.join(arrays)}, not {', '.join(self._arrays)}; use what it was taken with"
            )
        for name, content in self._arrays.items():
            for what, value, was in zip(CONTENT, content, arrays[name], strict=True):
                if was != value:
                    raise InvalidInput(
                        f"{name}: the state is of {what} {was!r}, not {value!r}; use what it was taken with"
                    )

    @property
    def memory_bytes(self) -> int:
        """Bytes that iterating takes at most in this process, in addition to what the index takes.

        The buffer, of a window and two reads, as stored; what is fetched and not yet decoded; a chunk of each array, taken to be 1 MiB,
        for each thread that decodes; the batches made ahead, that in use and one that comes back.
        """
        places = buffer_places(self._plan)
        stored = [field.values * field.source.dtype.itemsize for field in self.fields]
        made = sum(field.values * field.dtype.itemsize for field in self.fields) + 8
        fetched = max(
            min(size * field.source.shape[0], size * max(field.source.chunks, default=0) + AHEAD_BYTES)
            for field, size in zip(self.fields, stored, strict=True)
        )
        decoded = (available_cores() + READERS) * sum(min(CHUNK_BYTES, size * self._cuts[-1]) for size in stored)
        batches = (max(1, self.prefetch) + 2) * self.size * made
        return int(places * (sum(stored) + PLACE_BYTES) + READERS * fetched + decoded + batches)

    def __repr__(self) -> str:
        order = "in order" if self.shuffle is None else f"shuffle={self.shuffle}, epoch {self.epoch}"
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        names = ", ".join(field.name for field in self.fields)
        return (
            f"Batches({names}: {len(self)} batches of {self.size} of {len(self.index):,} tokens, {order}{rank}; "
            f"at most {self.memory_bytes / 1e6:,.0f} MB)"
        )

    @property
    def _plan(self) -> Plan:
        return self._plan_of(self._worker)

    def _plan_of(self, worker: tuple[int, int]) -> Plan:
        wanted = (worker, self.epoch)
        if getattr(self, "_kept", (None,))[0] != wanted:
            plan = Plan(
                self.index,
                self._cuts,
                size=self.size,
                shuffle=self.shuffle,
                epoch=self.epoch,
                buffer=self.buffer,
                share=Share(self.rank, self.world_size, *worker),
                drop_last=self.drop_last,
            )
            self._kept = (wanted, plan)
        return self._kept[1]

    @property
    def _order(self) -> dict[str, Any]:
        """What decides the order, besides the epoch."""
        return {
            "tokens": digest([list(map(str, self.index.key)), self._cuts.tolist()])[:16],
            "size": self.size,
            "shuffle": self.shuffle,
            "buffer": self.buffer,
            "drop_last": self.drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": self._worker[0],
            "workers": self._worker[1],
        }


def _content(field: Field, normalise: How | None) -> tuple[str, str | None, str]:
    """What decides an array's values in a batch, beside the tokens: see `CONTENT`. JSON takes it."""
    return str(field.dtype), normalise, digest([repr(field.source.content)])[:16]


def _whole(name: str, value: Any, least: int, what: str = "a whole number") -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidInput(f"{name}={value!r}: give {what}, at least {least}")
    return int(value)
