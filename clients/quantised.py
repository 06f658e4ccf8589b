"""The quantised forms in which sites are stored."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.cache.opening import SealedRoot
from actcache.schemas.array import ArrayLayout
from actcache.schemas.quantised import KINDS, Damage, Kind


@dataclass(frozen=True)
class QuantisedForm:
    """One quantised form of a site: its codes, their scales, and the damage done where it is recorded."""

    kind: Kind
    group: int
    codes: ArrayLayout
    scales: ArrayLayout
    damage: Damage | None


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
