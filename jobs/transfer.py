"""Taking activations from where the model computes them to the host, in memory that the model does not touch again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from actcache.cache.encoder import Ready
from actcache.jobs.batches import Batch
from actcache.jobs.head import to_numpy


@dataclass(frozen=True)
class Taken:
    """Rows (n, width) on the host; on a GPU's host they hold their values once `ready` has returned."""

    rows: np.ndarray
    ready: Ready | None = None

    def values(self) -> np.ndarray:
        """The rows, waited for."""
        if self.ready is not None:
            self.ready()
        return self.rows


class Transfer:
    """Copies tensors to the host: on a GPU into pinned memory and on a stream of its own, so that the model computes on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def select(self, tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The kept rows of a tensor (sequence, position, width), as (n, width), in memory of their own."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        if batch.whole:
            return rows.clone()
        # by index: a mask would make the host wait for the GPU to count it
        return rows.index_select(0, batch.keep.flatten().nonzero().flatten().to(tensor.device, non_blocking=True))

    def take(self, rows: torch.Tensor) -> Taken:
        """Begin to copy rows (n, width) that nobody changes any more."""
        if self._stream is None:
            return Taken(to_numpy(rows))
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self._stream):
            host.copy_(rows, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        rows.record_stream(self._stream)  # its memory is not given to another tensor before it is copied
        return Taken(to_numpy(host), copied.synchronize)

    def computing(self) -> bool:
        """Whether a GPU still has work to do that it was given before."""
        return self._stream is not None and not torch.cuda.current_stream(self._device).query()
