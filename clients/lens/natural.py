"""The optimiser of a translator: natural gradient with a Kronecker-factored curvature (K-FAC, Martens & Grosse 2015, arXiv 1503.05671).

The Fisher matrix of W in KL(final ‖ head(h + W h + b)) is taken to be G ⊗ A. A is the covariance of the states, which the closed form
has already; G is that of the loss's gradient in the translator's output for targets drawn from the lens's own prediction, measured at the
start and a few times more. A step is G⁻¹ (∂L/∂W) A⁻¹: in coordinates in which the states are white, G⁻¹ times the gradient. So it does
not depend on how large or how correlated the dimensions of the states are, which is what makes plain gradient methods slow here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from actcache.clients.lens.ridge import Gram

LEARNING_RATE = 0.3
MOMENTUM = 0.9
WARM_UP = 10
DAMPING = 0.01
"""Added to G and A, as a part of their mean eigenvalue: of G, what is measured on few tokens."""
STATE_DAMPING = 1e-6


class Natural:
    """A translator in white coordinates: h + W h + b = h + M z + c, with z of covariance 1.

    Attributes:
        m, c: the parameters, (d, d) and (d,), on the device.
    """

    def __init__(self, gram: Gram, weight: Tensor, bias: Tensor) -> None:
        values, vectors = torch.linalg.eigh(torch.as_tensor(gram.covariance))
        root = (values.clamp(min=0) + STATE_DAMPING * (values.mean().item() or 1.0)).sqrt()
        device = weight.device
        self._mean = torch.as_tensor(gram.mean).float().to(device)
        self._whiten = (vectors / root).float().to(device)
        colour = (vectors * root).float().to(device)
        self.m = weight @ colour
        self.c = bias + weight @ self._mean
        self._moving_m, self._moving_c = torch.zeros_like(self.m), torch.zeros_like(self.c)
        self._inverse = torch.eye(len(self.c), device=device)

    def output(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Of states (n, d): h + M z + c, and z, which `accumulate` wants; (n, d) each."""
        z = (h - self._mean) @ self._whiten
        return torch.addmm(h + self.c, z, self.m.T), z

    def measure(self, gradient: Tensor) -> None:
        """Take G from gradients (n, d) of the loss of drawn targets, one row a token."""
        values, vectors = torch.linalg.eigh((gradient.T @ gradient / len(gradient)).double().cpu())
        damped = values.clamp(min=0) + DAMPING * (values.mean().item() or 1.0)
        self._inverse = ((vectors / damped) @ vectors.T).float().to(gradient.device)

    def step(self, gradient_m: Tensor, gradient_c: Tensor, rate: float) -> None:
        """Go one step, by the mean gradients in M and c."""
        self._moving_m.lerp_(self._inverse @ gradient_m, 1 - MOMENTUM)
        self._moving_c.lerp_(self._inverse @ gradient_c, 1 - MOMENTUM)
        self.m -= rate * self._moving_m
        self.c -= rate * self._moving_c

    def translator(self) -> tuple[Tensor, Tensor]:
        """W (d, d) and b (d,)."""
        weight = self.m @ self._whiten.T
        return weight, self.c - weight @ self._mean

    def state(self) -> dict[str, Tensor]:
        """What a resumed training goes on with."""
        return {
            "m": self.m,
            "c": self.c,
            "moving_m": self._moving_m,
            "moving_c": self._moving_c,
            "inverse": self._inverse,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a state."""
        device = self.m.device
        self.m, self.c, self._moving_m, self._moving_c, self._inverse = (
            state[name].to(device) for name in ("m", "c", "moving_m", "moving_c", "inverse")
        )


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step: a short warm-up, then half a cosine down to 0."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
