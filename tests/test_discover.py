"""Modules that a search for parts could take apart wrongly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import actcache as ac
from actcache.jobs.model import look_at
from actcache.jobs.norms import find_norm
from actcache.jobs.parts import ModelParts
from actcache.jobs.proof import identities, largest


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention, self.norm_2, self.mlp = (
            *(nn.LayerNorm(32), nn.Linear(32, 32)),
            *(nn.LayerNorm(32), nn.Linear(32, 32)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x).cumsum(1))
        return x + self.mlp(self.norm_2(x))


class Tiny(nn.Module):
    """A GPT with a list of one norm beside its blocks, and odd ways to call its head."""

    def __init__(self, layers: int = 2, way: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.tokens = nn.Embedding(50, 32)
        self.core = nn.Module()
        self.core.h = nn.ModuleList(Block() for _ in range(layers))
        self.norms = nn.ModuleList([nn.LayerNorm(32)])
        self.swapped = nn.Identity()
        self.unembedding = nn.Linear(32, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if self.way == "swapped":
            self.swapped(x.transpose(0, 1).flatten(0, 1))
        for block in self.core.h:
            x = block(x=x) if self.way == "keyword" else block(x)
        x = self.norms[0](x)
        if self.way == "twice":
            self.unembedding(torch.ones_like(x))
        if self.way == "flat":
            return self.unembedding(x.flatten(0, 1)).view(*ids.shape, -1)
        if self.way == "last":
            return self.unembedding(x[:, -1:])
        return self.unembedding(input=x) if self.way == "keyword" else self.unembedding(x)


def errors(model: nn.Module, modules: tuple[str, ...] = ()) -> dict[str, bool]:
    parts = ModelParts(model, look_at(model.eval(), "own", "tiny"))
    ids = torch.arange(24).reshape(2, 12)
    return {
        name: found.holds for name, found in identities(parts, ids, torch.ones_like(ids), "float32", modules).items()
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_list_of_one_norm_is_not_taken_for_the_blocks(layers: int):
    anatomy = look_at(Tiny(layers).eval(), "own", "tiny")
    assert anatomy.blocks == tuple(f"core.h.{layer}" for layer in range(layers))
    assert "blocks.0.hook_attn_out" in anatomy.sites


@pytest.mark.parametrize("way", ["plain", "keyword", "flat"])
def test_a_stream_and_a_head_are_found_however_they_are_called(way: str):
    assert all(errors(Tiny(way=way)).values())


def test_an_unembedding_that_is_first_given_something_else_fails_the_proof():
    assert not errors(Tiny(way="twice"))["logits"]


def test_a_modules_output_in_another_order_of_tokens_fails_the_proof():
    assert errors(Tiny(way="swapped"), ("module:core.h.0.mlp",))["modules"]
    assert not errors(Tiny(way="swapped"), ("module:swapped",))["modules"]


def test_logits_of_the_last_position_alone_are_refused_with_the_way_out():
    with pytest.raises(ac.Unsupported, match=r"of shape \(2, 1, 50\) for 2 × 19 tokens; let it return"):
        look_at(Tiny(way="last").eval(), "own", "tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 4096, 8192])
def test_a_wide_rms_norm_is_not_taken_for_a_layer_norm(dtype: torch.dtype, width: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 19, width, generator=generator).to(dtype)
    rms, layer = LlamaRMSNorm(width, 1e-5).to(dtype), nn.LayerNorm(width).to(dtype)
    assert find_norm(rms, x, rms(x)).kind == "rms_norm"
    assert find_norm(layer, x, layer(x)).kind == "layer_norm"


def test_a_nan_is_never_lost_among_errors():
    assert math.isnan(largest(0.5, np.nan, 0.7))
    assert largest() == 0.0
