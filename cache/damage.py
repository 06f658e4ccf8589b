"""What quantising costs: measured where the exact values are at hand, merged by the seal in the order of the blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.cache.head import Head
from actcache.schemas.errors import Corrupt
from actcache.schemas.grid import Grid
from actcache.schemas.quantised import BlockDamage, Damage, quantised_name, scale_name
from actcache.schemas.receipt import Receipt, receipts_of
from actcache.schemas.sites import is_residual

KL_TOKENS = 64
LOGITS_AT_ONCE = 1 << 23
_BIN_SHIFT = 48
NO_HEAD = "not measured: no head"


@dataclass(frozen=True)
class Errors:
    """Per token: Σ(x - q)² and Σx² over the dimensions, float64."""

    error: np.ndarray
    norm: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, back: np.ndarray) -> Errors:
        """Of values (n, d) and what came back of them."""
        with np.errstate(invalid="ignore", over="ignore"):
            exact = values.astype(np.float64)
            norm = np.einsum("ij,ij->i", exact, exact)
            exact -= back
            return cls(np.einsum("ij,ij->i", exact, exact), norm)


def sample(start: int, stop: int) -> np.ndarray:
    """The tokens of [start, stop) whose predictions are compared, ascending: at most 64, by their indices alone.

    Those with the smallest hashes (SplitMix64: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators"); tokens in
    even steps would stand at the same positions of their sequences wherever blocks are whole numbers of contexts.
    """
    token = np.arange(start, stop)
    if len(token) <= KL_TOKENS:
        return token
    mixed = (token.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.sort(token[np.argpartition(mixed, KL_TOKENS)[:KL_TOKENS]])


def divergences(head: Head, values: np.ndarray, forms: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """KL(head(x) ‖ head(q)) in nats, float64, of each of the values (n, d), for each of several forms q of them."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in forms}
    step = 0
    at = 0
    while at < len(values):
        rows = slice(at, at + (step or 1))
        logs = _log_softmax(head, values[rows])
        for name, back in forms.items():
            other = _log_softmax(head, back[rows])
            with np.errstate(invalid="ignore"):
                terms = np.where(np.isneginf(logs), 0.0, np.exp(logs) * (logs - other))
            found[name].append(np.maximum(terms.sum(axis=1), 0.0))
        at += step or 1
        step = step or max(1, LOGITS_AT_ONCE // logs.shape[1])
    return {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in found.items()}


def _log_softmax(head: Head, rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        logits = head.logits(rows).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def block_damage(parts: Sequence[Errors], kl: np.ndarray | None) -> BlockDamage:
    """The record of a block, of the errors of its portions in order and the divergences of its sample."""
    error, norm = sum(float(part.error.sum()) for part in parts), sum(float(part.norm.sum()) for part in parts)
    counts: Counter[int] = Counter()
    largest = 0.0
    for part in parts:
        relative = np.sqrt(np.divide(part.error, part.norm, out=np.zeros_like(part.error), where=part.norm > 0))
        bins, number = np.unique(relative.view(np.int64) >> _BIN_SHIFT, return_counts=True)
        counts.update(dict(zip(bins.tolist(), number.tolist(), strict=True)))
        largest = max(largest, float(relative.max(initial=0.0)))
    finite = kl is not None and bool(np.isfinite(kl).all())
    return BlockDamage(
        squared_error=error,
        squared_norm=norm,
        errors=tuple(sorted(counts.items())),
        largest=largest,
        kl=float(kl.sum()) if kl is not None and finite else None,
        largest_kl=float(kl.max(initial=0.0)) if kl is not None and finite else None,
        kl_tokens=0 if kl is None else len(kl),
    )


def merged(blocks: Iterable[BlockDamage], no_kl: str | None) -> Damage:
    """The damage of a site over all its blocks, in their order. `no_kl` says why no divergence was measured."""
    blocks = list(blocks)
    norm = sum(block.squared_norm for block in blocks)
    kl = [block.kl for block in blocks]
    known = [value for value in kl if value is not None]
    tokens = sum(block.kl_tokens for block in blocks)
    measured = bool(tokens) and len(known) == len(kl)
    counts: Counter[int] = Counter()
    for block in blocks:
        counts.update(dict(block.errors))
    return Damage(
        relative_error=math.sqrt(sum(block.squared_error for block in blocks) / norm) if norm > 0 else 0.0,
        median_token_error=_median(counts),
        largest_token_error=max((block.largest for block in blocks), default=0.0),
        kl=sum(known) / tokens if measured else None,
        largest_kl=max(block.largest_kl or 0.0 for block in blocks) if measured else None,
        kl_tokens=tokens if measured else 0,
        kl_note=None if measured else no_kl or "not measured: a logit is not finite",
    )


def quantised_roles(grid: Grid, receipts: Iterable[Receipt]) -> dict[str, dict[str, Any]]:
    """The root's roles of a build's quantised arrays, with the damage of all blocks, whose receipts come in order.

    Raises:
        Corrupt: a receipt lacks the record of one.
    """
    asked, receipts = grid.plan.spec.quantize, list(receipts)
    roles: dict[str, dict[str, Any]] = {}
    if asked is None:
        return roles
    for site in grid.plan.spec.sites:
        for kind in asked.kinds:
            name, scale = quantised_name(site, kind), scale_name(site, kind)
            if any(name not in receipt.quantised for receipt in receipts):
                raise Corrupt(
                    f"{name}: a receipt under {receipts_of(grid.records)} has no record of it; remove it and run again"
                )
            why = None if is_residual(site) else "not measured: no state of the residual stream"
            damage = merged((receipt.quantised[name] for receipt in receipts), why if grid.plan.spec.head else NO_HEAD)
            own = {"kind": kind, "of": site, "group": asked.group}
            roles[name] = {"role": "quantised", **own, "scale": scale, "damage": damage.document()}
            roles[scale] = {"role": "scale", "of": name}
    return roles


def _median(counts: Mapping[int, int]) -> float:
    """The middle of the bin that the median lies in."""
    half, seen = sum(counts.values()) / 2, 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= half:
            low, high = (np.array([number, number + 1], np.int64) << _BIN_SHIFT).view(np.float64)
            return float((low + high) / 2) if number else 0.0
    return 0.0
