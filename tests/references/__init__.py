"""What the hooks of a model mean, computed a second time: from a state dict in plain torch, without transformers.

Each module has `states(state_dict, config, ids)`, which gives

- the stream and its parts by hook name, float32 (sequence, position, d_model): `blocks.0.hook_resid_pre`; for each block
  `hook_attn_out` and `hook_mlp_out`, what attention and MLP add to the stream; `hook_resid_mid`, the stream between
  them, unless both read the same stream; `hook_resid_post`; `ln_final.hook_normalized`, the last norm's output before
  its gain and bias;
- the logits, float32 (sequence, position, vocabulary).

`ids` (sequence, position) holds tokens alone, without padding. Everything is computed in float64, so that what a model
in float32 is off by is its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.references import gemma2, gpt2, gpt_neox, gptj, llama, olmo2, opt, rwkv

States = Callable[[Mapping[str, torch.Tensor], Any, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]

REFERENCES: dict[str, States] = {
    "gemma2": gemma2.states,
    "gpt2": gpt2.states,
    "gpt_neox": gpt_neox.states,
    "gptj": gptj.states,
    "llama": llama.states,
    "olmo2": olmo2.states,
    "opt": opt.states,
    "rwkv": rwkv.states,
}
