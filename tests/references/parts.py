"""What the references have in common: norms, rotary positions, attention, and the record of the stream."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


class Weights:
    """A state dict in float64, read by name."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], prefix: str = ""):
        self._values, self._prefix = state_dict, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[self._prefix + name].double()

    def under(self, prefix: str) -> Weights:
        return Weights(self._values, f"{self._prefix}{prefix}.")

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """y = x Wᵀ + b, with the bias where there is one."""
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{self._prefix}{name}.bias" in self._values else y

    def affine(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A norm's gain and bias."""
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]


class Stream:
    """A residual stream and what has been added to it."""

    def __init__(self, x: torch.Tensor):
        self.x, self.block, self.sites = x, 0, {"blocks.0.hook_resid_pre": x}

    def _note(self, site: str, x: torch.Tensor) -> None:
        self.sites[f"blocks.{self.block}.{site}"] = x

    def add_attention(self, out: torch.Tensor) -> None:
        """Attention alone: the MLP reads the stream with its output in it."""
        self.x = self.x + out
        self._note("hook_attn_out", out)
        self._note("hook_resid_mid", self.x)

    def add_mlp(self, out: torch.Tensor) -> None:
        """The MLP, after which the block is over."""
        self.x = self.x + out
        self._note("hook_mlp_out", out)
        self._note("hook_resid_post", self.x)
        self.block += 1

    def add_both(self, attention: torch.Tensor, mlp: torch.Tensor) -> None:
        """Attention and MLP that read the same stream."""
        self._note("hook_attn_out", attention)
        self.x = self.x + attention
        self.add_mlp(mlp)

    def finish(self, normalised: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every site in float32, the last norm's with them."""
        self.sites["ln_final.hook_normalized"] = normalised
        return {site: x.float() for site, x in self.sites.items()}


def centred(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x̂ = (x − mean x) / √(var x + ε): layer normalisation without gain and bias (Ba et al. 2016, arXiv 1607.06450)."""
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()


def by_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x̂ = x / √(mean x² + ε): RMS normalisation without gain (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Φ(x) (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The same paper's approximation with a hyperbolic tangent."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swish(x: torch.Tensor) -> torch.Tensor:
    """x σ(x), the gate of SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    return x * torch.sigmoid(x)


def heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(sequence, position, n_heads · width) → (sequence, head, position, width)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    """(sequence, head, position, width) → (sequence, position, n_heads · width)."""
    return x.transpose(1, 2).flatten(-2)


def rotated(x: torch.Tensor, base: float, width: int, neighbours: bool) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.2.2) on the first `width` coordinates of each head.

    Pair i of position t, as a complex number, is multiplied by exp(i t θ_i) with θ_i = base^(−2i/width). A pair is
    two neighbours, as in the paper and GPT-J, or the coordinates i and i + width/2, as in GPT-NeoX and Llama.
    """
    x, rest = x[..., :width], x[..., width:]
    theta = base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * theta
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = (-1, 2) if neighbours else (2, -1)
    axis = -1 if neighbours else -2
    real, imaginary = x.unflatten(-1, pairs).unbind(axis)
    turned = torch.complex(real, imaginary) * turn
    return torch.cat([torch.stack([turned.real, turned.imag], axis).flatten(-2), rest], -1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float | None = None, window: int | None = None
) -> torch.Tensor:
    """Causal attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2), on (sequence, head, position, width).

    Where there are fewer keys than queries, consecutive heads share one (Ainslie et al. 2023, arXiv 2305.13245).
    `cap` bounds scores by cap · tanh(score / cap); a query sees the last `window` positions, its own among them.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    back = torch.arange(q.shape[-2])[:, None] - torch.arange(q.shape[-2])
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    return joined(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v)
