"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): norms before attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, attend, centred, gelu_tanh, heads


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + Attn(LN x); x ← x + MLP(LN x). Matrices are stored the other way round: y = x W + b."""
    w, eps = Weights(state_dict, "transformer."), config.layer_norm_epsilon
    stream = Stream(w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]])
    for layer in range(config.n_layer):
        block = w.under(f"h.{layer}")
        x = block.affine("ln_1", centred(stream.x, eps))
        q, k, v = (
            heads(part, config.n_head)
            for part in (x @ block["attn.c_attn.weight"] + block["attn.c_attn.bias"]).chunk(3, -1)
        )
        mixed = attend(q, k, v, q.shape[-1] ** -0.5)
        stream.add_attention(mixed @ block["attn.c_proj.weight"] + block["attn.c_proj.bias"])
        x = block.affine("ln_2", centred(stream.x, eps))
        hidden = gelu_tanh(x @ block["mlp.c_fc.weight"] + block["mlp.c_fc.bias"])
        stream.add_mlp(hidden @ block["mlp.c_proj.weight"] + block["mlp.c_proj.bias"])
    normalised = centred(stream.x, eps)
    logits = Weights(state_dict).linear("lm_head", w.affine("ln_f", normalised))
    return stream.finish(normalised), logits.float()
