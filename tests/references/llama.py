"""Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288): RMS norms, rotary positions, SwiGLU, grouped queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, by_rms, heads, rotated, swish


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + Attn(RMS x); x ← x + W_down(swish(W_gate RMS x) · W_up RMS x), with rotary positions of the default kind."""
    assert config.rope_parameters["rope_type"] == "default"
    w, eps, base = Weights(state_dict, "model."), config.rms_norm_eps, config.rope_parameters["rope_theta"]
    stream = Stream(w["embed_tokens.weight"][ids])
    for layer in range(config.num_hidden_layers):
        block = w.under(f"layers.{layer}")
        x = by_rms(stream.x, eps) * block["input_layernorm.weight"]
        q = heads(block.linear("self_attn.q_proj", x), config.num_attention_heads)
        k, v = (heads(block.linear(f"self_attn.{name}_proj", x), config.num_key_value_heads) for name in "kv")
        q, k = (rotated(part, base, part.shape[-1], neighbours=False) for part in (q, k))
        stream.add_attention(block.linear("self_attn.o_proj", attend(q, k, v, q.shape[-1] ** -0.5)))
        x = by_rms(stream.x, eps) * block["post_attention_layernorm.weight"]
        gated = swish(block.linear("mlp.gate_proj", x)) * block.linear("mlp.up_proj", x)
        stream.add_mlp(block.linear("mlp.down_proj", gated))
    normalised = by_rms(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", normalised * w["norm.weight"])
    return stream.finish(normalised), logits.float()
