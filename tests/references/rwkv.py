"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): time mixing in attention's place, channel mixing in the MLP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.references.parts import Stream, Weights, centred


def states(
    state_dict: Mapping[str, torch.Tensor], config: Any, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """x ← x + TimeMix(LN x); x ← x + ChannelMix(LN x) (section 3), with weights that are not rescaled.

    The first block norms the embedding once more before anything is added: the stream begins after that norm, and so does
    `blocks.0.hook_resid_pre`.
    """
    w, eps = Weights(state_dict, "rwkv."), config.layer_norm_epsilon
    stream = Stream(w.affine("blocks.0.pre_ln", centred(w["embeddings.weight"][ids], eps)))
    for layer in range(config.num_hidden_layers):
        block = w.under(f"blocks.{layer}")
        stream.add_attention(time_mixing(block.under("attention"), block.affine("ln1", centred(stream.x, eps))))
        stream.add_mlp(channel_mixing(block.under("feed_forward"), block.affine("ln2", centred(stream.x, eps))))
    normalised = centred(stream.x, 1e-5)  # the last norm's ε is LayerNorm's default, whatever the config says
    logits = Weights(state_dict).linear("head", w.affine("ln_out", normalised))
    return stream.finish(normalised), logits.float()


def mixed(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """μ x_t + (1 − μ) x_{t−1}, then a matrix ("token shift"); before the first token there is zero."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    share = w[f"time_mix_{name}"]
    return w.linear(name, share * x + (1 - share) * before)


def time_mixing(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """W_o(σ(r) · wkv) with wkv, the paper's recurrence, written as a weighted mean over the tokens so far.

    Token i has the weight exp(k_i − (t − 1 − i) e^decay) in the mean at t > i, and exp(k_t + u) at its own t.
    """
    k, v = mixed(w, "key", x), mixed(w, "value", x)
    t = torch.arange(x.shape[1])
    back = (t[:, None] - t)[:, :, None]
    log_weight = k[:, None] - (back - 1) * w["time_decay"].exp()
    log_weight = torch.where(back == 0, k[:, None] + w["time_first"], log_weight)
    weight = log_weight.masked_fill(back < 0, -torch.inf).softmax(2)
    return w.linear("output", torch.sigmoid(mixed(w, "receptance", x)) * torch.einsum("btid,bid->btd", weight, v))


def channel_mixing(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """σ(r) · W_v(max(k, 0)²)."""
    hidden = mixed(w, "key", x).clamp(min=0) ** 2
    return torch.sigmoid(mixed(w, "receptance", x)) * w.linear("value", hidden)
