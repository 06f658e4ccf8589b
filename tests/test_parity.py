"""What a build stores is what the hooks mean, computed a second time from the weights, without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from tests import tiny_configs
from tests.models import save_tokenizer, write_corpus
from tests.references import REFERENCES

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in REFERENCES),
    ("gpt_neox", {"use_parallel_residual": False}),
]
LACKING = {
    "gptj": {"hook_resid_mid"},
    "gpt_neox": {"hook_resid_mid"},
}


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_every_site_of_a_family_is_what_its_hook_means(tmp_path: Path, family: str, changes: dict[str, Any]):
    model = tiny_configs.build(family, seed=7, **changes)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus", documents=6)
    spec = ac.Spec(model=str(tmp_path / "model"), corpus=(corpus,), context=48, sites="all", block_tokens=96)
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    stored = {site: ds[site].compute() for site in ds.sites}
    config = tiny_configs.tiny(family, **changes)
    if family == "rwkv":
        assert config.num_hidden_layers > config.rescale_every > 0, "or its rescaling would not show"
    for low, high in zip(ds.sequence_start[:-1], ds.sequence_start[1:], strict=True):
        ids = torch.from_numpy(ds.tokens["token_id"][low:high].astype(np.int64))[None]
        wanted, logits = REFERENCES[family](state, config, ids)
        assert set(wanted) == set(stored)
        for site, tensor in wanted.items():
            np.testing.assert_allclose(stored[site][low:high], tensor[0].numpy(), rtol=2e-4, atol=2e-5, err_msg=site)
        np.testing.assert_allclose(
            ds.head.logits(stored[ds.residual_sites[-1]][low:high]), logits[0].numpy(), rtol=1e-3, atol=2e-4
        )
    kinds = {site.rsplit(".", 1)[-1] for site in ds.sites if site.startswith("blocks.")}
    all_kinds = {"hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"}
    assert all_kinds - kinds == (set() if changes else LACKING.get(family, set()))


def test_a_tensor_that_the_model_changes_afterwards_is_stored_and_replayed_as_it_was(tmp_path: Path):
    """Falcon adds attention's output to the MLP's in place, which would change an MLP output that is not copied at once."""
    model = tiny_configs.build("falcon", seed=7)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus", documents=4)
    ac.build(ac.Spec(model=str(tmp_path / "model"), corpus=(corpus,), sites="all"), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    pre = ds["blocks.0.hook_resid_pre"].compute()
    for layer in range(ds.model.n_layers):
        attention, mlp = (ds[f"blocks.{layer}.hook_{part}_out"].compute() for part in ("attn", "mlp"))
        post = ds[f"blocks.{layer}.hook_resid_post"].compute()
        np.testing.assert_allclose(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)
        pre = post
    found = ac.replay(tmp_path / "ds", model=tmp_path / "model")
    assert all(site.equal for site in found.arrays.values())


def test_a_site_that_a_family_lacks_is_an_error_that_lists_what_it_has(tmp_path: Path):
    tiny_configs.build("gptj").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus", documents=2)
    with pytest.raises(
        ac.InvalidInput,
        match=r"no site matches 'blocks\.\*\.hook_resid_mid'; this model of 3 layers has blocks\.0\.hook_resid_pre, "
        r"blocks\.\{0…2\}\.hook_attn_out, blocks\.\{0…2\}\.hook_mlp_out, blocks\.\{0…2\}\.hook_resid_post, "
        r"ln_final\.hook_normalized",
    ):
        ac.build(
            ac.Spec(model=str(tmp_path / "model"), corpus=(corpus,), sites="blocks.*.hook_resid_mid"), tmp_path / "ds"
        )
    assert not (tmp_path / "ds").exists()


def test_any_module_can_be_a_site_whatever_its_width(tmp_path: Path, model: Path, corpus: str):
    import xarray

    wanted = "module:transformer.h.{0,2}.mlp.act module:transformer.h.1.attn.c_attn resid"
    ac.build(ac.Spec(model=str(model), corpus=(corpus,), sites=wanted, block_tokens=160), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    act, qkv = "module:transformer.h.0.mlp.act", "module:transformer.h.1.attn.c_attn"
    assert ds[act].shape == (ds.n_tokens, 128)
    assert ds[qkv].shape == (ds.n_tokens, 96)
    assert ds.resid.shape == (4, ds.n_tokens, 32)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    seen: dict[str, torch.Tensor] = {}
    for site in (act, qkv):
        plain.get_submodule(site.removeprefix("module:")).register_forward_hook(
            lambda module, args, out, site=site: seen.__setitem__(site, out)
        )
    with torch.inference_mode():
        plain(torch.from_numpy(ds.tokens["token_id"][: ds.sequence_start[1]].astype(np.int64))[None])
    for site, tensor in seen.items():
        np.testing.assert_allclose(ds[site][: ds.sequence_start[1]].compute(), tensor[0], rtol=1e-4, atol=1e-5)
    assert ds.statistics[act]["mean"].shape == (128,)
    assert ac.verify(tmp_path / "ds", full=True).ok
    group = xarray.open_zarr(tmp_path / "ds", consolidated=True)
    assert group[act].dims == ("token", "width_128")
    assert group["blocks.0.hook_resid_post"].dims == ("token", "d_model")
