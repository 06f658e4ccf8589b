"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): norms before and after each branch, soft caps, sliding windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, by_rms, gelu_tanh, heads, rotated


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + RMS Attn(RMS x); x ← x + RMS GeGLU(RMS x) (section 2 and table 1).

    A norm's gain is 1 + w. The embedding is multiplied by √d_model. Attention scores and logits are bounded by
    cap · tanh(score / cap). Blocks alternate between a sliding window and the whole of what came before.
    """
    w, eps, base = Weights(state_dict, "model."), config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def normed(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
        return by_rms(x, eps) * (1 + weights[f"{name}.weight"])

    stream = Stream(w["embed_tokens.weight"][ids] * math.sqrt(config.hidden_size))
    for layer in range(config.num_hidden_layers):
        block = w.under(f"layers.{layer}")
        x = normed(stream.x, block, "input_layernorm")
        q = heads(block.linear("self_attn.q_proj", x), config.num_attention_heads)
        k, v = (heads(block.linear(f"self_attn.{name}_proj", x), config.num_key_value_heads) for name in "kv")
        q, k = (rotated(part, base, part.shape[-1], neighbours=False) for part in (q, k))
        window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        mixed = attend(q, k, v, config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping, window)
        stream.add_attention(normed(block.linear("self_attn.o_proj", mixed), block, "post_attention_layernorm"))
        x = normed(stream.x, block, "pre_feedforward_layernorm")
        gated = gelu_tanh(block.linear("mlp.gate_proj", x)) * block.linear("mlp.up_proj", x)
        stream.add_mlp(normed(block.linear("mlp.down_proj", gated), block, "post_feedforward_layernorm"))
    normalised = by_rms(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", normalised * (1 + w["norm.weight"]))
    cap = config.final_logit_softcapping
    return stream.finish(normalised), (cap * torch.tanh(logits / cap)).float()
