"""The references against transformers: logits, and the states it exposes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny_configs
from tests.references import REFERENCES

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in REFERENCES if name != "rwkv"),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("rwkv", {"rescale_every": 0}),
]
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def one_thread():
    """More gain nothing at this size, and much is lost where the processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_logits_and_states_are_those_of_transformers(model_type: str, changes: dict[str, Any]):
    model = tiny_configs.build(model_type, seed=5, **changes)
    with torch.inference_mode():
        theirs = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    ours, logits = REFERENCES[model_type](model.state_dict(), model.config, IDS)
    close(logits, theirs.logits, rtol=1e-4, atol=1e-4)

    last = max(int(site.split(".")[1]) for site in ours if site.startswith("blocks."))
    stream = [ours["blocks.0.hook_resid_pre"], *(ours[f"blocks.{i}.hook_resid_post"] for i in range(last + 1))]
    hidden = theirs.hidden_states
    if model_type == "rwkv":  # which has no state before the first block and one more after the last
        hidden = (model.rwkv.blocks[0].pre_ln(model.rwkv.embeddings(IDS)), *hidden)
        close(stream.pop(), hidden[-2], rtol=1e-4, atol=1e-4)
        hidden = (*hidden[:-2], hidden[-1])
    else:
        stream.pop()
    for state, their_state in zip(stream, hidden[:-1], strict=True):
        close(state, their_state, rtol=1e-4, atol=1e-4)
    # The last of their states is after the final norm: with its gain and bias, ours is the same.
    normed = next(m for name, m in model.named_modules() if name.endswith(FINAL_NORM[model_type]))
    gain = normed.weight + 1 if model_type == "gemma2" else normed.weight
    bias = getattr(normed, "bias", None)
    close(ours["ln_final.hook_normalized"] * gain + (0 if bias is None else bias), hidden[-1], rtol=1e-4, atol=1e-4)


FINAL_NORM = {
    "gemma2": "model.norm",
    "gpt2": "ln_f",
    "gpt_neox": "final_layer_norm",
    "gptj": "ln_f",
    "llama": "model.norm",
    "olmo2": "model.norm",
    "opt": "decoder.final_layer_norm",
    "rwkv": "ln_out",
}


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_the_stream_is_the_sum_of_what_is_added(model_type: str, changes: dict[str, Any]):
    model = tiny_configs.build(model_type, seed=5, **changes)
    sites, _ = REFERENCES[model_type](model.state_dict(), model.config, IDS)
    parallel = model_type == "gptj" or (model_type == "gpt_neox" and not changes)
    stream = sites["blocks.0.hook_resid_pre"]
    blocks = sum(site.endswith("hook_resid_post") for site in sites)
    assert blocks >= 3
    for i in range(blocks):
        attention, mlp = sites[f"blocks.{i}.hook_attn_out"], sites[f"blocks.{i}.hook_mlp_out"]
        assert (f"blocks.{i}.hook_resid_mid" in sites) is not parallel
        if not parallel:
            close(stream + attention, sites[f"blocks.{i}.hook_resid_mid"], rtol=1e-5, atol=1e-5)
        stream = stream + attention + mlp
        close(stream, sites[f"blocks.{i}.hook_resid_post"], rtol=1e-5, atol=1e-5)
        stream = sites[f"blocks.{i}.hook_resid_post"]


def test_rwkv_rescaled_is_the_same_model_with_a_stream_halved_every_few_blocks():
    plain = tiny_configs.build("rwkv", rescale_every=0)
    sites, logits = REFERENCES["rwkv"](plain.state_dict(), plain.config, IDS)
    model = tiny_configs.build("rwkv")
    every = model.config.rescale_every
    assert 0 < 2 * every < model.config.num_hidden_layers
    with torch.inference_mode():
        theirs = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    close(logits, theirs.logits, rtol=1e-3, atol=1e-3)
    for i, state in enumerate(theirs.hidden_states[:-1]):
        close(state * 2 ** ((i + 1) // every), sites[f"blocks.{i}.hook_resid_post"], rtol=1e-3, atol=1e-3)
