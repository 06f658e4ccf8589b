"""GPT-J (Wang and Komatsuzaki 2021; model card EleutherAI/gpt-j-6b): attention and MLP read one norm of one stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, centred, gelu_tanh, heads, rotated


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + Attn(LN x) + MLP(LN x). Neighbours among a head's first `rotary_dim` coordinates are rotated."""
    w, eps = Weights(state_dict, "transformer."), config.layer_norm_epsilon
    stream = Stream(w["wte.weight"][ids])
    for layer in range(config.n_layer):
        block = w.under(f"h.{layer}")
        x = block.affine("ln_1", centred(stream.x, eps))
        q, k, v = (heads(block.linear(f"attn.{name}_proj", x), config.n_head) for name in "qkv")
        q, k = (rotated(part, 10000.0, config.rotary_dim, neighbours=True) for part in (q, k))
        attention = block.linear("attn.out_proj", attend(q, k, v, q.shape[-1] ** -0.5))
        stream.add_both(attention, block.linear("mlp.fc_out", gelu_tanh(block.linear("mlp.fc_in", x))))
    normalised = centred(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", w.affine("ln_f", normalised))
    return stream.finish(normalised), logits.float()
