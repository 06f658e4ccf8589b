"""Where the parts of a model are. Capture, proof and head work on these alone, whatever the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from actcache.schemas.errors import Unsupported


@dataclass(frozen=True)
class BlockParts:
    """One block: attention, then MLP, each added to the residual stream. `mid_norm` reads the stream between them."""

    block: nn.Module
    attention: nn.Module
    mid_norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class ModelParts:
    """A decoder-only model taken apart. `backbone` is all but the unembedding."""

    model: nn.Module
    backbone: nn.Module
    blocks: tuple[BlockParts, ...]
    final_norm: nn.LayerNorm
    unembedding: nn.Linear

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.unembedding.weight.device


def gpt2_parts(model: nn.Module) -> ModelParts:
    """The parts of transformers' `GPT2LMHeadModel`."""
    backbone = model.get_submodule("transformer")
    blocks = tuple(
        BlockParts(block, block.get_submodule("attn"), block.get_submodule("ln_2"), block.get_submodule("mlp"))
        for block in backbone.get_submodule("h").children()
    )
    final_norm, unembedding = backbone.get_submodule("ln_f"), model.get_submodule("lm_head")
    if not isinstance(final_norm, nn.LayerNorm) or not isinstance(unembedding, nn.Linear):
        raise Unsupported("this GPT-2's final norm or unembedding is of another kind than transformers' own")
    return ModelParts(model, backbone, blocks, final_norm, unembedding)


PARTS: dict[str, Callable[[nn.Module], ModelParts]] = {"gpt2": gpt2_parts}
