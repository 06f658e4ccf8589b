"""The parts of a loaded model, found by its anatomy. Capture, proof and head work on these, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from actcache.jobs.norms import normalised
from actcache.schemas.anatomy import Anatomy, HeadStep
from actcache.schemas.sites import FINAL_NORM

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModuleTap:
    """Where a site is read: before a module (its input) or after it (its output), and what is made of the tensor."""

    site: str
    module: nn.Module
    before: bool
    transform: Transform | None


@dataclass(frozen=True)
class ModelParts:
    """A causal language model in evaluation mode, and its anatomy."""

    model: nn.Module
    anatomy: Anatomy

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return device_of(self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order."""
        return [self.model.get_submodule(path) for path in self.anatomy.blocks]

    @property
    def unembedding(self) -> nn.Module:
        """The module that makes logits, before any scale and soft cap."""
        return self._module(self.anatomy.head[self.anatomy.unembedding])

    def taps(self, sites: Iterable[str]) -> list[ModuleTap]:
        """Where some sites are read."""
        return [self._tap(site) for site in sites]

    def _tap(self, site: str) -> ModuleTap:
        tap = self.anatomy.tap(site)
        transform: Transform | None = None
        final = self.anatomy.final_norm
        if site == FINAL_NORM and final is not None and final.norm is not None:
            transform = partial(normalised, final.norm)
        elif tap.factor != 1.0:
            transform = partial(torch.mul, other=tap.factor)
        return ModuleTap(site, self.model.get_submodule(tap.module), tap.at == "input", transform)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """The logits (…, vocabulary), float32, of what the unembedding is given (…, width)."""
        return self._steps(self.unembedding(state).float(), self.anatomy.head[self.anatomy.unembedding + 1 :])

    def head(self, stream: torch.Tensor) -> torch.Tensor:
        """The logits (…, vocabulary) of the last block's output (…, d_model), by the model's own modules."""
        return self._steps(stream, self.anatomy.head)

    def _steps(self, x: torch.Tensor, steps: Iterable[HeadStep]) -> torch.Tensor:
        for step in steps:
            if step.op == "norm":
                x = self._module(step)(x)
            elif step.op == "linear":
                module = self._module(step)
                x = module(x.to(next(module.parameters()).dtype))  # a stream may be wider than the weights
            elif step.op == "first":
                x = x[..., : step.rows]
            elif step.op == "scale":
                x = x * _factor(step)
            else:
                x = torch.tanh(x / _factor(step)) * _factor(step)
        return x

    def _module(self, step: HeadStep) -> nn.Module:
        assert step.module is not None
        return self.model.get_submodule(step.module)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's inputs must be: with its first parameter or buffer, or on the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _factor(step: HeadStep) -> float:
    assert step.factor is not None
    return step.factor
