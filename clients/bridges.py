"""A view as what other libraries train from: an endless source of activations, a dataset of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.clients.sources import Source, read
from actcache.clients.token_index import TokenIndex
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    import datasets
    import torch

    from actcache.clients.torch_dataset import TorchBatches

AT_ONCE = 1 << 14
"""Tokens that are written at once."""


class ActivationSource:
    """Batches of activations of one site, tensors (size, width), epoch after epoch without end.

    It is what trainers of sparse autoencoders take: `data_provider` of SAELens's `SAETrainer`, `data` of dictionary_learning's
    `trainSAE`. Each epoch has an order of its own; what would make a short batch is left out of it.

    Attributes:
        d_in: width of the activations.
        config: what it is made of, as JSON has it: dictionary_learning stores it beside what it trained.
    """

    def __init__(self, batches: TorchBatches, site: str, d_in: int, config: Mapping[str, Any]) -> None:
        if not len(batches):
            raise InvalidInput("no full batch in an epoch: ask for a smaller size, or select more tokens")
        self._batches = batches
        self._site = site
        self._epoch = batches.batches.epoch
        self._running: Iterator[Mapping[str, torch.Tensor]] | None = None
        self.d_in = d_in
        self.config = dict(config)

    def __iter__(self) -> ActivationSource:
        return self

    def __next__(self) -> torch.Tensor:
        while True:
            if self._running is None:
                self._running = iter(self._batches)
            batch = next(self._running, None)
            if batch is not None:
                return batch[self._site]
            self._running = None
            self._epoch += 1
            self._batches.set_epoch(self._epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: small, as JSON has it."""
        return {"epoch": self._epoch, "batches": self._batches.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another source of the same arguments stood.

        Raises:
            InvalidInput: it was of other tokens or arguments.
        """
        self._running = None
        self._epoch = int(state["epoch"])
        self._batches.set_epoch(self._epoch)
        self._batches.load_state_dict(state["batches"])


def to_datasets(
    path: str | Path, sites: Mapping[str, tuple[Source, np.dtype]], columns: Mapping[str, Source], index: TokenIndex
) -> datasets.Dataset:
    """Write a row a token to an Arrow file, and open it: the sites as lists of fixed length, `token`, and the columns.

    Raises:
        InvalidInput: the file exists, or a dtype that Arrow does not have.
    """
    import datasets
    import pyarrow as pa

    target = Path(path)
    if target.exists():
        raise InvalidInput(f"{target} exists; give another path, or remove it first")
    features: dict[str, Any] = {"token": datasets.Value("int64")}
    for name, source in columns.items():
        features[name] = datasets.Value(source.dtype.name)
    for name, (source, dtype) in sites.items():
        if dtype.name not in ("float32", "float16"):
            raise InvalidInput(f"{name}: Arrow has no {dtype.name}; leave dtype at 'float32'")
        features[name] = datasets.List(datasets.Value(dtype.name), length=source.shape[1])
    schema = datasets.Features(features).arrow_schema
    staged = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for low in range(0, len(index), AT_ONCE):
                high = min(low + AT_ONCE, len(index))
                arrays: list[Any] = [pa.array(index.tokens(low, high))]
                arrays += [pa.array(read(source, index, low, high)) for source in columns.values()]
                for source, dtype in sites.values():
                    values = pa.array(read(source, index, low, high, dtype).reshape(-1))
                    arrays.append(pa.FixedSizeListArray.from_arrays(values, source.shape[1]))
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        staged.rename(target)
    finally:
        staged.unlink(missing_ok=True)
    opened: datasets.Dataset = datasets.Dataset.from_file(str(target))
    return opened
