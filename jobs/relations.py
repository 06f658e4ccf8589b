"""Which tensor is the sum of which others, judged element by element within the rounding of their dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROUNDINGS = 4
FAR = 2
SAMPLE = 4096


def sum_error(total: torch.Tensor, base: torch.Tensor, terms: Sequence[torch.Tensor]) -> float:
    """The largest |total - base - Σ term| of any element, over the sum of the sizes that it is made of.

    Element by element, not by a norm: a few massive dimensions of a stream must not hide the rest.
    """
    error, size = total.double() - base.double(), total.double().abs() + base.double().abs()
    for term in terms:
        error = error - term.double()
        size = size + term.double().abs()
    return float((error.abs() / size.clamp_min(torch.finfo(torch.float32).tiny)).max())


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A few thousand elements of a tensor, evenly: what does not hold of these need not be tried on all."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // SAMPLE)]


def is_sum(
    total: torch.Tensor, base: torch.Tensor, terms: Sequence[tuple[torch.Tensor, float]], dtype: torch.dtype
) -> bool:
    """Whether total = base + Σ factor · term for every element, but for a few roundings in `dtype`."""
    bound = ROUNDINGS * torch.finfo(dtype).eps
    few = [factor * sampled(term).double() for term, factor in terms]
    if not sum_error(sampled(total), sampled(base), few) <= bound:
        return False
    return sum_error(total, base, [factor * term.double() for term, factor in terms]) <= bound


def factor_of(
    total: torch.Tensor, base: torch.Tensor, term: torch.Tensor, factors: Sequence[float], dtype: torch.dtype
) -> float | None:
    """The factor with which total = base + factor · term, or None.

    Of `factors` the one that fits best; one found by least squares if it fits far better, for in a coarse dtype a wrong
    factor near the right one passes too.
    """
    if total.shape != base.shape or total.shape != term.shape:
        return None
    wide = term.double()
    power = float((wide * wide).sum())
    if not power > 0:
        return None
    found = float(((total.double() - base.double()) * wide).sum()) / power
    bound = ROUNDINGS * torch.finfo(dtype).eps
    few = sampled(wide)
    tried = [factor for factor in (found, *factors) if factor]
    if not any(sum_error(sampled(total), sampled(base), [factor * few]) <= bound for factor in tried):
        return None
    errors = {factor: sum_error(total, base, [factor * wide]) for factor in tried}
    best = min(errors, key=errors.__getitem__)
    listed = min(factors, key=errors.__getitem__, default=best)
    chosen = listed if errors[listed] <= FAR * errors[best] else best
    return chosen if errors[chosen] <= bound else None


def scale_of(made: torch.Tensor, given: torch.Tensor, factors: Sequence[float], dtype: torch.dtype) -> float | None:
    """The factor with which made = factor · given, or None."""
    return factor_of(made, torch.zeros_like(made), given, factors, dtype)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit but for their dtype."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a.to(b.dtype), b)
