"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656): norms on the branches' outputs, and on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, by_rms, heads, rotated, swish


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + RMS Attn(x); x ← x + RMS MLP(x): what is added is the norm's output.

    Queries and keys are normed over all heads together, before they are rotated.
    """
    w, eps, base = Weights(state_dict, "model."), config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def normed(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
        return by_rms(x, eps) * weights[f"{name}.weight"]

    stream = Stream(w["embed_tokens.weight"][ids])
    for layer in range(config.num_hidden_layers):
        block = w.under(f"layers.{layer}")
        attention = block.under("self_attn")
        q = heads(normed(attention.linear("q_proj", stream.x), attention, "q_norm"), config.num_attention_heads)
        k = heads(normed(attention.linear("k_proj", stream.x), attention, "k_norm"), config.num_key_value_heads)
        v = heads(attention.linear("v_proj", stream.x), config.num_key_value_heads)
        q, k = (rotated(part, base, part.shape[-1], neighbours=False) for part in (q, k))
        mixed = attention.linear("o_proj", attend(q, k, v, q.shape[-1] ** -0.5))
        stream.add_attention(normed(mixed, block, "post_attention_layernorm"))
        gated = swish(block.linear("mlp.gate_proj", stream.x)) * block.linear("mlp.up_proj", stream.x)
        stream.add_mlp(normed(block.linear("mlp.down_proj", gated), block, "post_feedforward_layernorm"))
    normalised = by_rms(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", normalised * w["norm.weight"])
    return stream.finish(normalised), logits.float()
