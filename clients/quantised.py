"""Quantised sites as lazy arrays of the values that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actcache.cache.location import Location
from actcache.cache.opening import SealedRoot
from actcache.cache.quantise import QuantisedReader
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store
from actcache.clients.lazy import StoredArray, lazy, reader_of
from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import digest
from actcache.schemas.dtypes import numpy_dtype
from actcache.schemas.quantised import KINDS, Damage, Kind

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class QuantisedForm:
    """One quantised form of a site: its codes, their scales, and the damage done where it is recorded."""

    kind: Kind
    group: int
    codes: ArrayLayout
    scales: ArrayLayout
    damage: Damage | None

    def reader(self, store: Store) -> QuantisedReader:
        """A reader of its values, over a connection that is open already."""
        return QuantisedReader(ArrayReader(store, self.codes), ArrayReader(store, self.scales), self.kind, self.group)


def quantised_forms(root: SealedRoot) -> dict[str, dict[str, QuantisedForm]]:
    """Every quantised form by site and kind, in the order of the sites. Kinds of a later version are left out."""
    found: dict[str, dict[str, QuantisedForm]] = {site: {} for site in root.attributes.captured}
    for name, role in sorted(root.attributes.arrays.items()):
        if role.role == "quantised":
            for kind in KINDS:
                if role.kind == kind and role.of is not None and role.scale is not None and role.group is not None:
                    scales = root.layouts[role.scale]
                    found[role.of][kind] = QuantisedForm(kind, role.group, root.layouts[name], scales, role.damage)
    return {site: {kind: forms[kind] for kind in KINDS if kind in forms} for site, forms in found.items() if forms}


class DequantisedArray(StoredArray):
    """What a Dask graph holds of a quantised site: where codes and scales are. Its values are float32."""

    def __init__(self, location: Location, manifest: str, form: QuantisedForm) -> None:
        super().__init__(location, manifest, form.codes, numpy_dtype("float32"))
        self.form = form

    def reader(self) -> Any:
        """A reader of the values."""
        form = self.form
        codes, scales = (reader_of(self.location, self.manifest, layout) for layout in (form.codes, form.scales))
        return QuantisedReader(codes, scales, form.kind, form.group)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        form = self.form
        return (*super().__dask_tokenize__(), form.kind, digest([form.group, form.scales.document()]))


def lazy_values(location: Location, manifest: str, form: QuantisedForm) -> da.Array:
    """The values of a quantised form as a Dask array (token, width), float32, one Dask chunk a shard. Reads nothing."""
    return lazy(DequantisedArray(location, manifest, form))
