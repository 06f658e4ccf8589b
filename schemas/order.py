"""The order of a model's sites where several builds stored them, each in model order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from actcache.schemas.sites import FINAL_NORM, MODULE

_BLOCK_SITE = re.compile(r"blocks\.(\d{1,9})\.(.+)")
_IN_BLOCK = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
_FIRST, _FINAL, _MODULES = (-1, -1), (1 << 60, 0), (1 << 60, 1)

Place = tuple[int, int]


def model_order(builds: Iterable[Sequence[str]]) -> list[str]:
    """The sites of several builds in model order. Each build's own order stays, as do all names, twice or not.

    A name that this version does not know stands behind the one before it in its own build; modules come last.
    """
    placed: list[tuple[Place, str]] = []
    for sites in builds:
        place = _FIRST
        for site in sites:
            place = max(place, _place(site, place))
            placed.append((place, site))
    return [site for _, site in sorted(placed, key=lambda item: item[0])]


def _place(site: str, before: Place) -> Place:
    """Block, and rank in it."""
    if site == FINAL_NORM or site.startswith(MODULE):
        return _FINAL if site == FINAL_NORM else _MODULES
    match = _BLOCK_SITE.fullmatch(site)
    if match is None:
        return before
    block = int(match[1])
    return block, _IN_BLOCK.index(match[2]) if match[2] in _IN_BLOCK else before[1] if before[0] == block else -1
