"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745), with attention and MLP in parallel or one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, centred, gelu, heads, rotated


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + Attn(LN₁ x) + MLP(LN₂ x), or with `use_parallel_residual` off as in GPT-2.

    Query, key and value of a head lie together in one matrix; a quarter of each head's coordinates is rotated.
    """
    w, eps = Weights(state_dict, "gpt_neox."), config.layer_norm_eps
    rope = config.rope_parameters
    width = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
    stream = Stream(w["embed_in.weight"][ids])
    for layer in range(config.num_hidden_layers):
        block = w.under(f"layers.{layer}")

        def attention(x: torch.Tensor, block: Weights = block) -> torch.Tensor:
            x = block.affine("input_layernorm", centred(x, eps))
            q, k, v = heads(block.linear("attention.query_key_value", x), config.num_attention_heads).chunk(3, -1)
            q, k = (rotated(part, rope["rope_theta"], width, neighbours=False) for part in (q, k))
            return block.linear("attention.dense", attend(q, k, v, q.shape[-1] ** -0.5))

        def mlp(x: torch.Tensor, block: Weights = block) -> torch.Tensor:
            x = block.affine("post_attention_layernorm", centred(x, eps))
            return block.linear("mlp.dense_4h_to_h", gelu(block.linear("mlp.dense_h_to_4h", x)))

        if config.use_parallel_residual:
            stream.add_both(attention(stream.x), mlp(stream.x))
        else:
            stream.add_attention(attention(stream.x))
            stream.add_mlp(mlp(stream.x))
    normalised = centred(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", w.affine("final_layer_norm", normalised))
    return stream.finish(normalised), logits.float()
