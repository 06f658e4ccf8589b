"""Norms of the residual stream, whatever class implements them: their kind is found by what they compute."""

from __future__ import annotations

import torch
from torch import nn

from actcache.schemas.anatomy import NormParts

_EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon", "norm_eps")
_GUESSES = (1e-5, 1e-6, 1e-8, 1e-12)
ROUNDINGS = 8


def normalised(parts: NormParts, x: torch.Tensor) -> torch.Tensor:
    """x̂, the norm's output before its gain and bias, computed as torch does and in float32 for an RMS norm.

    Layer norm: Ba et al. 2016 (arXiv 1607.06450); RMS norm: Zhang & Sennrich 2019 (arXiv 1910.07467).
    """
    if parts.kind == "layer_norm":
        return nn.functional.layer_norm(x, (x.shape[-1],), eps=parts.eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + parts.eps)).to(x.dtype)


def gain_and_bias(parts: NormParts, module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The vectors that x̂ is multiplied by and that are added then, float32; None where there is none."""
    gain = None if parts.weight is None else module.get_parameter(parts.weight).float() + float(parts.unit_offset)
    return gain, None if parts.bias is None else module.get_parameter(parts.bias).float()


def find_norm(module: nn.Module, given: torch.Tensor, made: torch.Tensor) -> NormParts | None:
    """What norm a module computes, judged by its input and output, or None if it is none.

    Of several that fit the nearest: in bfloat16 a wide RMS norm passes for a layer norm, since a vector's mean is near zero.
    """
    if given.shape != made.shape:
        return None
    width = given.shape[-1]
    vectors = {name: p for name, p in module.named_parameters(recurse=False) if p.shape == (width,)}
    gains: list[tuple[str | None, bool]] = [
        (name, offset) for name in vectors if "bias" not in name for offset in (False, True)
    ]
    biases = [name for name in vectors if "bias" in name]
    stated = [float(getattr(module, name)) for name in _EPS if isinstance(getattr(module, name, None), float)]
    bound = ROUNDINGS * torch.finfo(made.dtype).eps
    best: tuple[float, NormParts] | None = None
    for eps in stated or _GUESSES:
        for kind in ("layer_norm", "rms_norm"):
            for weight, offset in gains or [(None, False)]:
                parts = NormParts(
                    kind=kind, eps=eps, weight=weight, unit_offset=offset, bias=biases[0] if biases else None
                )
                gain, bias = gain_and_bias(parts, module)
                gain = torch.ones(width, device=given.device) if gain is None else gain
                bias = torch.zeros_like(gain) if bias is None else bias
                unscaled = normalised(parts, given.float())
                # x̂ is of size 1, and its own rounding errors are of that size too.
                size = gain.abs() * (unscaled.abs() + 1) + bias.abs()
                error = (unscaled * gain + bias - made.float()).abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
                if not bool((error <= bound).all()):
                    continue
                mean = float(error.detach().double().square().mean())
                if best is None or mean < best[0]:
                    best = mean, parts
    return None if best is None else best[1]
