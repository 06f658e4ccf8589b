"""Batches as a torch dataset. torch is imported when one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from actcache.clients.buffered import Batch
from actcache.clients.loader import ONE_PROCESS, Batches
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    import torch

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TensorBatch = dict[str, "torch.Tensor"]


class TorchBatches:
    """Batches of tensors, a torch `IterableDataset`. It can be pickled. Made by `torch_batches`.

    It gives whole batches: `DataLoader(dataset, batch_size=None, num_workers=…)`. Each worker takes a part of this rank's batches,
    all of the same order whenever it is run with as many workers, and has a buffer of its own. Workers that are forked read local datasets
    alone; give `multiprocessing_context="forkserver"` for others. Workers that persist take part in `set_epoch`.
    """

    def __init__(self, batches: Batches, pin_memory: bool, device: str | torch.device | None) -> None:
        import torch

        self.batches = batches
        self.pin_memory = pin_memory
        self.device = device
        self._given: int | None = None
        self._told = _shared(torch.tensor([batches.epoch], dtype=torch.int64))
        """The epoch, in memory that workers share with the process that has begun them."""
        self._seen = batches.epoch
        """What it was when this process last looked."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.batches, self.pin_memory, self.device, self._told, self._seen)

    def __len__(self) -> int:
        """Batches of this rank, of all its workers together."""
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives, in a DataLoader's workers too: see `Batches.set_epoch`.

        Called in a worker, that worker's alone.
        """
        if epoch != self.batches.epoch:
            self._given = None
        self.batches.set_epoch(epoch)
        self._tell()

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands in this process: see `Batches.state_dict`.

        torchdata's `StatefulDataLoader` asks each worker for its own.
        """
        state = self.batches.state_dict()
        return state if self._given is None else state | {"batches": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: see `Batches.load_state_dict`."""
        self.batches.load_state_dict(state, *(_worker() or ONE_PROCESS))
        self._given = None
        self._tell()

    def _tell(self) -> None:
        """Let workers know the epoch."""
        if _worker() is None:
            self._seen = self._told[0] = self.batches.epoch

    def _look(self) -> None:
        """In a worker: the epoch, if it is another than when this was last asked. A state that was loaded since then stays."""
        told = int(self._told[0])
        if told != self._seen:
            self._seen = told
            self.batches.set_epoch(told)

    def __iter__(self) -> Iterator[TensorBatch]:
        import torch

        worker = _worker()
        if worker is not None and (self.pin_memory or self.device is not None):
            raise InvalidInput(
                "pin_memory or device in a DataLoader's worker; give pin_memory to the DataLoader instead"
            )
        if worker is not None:
            self._look()
        device = None if self.device is None else torch.device(self.device)
        on_gpu = device is not None and device.type == "cuda"
        memory = _Pinned() if self.pin_memory or on_gpu else None
        self._given = None
        batches = map(_tensors, self.batches.iterate(*(worker or ONE_PROCESS), memory=memory))
        if device is None:
            return batches
        return self._counted(_moved(batches, _copier(device)), self.batches.state_dict()["batches"])

    def _counted(self, batches: Iterator[TensorBatch], given: int) -> Iterator[TensorBatch]:
        """Count what is given out, since a batch that is on its way to the device is not."""
        for number, batch in enumerate(batches, given + 1):
            self._given = number
            yield batch

    def __repr__(self) -> str:
        return f"Torch{self.batches!r}"


def torch_batches(batches: Batches, pin_memory: bool = False, device: str | torch.device | None = None) -> TorchBatches:
    """Batches as a torch `IterableDataset` of dicts of tensors, without a copy; bfloat16 as stored is torch's.

    Args:
        batches: what it gives.
        pin_memory: let tensors lie in pinned memory. Not in a DataLoader's workers, whose loader has an argument of that name.
        device: where to move the tensors, the next batch while one is used.

    Raises:
        InvalidInput: pinned memory without CUDA.
    """
    import torch

    if pin_memory and not torch.cuda.is_available():
        raise InvalidInput("pin_memory=True: there is no CUDA device to pin memory for; leave it out")
    return _class()(batches, pin_memory, device)


def _again(
    batches: Batches, pin_memory: bool, device: str | torch.device | None, told: torch.Tensor, seen: int
) -> TorchBatches:
    """A dataset that has arrived in another process. Only torch's own pickling lets it share memory with where it comes from."""
    dataset = torch_batches(batches, pin_memory, device)
    dataset._told, dataset._seen = _shared(told), seen
    return dataset


def _shared(memory: torch.Tensor) -> torch.Tensor:
    shared: torch.Tensor = memory.share_memory_()  # type: ignore[no-untyped-call]
    return shared


@cache
def _class() -> type[TorchBatches]:
    """The class that is torch's as well, so that a DataLoader knows what it has."""
    from torch.utils.data import IterableDataset

    return type(TorchBatches.__name__, (TorchBatches, IterableDataset), {"__doc__": TorchBatches.__doc__})


def distributed_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """A rank and the number of ranks: those given, or torch.distributed's where it is initialised, or 0 of 1.

    Raises:
        InvalidInput: one of the two alone.
    """
    if (rank is None) != (world_size is None):
        raise InvalidInput("rank without world_size, or world_size without rank; give both or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Pinned:
    """Pinned memory of torch's, which knows when a copy to the device has ended and the memory may be used again."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """See `Memory`."""
        import torch

        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return memory.view(dtype).reshape(shape)


def tensor(rows: np.ndarray) -> torch.Tensor:
    """An array as a tensor of the same memory; bfloat16, which torch does not take from numpy, by its bits."""
    import torch

    if rows.dtype == _BFLOAT16:
        return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def _tensors(batch: Batch) -> TensorBatch:
    return {name: tensor(array) for name, array in batch.items()}


def _moved(
    batches: Iterator[TensorBatch], copy: Callable[[TensorBatch], Callable[[], TensorBatch]]
) -> Iterator[TensorBatch]:
    """Batches on the device; while one is used, the next is on its way."""
    last: Callable[[], TensorBatch] | None = None
    for batch in batches:
        following = copy(batch)
        if last is not None:
            yield last()
        last = following
    if last is not None:
        yield last()


def _copier(device: torch.device) -> Callable[[TensorBatch], Callable[[], TensorBatch]]:
    """What begins to copy a batch and gives what waits for it: on a GPU, on a stream of its own beside the computation."""
    import torch

    if device.type != "cuda":
        return lambda batch: lambda: {name: tensor.to(device) for name, tensor in batch.items()}
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(batch: TensorBatch) -> Callable[[], TensorBatch]:
        with torch.cuda.stream(stream):
            copied = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            there = stream.record_event()

        def wait() -> TensorBatch:
            current = torch.cuda.current_stream(device)
            current.wait_event(there)
            for tensor in copied.values():
                tensor.record_stream(current)  # its memory is not used again before what is computed from it is done
            return copied

        return wait

    return copy


def _worker() -> tuple[int, int] | None:
    """This DataLoader worker's number and how many there are, or None outside of workers."""
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return None if info is None else (info.id, info.num_workers)
