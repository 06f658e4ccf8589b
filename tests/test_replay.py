"""`actcache replay`: stored sequences run again from the provenance alone; and `actcache prove`, before anything is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import actcache as ac
from actcache.cache.encoder import encode_shard
from actcache.cache.shards import decode_shard
from actcache.clients.cli import main
from actcache.schemas.array import ArrayLayout
from tests.models import save_gpt2
from tests.test_capturable import VECTORS


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def test_a_replay_in_the_builds_own_batches_gives_the_very_bits(built_by_dtype: dict[str, str], model: Path):
    for url in built_by_dtype.values():
        ds = ac.open(url)
        found = ac.replay(url, sequences=7, model=model)
        assert list(found.arrays) == ds.sites
        assert len(found.sequences) == 7
        assert found.holds
        assert all(site.equal and site.largest_difference == 0 for site in found.arrays.values())
        assert found.differs == {}


def test_quantised_and_added_arrays_are_replayed_too(spec: ac.Spec, model: Path, tmp_path: Path):
    first = spec.model_copy(update={"sites": "resid", "quantize": ("int8",), "outputs": ()})
    ac.build(first, tmp_path / "ds")
    ac.build(first, tmp_path / "ds", add_sites="blocks.1.hook_mlp_out")
    found = ac.replay(tmp_path / "ds", sequences=1000, model=model)
    assert len(found.sequences) == ac.open(tmp_path / "ds").n_sequences
    assert {"blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out.int8", "blocks.0.hook_resid_pre.int8"} <= set(found.arrays)
    assert found.holds
    assert found.arrays["blocks.1.hook_mlp_out"].equal
    quantised = found.arrays["blocks.0.hook_resid_pre.int8"]
    assert not quantised.equal
    assert 0 < quantised.relative_error <= quantised.tolerance < 0.1


def test_a_stored_value_that_the_model_does_not_compute_is_told(built: str, model: Path, tmp_path: Path):
    url = Path(shutil.copytree(built, tmp_path / "ds"))
    site = "blocks.1.hook_resid_post"
    layout = ArrayLayout.parse(site, json.loads((url / site / "zarr.json").read_bytes()))
    shard = url / layout.shard_key(0)
    rows = decode_shard(layout, memoryview(shard.read_bytes()), layout.shard_rows, "here").copy()
    rows[:, 3] += 1.0
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        shard.write_bytes(encode_shard(layout, rows, pool))
    code, shown = call("replay", url, "--model", model, "--sequences", 1000)
    assert code == 1
    told = [line for line in shown.splitlines() if "DIFFERS" in line]
    assert len(told) == 2
    assert told[0].startswith(site)
    code, shown = call("replay", url, "--model", model, "--sequences", 1000, "--json")
    document = json.loads(shown)
    assert code == 1
    assert document["holds"] is False
    assert document["arrays"][site]["largest_difference"] == pytest.approx(1.0, rel=1e-3)


def test_the_command_says_what_it_did(built: str, model: Path):
    code, shown = call("replay", built, "--model", model)
    assert code == 0
    assert "equal bits" in shown
    assert "sequences replayed: holds" in shown


def test_another_model_or_none_is_refused_on_one_line(built: str, tmp_path: Path):
    with pytest.raises(ac.InvalidInput, match=r"was built from 'random-gpt2', which is no model of a hub.*--model"):
        ac.replay(built)
    other = save_gpt2(tmp_path / "other", seed=1)
    with pytest.raises(ac.SpecMismatch, match=r"was built from 'random-gpt2', and 'other' has other weights"):
        ac.replay(built, model=other)
    with pytest.raises(ac.InvalidInput, match="at least 1"):
        ac.replay(built, model=other, sequences=0)


def test_a_module_of_ones_own_is_replayed(tmp_path: Path):
    torch.manual_seed(0)
    capturable = ac.Capturable(name="own", module=torch.nn.Linear(5, 3), inputs=VECTORS, sites={"out": ""})
    ac.build(ac.Spec(model=capturable, sites="out"), tmp_path / "ds")
    found = ac.replay(tmp_path / "ds", model=capturable)
    assert found.arrays["out"].equal
    assert len(found.sequences) == 6


def test_prove_tells_sites_and_identities(model: Path, tmp_path: Path):
    code, shown = call("prove", model)
    assert code == 0
    assert "output of transformer.h.2.mlp" in shown
    assert shown.count("holds  ") == 9
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    code, shown = call("prove", model, "--text", tmp_path / "a.txt", "--json")
    document = json.loads(shown)
    assert document["holds"] is True
    assert document["identities"]["causality"]["error"] <= document["identities"]["causality"]["tolerance"]
    (tmp_path / "short.txt").write_text("ab")
    code, shown = call("prove", model, "--text", tmp_path / "short.txt")
    assert code == 2
    assert "are too few; give a longer text" in shown


def test_prove_names_the_identity_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that looks ahead is no causal model, whatever its class says."""
    from transformers.models.gpt2 import modeling_gpt2

    folder = save_gpt2(tmp_path / "model")
    right = modeling_gpt2.GPT2Block.forward

    def looking_ahead(self, hidden_states, *args, **kwargs):
        return right(self, hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(modeling_gpt2.GPT2Block, "forward", looking_ahead)
    code, shown = call("prove", folder)
    assert code == 1
    assert any(line.startswith("FAILS") and "causality" in line for line in shown.splitlines())
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    with pytest.raises(ac.ProofFailed, match=r"fails the identity '\w+' \(.*\): relative error .*, tolerance"):
        ac.build(ac.Spec(model=str(folder), corpus=(str(tmp_path / "a.txt"),)), tmp_path / "ds")


def test_rwkv_is_stored_without_its_rescaling_and_says_so(tmp_path: Path):
    from tests import tiny_configs
    from tests.models import save_tokenizer

    tiny_configs.build("rwkv").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "a.txt").write_text("abcdefgh" * 30)
    ac.build(ac.Spec(model=str(tmp_path / "model"), corpus=(str(tmp_path / "a.txt"),)), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    assert ds.provenance.environments[0]["config_overrides"] == {"rescale_every": 0}
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert ds.model.n_layers > scaled.config.rescale_every > 0
    ids = torch.from_numpy(ds.tokens["token_id"][: ds.sequence_start[1]].astype(np.int64))[None]
    with torch.inference_mode():
        logits = scaled(ids).logits[0]
    last = ds[ds.residual_sites[-1]][: ds.sequence_start[1]].compute()
    np.testing.assert_allclose(ds.head.logits(last), logits.numpy(), rtol=1e-3, atol=1e-3)
