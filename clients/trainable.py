"""A view as batches to train on: numpy arrays, torch tensors, an endless source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from actcache.clients.loader import BUFFER, Batches
from actcache.clients.normalise import How
from actcache.clients.view import View
from actcache.schemas.errors import InvalidInput, NotFound
from actcache.schemas.quantised import KINDS, Kind
from actcache.schemas.sites import expand

if TYPE_CHECKING:
    import torch

    from actcache.clients.bridges import ActivationSource
    from actcache.clients.torch_dataset import TorchBatches


class Trainable(View):
    """A view that gives batches of its tokens."""

    @abstractmethod
    def where(self, *masks: Any, site: str | None = None, **asked: Any) -> Trainable:
        """The tokens for which everything holds that is asked."""

    def batches(
        self,
        sites: str | Sequence[str],
        size: int = 4096,
        *,
        shuffle: int | None = None,
        epoch: int = 0,
        where: Mapping[str, Any] | None = None,
        columns: str | Sequence[str] = (),
        dtype: Literal["float32", "stored", "int8", "fp8"] = "float32",
        normalise: How | None = None,
        buffer: int = BUFFER,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> Batches:
        """An epoch of batches of the view's tokens: dicts of numpy arrays, resumable by `state_dict`.

        A batch has each site, (size, d_model), the `columns` asked for and `token`, the places on the dataset's token axis, all of the
        same tokens. Every token comes once.

        Args:
            sites: a site, several, or patterns as a build takes them (`resid`, `blocks.*.hook_resid_post`).
            size: tokens of a batch; the last may be shorter.
            shuffle: a seed, or None for the view's own order.
            epoch: which of the orders of that seed; `set_epoch` changes it.
            where: conditions, as `where` takes them.
            columns: fields that go along, such as `token_id`.
            dtype: `float32`; `stored`, as they are; or `int8` or `fp8`, the values of that quantised form, float32. Patterns then
                choose among the sites that have it.
            normalise: `center`, `standard` or `scale`, by the statistics of the whole dataset; see docs/reading.md.
            buffer: tokens among which a shuffle mixes.
            drop_last: leave out what would make a short batch; every rank then gives the same number of batches.
            rank: which part of the epoch; the parts of all ranks do not overlap, and are the epoch together.
            world_size: how many ranks there are.
            prefetch: batches that are made ahead.

        Raises:
            NotFound: no such site or field, or a site that is not stored in that form.
            InvalidInput: arguments that make no sense.
        """
        view = self.where(**where) if where is not None else self
        kind = _kind(dtype)
        names = view._patterns(sites, kind)
        statistics = {name: view.statistics[name] for name in names} if normalise is not None else {}
        return Batches(
            {name: view.source(name, kind) for name in names},
            view.index,
            size,
            shuffle=shuffle,
            epoch=epoch,
            buffer=buffer,
            dtype="float32" if kind is not None else dtype,  # type: ignore[arg-type]  # that is none of a quantised form
            normalise=normalise,
            statistics={name: (found["mean"], found["variance"]) for name, found in statistics.items()},
            columns={name: view.field_source(name) for name in ([columns] if isinstance(columns, str) else columns)},
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            prefetch=prefetch,
        )

    def torch(
        self,
        sites: str | Sequence[str],
        size: int = 4096,
        *,
        pin_memory: bool = False,
        device: str | torch.device | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> TorchBatches:
        """The same as `batches` with tensors, a torch `IterableDataset`: `DataLoader(ds.torch(…), batch_size=None)`. Needs torch.

        bfloat16 as stored is torch's.

        Args:
            sites: as `batches` takes them.
            size: tokens of a batch.
            pin_memory: let the tensors lie in pinned memory.
            device: where to move the tensors, the next batch while one is used.
            rank: which part of the epoch; where torch.distributed is initialised, its rank.
            world_size: how many ranks there are; where torch.distributed is initialised, its number.
            **options: the others of `batches`.

        Raises:
            NotFound, InvalidInput: as `batches`; pinned memory without CUDA.
        """
        from actcache.clients.torch_dataset import distributed_rank, torch_batches

        own, ranks = distributed_rank(rank, world_size)
        return torch_batches(self.batches(sites, size, rank=own, world_size=ranks, **options), pin_memory, device)

    def activations(self, site: str, size: int = 4096, *, shuffle: int = 0, **options: Any) -> ActivationSource:
        """An endless source of tensors (size, d_model) of one site, each epoch in another order: see `ActivationSource`. Needs torch.

        `options` are those of `torch`, such as `dtype="int8"` for the values of that quantised form.

        Raises:
            NotFound, InvalidInput: as `torch`; not one full batch in an epoch.
        """
        from actcache.clients.bridges import ActivationSource

        config = {"url": self.url, "site": site, "size": size, "shuffle": shuffle}
        config |= {name: value for name, value in options.items() if isinstance(value, str | int | float | bool)}
        batches = self.torch(site, size, shuffle=shuffle, drop_last=True, **options)
        return ActivationSource(batches, site, self.source(site, _kind(options.get("dtype"))).shape[1], config)

    def _patterns(self, sites: str | Sequence[str], kind: Kind | None) -> list[str]:
        """The sites, of those that have a quantised form with a `kind`, that names and patterns choose; names in their order."""
        asked = [sites] if isinstance(sites, str) else list(sites)
        there = self.sites if kind is None else [site for site, kinds in self.quantised.items() if kind in kinds]
        if all(name in there for name in asked):
            return list(dict.fromkeys(asked))
        for pattern in asked:
            if not self._matching(pattern, there):
                name = next(iter(self._matching(pattern, self.captured)), pattern)
                known = kind is not None and name in self.captured
                raise self._no_form(name, kind) if known else self._no_site(name)
        return expand(asked, there, self.model.n_layers)

    def _matching(self, pattern: str, among: Sequence[str]) -> list[str]:
        try:
            return expand([pattern], among, self.model.n_layers)
        except InvalidInput:
            return []

    def _no_form(self, name: str, kind: str | None) -> NotFound:
        forms = ", ".join(self.quantised.get(name, ())) or "no quantised form"
        return NotFound(
            f"{self.url}: site {name!r} is not stored as {kind!r}; there is {forms} (ds.quantised lists all)"
        )


def _kind(dtype: str | None) -> Kind | None:
    """The quantised form that a dtype asks for, if it does."""
    return next((kind for kind in KINDS if kind == dtype), None)
