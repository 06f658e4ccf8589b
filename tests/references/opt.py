"""OPT (Zhang et al. 2022, arXiv 2205.01068), those of its sizes whose norms come before attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, centred, heads

OFFSET = 2
"""Rows of the table of positions that no token has: position t is row t + 2."""


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + Attn(LN x); x ← x + MLP(LN x), with a rectifier in the MLP and an embedding as wide as the stream."""
    assert config.do_layer_norm_before
    assert config.word_embed_proj_dim == config.hidden_size
    w, eps = Weights(state_dict, "model.decoder."), 1e-5
    stream = Stream(w["embed_tokens.weight"][ids] + w["embed_positions.weight"][OFFSET : OFFSET + ids.shape[1]])
    for layer in range(config.num_hidden_layers):
        block = w.under(f"layers.{layer}")
        x = block.affine("self_attn_layer_norm", centred(stream.x, eps))
        q, k, v = (heads(block.linear(f"self_attn.{name}_proj", x), config.num_attention_heads) for name in "qkv")
        stream.add_attention(block.linear("self_attn.out_proj", attend(q, k, v, q.shape[-1] ** -0.5)))
        x = block.affine("final_layer_norm", centred(stream.x, eps))
        stream.add_mlp(block.linear("fc2", block.linear("fc1", x).clamp(min=0)))
    normalised = centred(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", w.affine("final_layer_norm", normalised))
    return stream.finish(normalised), logits.float()
