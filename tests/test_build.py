"""Builds seen from outside: what they return, what they resume, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.cache.publish import publish
from actcache.cache.store import open_store
from actcache.jobs.proof import tolerance
from actcache.jobs.resolve import resolve
from tests.models import save_gpt2


class Listener:
    """Remembers what a build tells."""

    def __init__(self) -> None:
        self.states: list = []
        self.notes: list[str] = []
        self.events: list[tuple[str, dict]] = []
        self.forecasts: list = []

    def progress(self, state) -> None:
        self.states.append(state)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, name: str, **facts) -> None:
        self.events.append((name, facts))

    def forecast(self, forecast) -> None:
        self.forecasts.append(forecast)


@pytest.fixture(scope="module")
def small(spec: ac.Spec) -> ac.Spec:
    return spec.model_copy(update={"sites": "resid", "outputs": ()})


def test_the_same_spec_gives_the_same_manifest_anywhere(small: ac.Spec, tmp_path: Path, s3: str):
    results = [ac.build(small, url) for url in (tmp_path / "a", tmp_path / "b", s3 + "c", "memory://same")]
    assert len({result.manifest for result in results}) == 1
    assert {result.state for result in results} == {"built"}
    assert ac.build(small, tmp_path / "a").state == "already sealed"
    assert ac.verify(s3 + "c", full=True).ok


def test_progress_counts_every_token_and_byte(small: ac.Spec, tmp_path: Path):
    listener = Listener()
    result = ac.build(small, tmp_path / "ds", reporter=listener)
    stages = [state.stage for state in listener.states]
    assert list(dict.fromkeys(stages)) == ["tokenise", "blocks", "replay", "seal"]
    last = [state for state in listener.states if state.stage == "blocks"][-1]
    assert last.tokens == last.tokens_total == result.n_tokens
    assert last.blocks == last.blocks_total == result.blocks_run
    assert last.bytes_written == result.bytes_written > 0
    assert any("more tokens are run" in note for note in listener.notes)


def test_a_large_block_runs_nothing_twice_and_says_nothing(small: ac.Spec, tmp_path: Path):
    listener = Listener()
    result = ac.build(small.model_copy(update={"block_tokens": None}), tmp_path / "ds", reporter=listener)
    assert (result.recomputed_fraction, result.blocks_run) == (0.0, 1)
    assert [note for note in listener.notes if "blocks" in note] == []


def test_staged_by_hand(small: ac.Spec, tmp_path: Path):
    assert ac.build(small, tmp_path / "ds", stage="tokenise").state == "tokenised"
    with pytest.raises(ac.NotSealed, match="resume"):
        ac.open(tmp_path / "ds")
    assert ac.build(small, tmp_path / "ds").state == "built"
    with pytest.raises(ac.InvalidInput, match="stage"):
        ac.build(small, tmp_path / "ds", stage="everything")


def test_an_unfinished_block_is_run_again_and_a_finished_one_is_not(small: ac.Spec, tmp_path: Path, built: str):
    manifest = ac.build(small, tmp_path / "whole").manifest
    half = Path(shutil.copytree(tmp_path / "whole", tmp_path / "half"))
    (half / "zarr.json").unlink()
    (half / ".actcache/receipts/000001.json").unlink()
    shutil.rmtree(half / "blocks.1.hook_resid_post/c/1")
    again = ac.build(small, half)
    assert (again.manifest, again.blocks_run, again.state) == (manifest, 1, "built")


def test_shards_of_other_values_are_kept_and_reported(small: ac.Spec, tmp_path: Path):
    """Hardware that rounds differently wrote a shard before: never overwritten, never mixed silently."""
    from concurrent.futures import ThreadPoolExecutor

    from actcache.cache.encoder import encode_shard
    from actcache.cache.shards import decode_shard

    ac.build(small, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    site = ds.sites[1]
    layout = ds._root.layouts[site]
    key = layout.shard_key(1)
    rows = decode_shard(layout, (tmp_path / "ds" / key).read_bytes(), 160, "x")
    other = np.nextafter(rows, np.float32(np.inf))
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "ds", half)
    for gone in ("zarr.json", ".actcache/receipts/000001.json", ".actcache/statistics/000001.f64", key, "norm/0/c/1/0"):
        (half / gone).unlink()
    next((half / ".actcache").glob("manifest-*")).unlink()
    shutil.rmtree(half / "statistics")
    with ThreadPoolExecutor(1) as pool:
        (half / key).write_bytes(encode_shard(layout, other, pool))
    listener = Listener()
    ac.build(small, half, reporter=listener)
    mixed = ac.open(half)
    assert mixed.provenance.mixed_attempts == (key,)
    assert any("mixed_attempts" in note for note in listener.notes)
    assert np.array_equal(mixed[site][160:320].compute(), other)
    assert np.array_equal(mixed[site][:160].compute(), ds[site][:160].compute())
    np.testing.assert_allclose(mixed.norm[site][160:320], np.linalg.norm(other.astype(float), axis=1), rtol=1e-6)
    whole = mixed[site].compute().astype(float)
    np.testing.assert_allclose(mixed.statistics[site]["mean"], whole.mean(axis=0), rtol=1e-12)
    assert ac.verify(half, full=True).ok


def test_shards_of_another_encoder_are_as_good(small: ac.Spec, tmp_path: Path):
    """Equal values in other bytes (another zstd) are no mixture; the receipt holds the hash of what is stored."""
    from crc32c import crc32c
    from numcodecs import blosc

    ac.build(small, tmp_path / "ds")
    half = Path(shutil.copytree(tmp_path / "ds", tmp_path / "half"))
    ds = ac.open(half)
    layout = ds._root.layouts[ds.sites[0]]
    key = layout.shard_key(0)
    rows = ds.rows(ds.sites[0], 0, 160)
    assert layout.chunks_per_shard == 1
    chunk = blosc.compress(np.ascontiguousarray(rows).view("u4"), b"zstd", 7, blosc.SHUFFLE, layout.chunk_bytes, 4)
    chunk += crc32c(chunk).to_bytes(4, "little")
    index = np.array([[0, len(chunk)]], "<u8").tobytes()
    for gone in ("zarr.json", ".actcache/receipts/000000.json", key):
        (half / gone).unlink()
    (half / key).write_bytes(chunk + index + crc32c(index).to_bytes(4, "little"))
    result = ac.build(small, half)
    assert ac.open(half).provenance.mixed_attempts == ()
    assert result.manifest != ds.manifest
    assert ac.verify(half, full=True).ok


def test_a_wrong_shard_is_noticed_by_the_replay(small: ac.Spec, tmp_path: Path):
    ac.build(small, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    site = ds.sites[2]
    layout = ds._root.layouts[site]
    from concurrent.futures import ThreadPoolExecutor

    from actcache.cache.encoder import encode_shard

    (tmp_path / "ds/zarr.json").unlink()
    for block in range(layout.n_shards):
        low, high = layout.shard_range(block)
        with ThreadPoolExecutor(1) as pool:
            data = encode_shard(layout, np.roll(ds.rows(site, low, high), 1, axis=0), pool)
        (tmp_path / "ds" / layout.shard_key(block)).write_bytes(data)
    with pytest.raises(ac.ProofFailed, match=f"{site}, sequence .* replay differs"):
        ac.build(small, tmp_path / "ds")
    with pytest.raises(ac.NotSealed):
        ac.open(tmp_path / "ds")


def test_a_receipt_that_lies_is_noticed_by_the_seal(small: ac.Spec, tmp_path: Path):
    ac.build(small, tmp_path / "ds")
    (tmp_path / "ds/zarr.json").unlink()
    shard = tmp_path / "ds/blocks.0.hook_resid_post/c/2/0"
    shard.write_bytes(shard.read_bytes() + b"x")
    from concurrent.futures import ThreadPoolExecutor

    from actcache.cache.seal import seal

    with (
        ThreadPoolExecutor(2) as pool,
        pytest.raises(ac.Corrupt, match=r"blocks\.0\.hook_resid_post/c/2/0.*receipt says"),
    ):
        seal(open_store(tmp_path / "ds"), pool)


def test_a_hub_id_through_a_local_cache(model: Path, corpus: str, tmp_path: Path):
    """As the hub's own client lays its cache out; offline, in a process of its own."""
    import os
    import subprocess
    import sys

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home/hub/models--lab--tiny"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "actcache",
            "build",
            str(tmp_path / "ds"),
            "--model",
            name,
            "--corpus",
            corpus,
            *more,
        ]
        return subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)

    done = run("lab/tiny")
    assert done.returncode == 0, done.stderr
    labels = ac.open(tmp_path / "ds").provenance.labels
    assert (labels.model, labels.revision) == ("lab/tiny", commit)
    assert json.loads(run("lab/tiny", "--revision", commit).stdout)["state"] == "already sealed"
    failed = run("lab/absent")
    assert failed.returncode == 2
    assert "lab/absent: not a folder here, not in the local hub cache" in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context": 33}, "longer than the model's own context of 32"),
        ({"model": "./absent"}, "no such folder"),
        ({"model": "/"}, r"no config\.json"),
        ({"sites": "blocks.7.*"}, "no site matches"),
        ({"block_tokens": 100, "chunk_tokens": 33}, "no whole number of chunks"),
        ({"revision": "main"}, "no revision"),
    ],
)
def test_specs_that_cannot_be(spec: ac.Spec, tmp_path: Path, change: dict, says: str):
    with pytest.raises(ac.InvalidInput, match=says):
        ac.build(spec.model_copy(update=change), tmp_path / "ds")
    assert not (tmp_path / "ds").exists()


def test_model_folders_that_cannot_be(spec: ac.Spec, model: Path, tmp_path: Path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    def fails(folder: Path, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            ac.build(spec.model_copy(update={"model": str(folder)}), tmp_path / "ds")
        shutil.rmtree(tmp_path / "ds", ignore_errors=True)

    other = broken("other-family")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    fails(other, ac.Unsupported, "unheard-of")
    no_weights = broken("no-weights")
    (no_weights / "model.safetensors").unlink()
    fails(no_weights, ac.InvalidInput, "no weights")
    no_tokenizer = broken("no-tokenizer")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    fails(no_tokenizer, ac.InvalidInput, "no tokenizer")
    garbled = broken("garbled")
    (garbled / "model.safetensors").write_bytes(b"garbage")
    fails(garbled, ac.InvalidInput, "cannot be loaded")
    missing = broken("missing")
    from safetensors.torch import load_file, save_file

    weights = load_file(missing / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, missing / "model.safetensors", {"format": "pt"})
    fails(missing, ac.InvalidInput, r"1 weights are missing .*h\.1\.mlp\.c_fc\.weight")


def test_the_default_layout_follows_the_model(tmp_path: Path, corpus: str):
    wide = save_gpt2(tmp_path / "wide", layers=1, width=768, context=1024)
    plan = resolve(ac.Spec(model=str(wide), corpus=(corpus,))).plan
    layout, row = plan.spec.layout, 768 * 4
    assert plan.spec.context == 1024
    assert layout.block_tokens >= 32 * 1024
    assert layout.block_tokens % layout.chunk_tokens == 0
    assert (512 << 10) - row < layout.chunk_tokens * row <= 512 << 10
    short = resolve(ac.Spec(model=str(wide), corpus=(corpus,), context=128, dtype="bfloat16")).plan.spec
    assert (32 << 20) < short.layout.block_tokens * 768 * 2 <= 64 << 20
    assert (short.execution.compute_dtype, short.stored_dtype) == ("float32", "bfloat16")
    odd = resolve(ac.Spec(model=str(wide), corpus=(corpus,), block_tokens=1001)).plan.spec.layout
    assert (odd.block_tokens, 1001 % odd.chunk_tokens) == (1001, 0)


def test_checkpoint_dtypes_are_their_own(tmp_path: Path, corpus: str):
    for dtype in (torch.bfloat16, torch.float16):
        folder = save_gpt2(tmp_path / str(dtype), dtype=dtype)
        for forget in (False, True):
            config = json.loads((folder / "config.json").read_text())
            if forget:
                config.pop("dtype")
            (folder / "config.json").write_text(json.dumps(config))
            spec = resolve(ac.Spec(model=str(folder), corpus=(corpus,))).plan.spec
            assert spec.stored_dtype == spec.execution.compute_dtype == str(dtype).removeprefix("torch.")


def test_tolerances_grow_with_rounding_alone():
    assert tolerance("float32", 12) == 1e-4
    assert tolerance("float16", 12) < tolerance("bfloat16", 12) < 1


def test_a_plan_of_other_bytes_and_the_same_key_is_adopted(small: ac.Spec, tmp_path: Path, model: Path):
    """The same content under another name resumes; its own label stays."""
    renamed = Path(shutil.copytree(model, tmp_path / "renamed"))
    ac.build(small, tmp_path / "ds", stage="tokenise")
    assert ac.build(small.model_copy(update={"model": str(renamed)}), tmp_path / "ds").state == "built"
    assert ac.open(tmp_path / "ds").provenance.labels.model == "random-gpt2"


def test_foreign_metadata_under_an_arrays_name_is_not_overwritten(small: ac.Spec, tmp_path: Path):
    ac.build(small, tmp_path / "ds", stage="tokenise")
    publish(open_store(tmp_path / "ds"), "blocks.0.hook_resid_pre/zarr.json", b"{}")
    with pytest.raises(ac.SpecMismatch, match="held by another build"):
        ac.build(small, tmp_path / "ds")
    assert (tmp_path / "ds/blocks.0.hook_resid_pre/zarr.json").read_bytes() == b"{}"


def test_a_tokenizer_that_changes_under_a_build_is_refused_before_a_token_is_stored(
    small: ac.Spec, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from actcache.jobs import run

    folder = Path(shutil.copytree(model, tmp_path / "model"))
    load = run.load_tokenizer

    def swapped(where: Path):
        path = where / "tokenizer_config.json"
        path.write_text(path.read_text() + " ")
        return load(where)

    monkeypatch.setattr(run, "load_tokenizer", swapped)
    for stage in ("tokenise", "all"):
        with pytest.raises(ac.InvalidInput, match="changed since the build began"):
            ac.build(small.model_copy(update={"model": str(folder)}), tmp_path / stage, stage=stage)
        assert not (tmp_path / stage / "token_id").exists()


def test_proofs_that_differ_in_their_last_bits_are_no_mixed_environments(small: ac.Spec, tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    from actcache.cache.seal import ENVIRONMENTS, seal

    for name, device, mixed in (("same", "x", False), ("other", "y", True)):
        ac.build(small, tmp_path / name)
        (tmp_path / name / "zarr.json").unlink()
        store = open_store(tmp_path / name)
        for number, where in enumerate(("x", device)):
            record = {"device": where, "proof": {"head": 1e-7 * (number + 1)}}
            store.put_new(f"{ENVIRONMENTS}{number}.json", json.dumps(record).encode())
        with ThreadPoolExecutor(2) as pool:
            seal(store, pool)
        assert ac.open(tmp_path / name).provenance.mixed_environments is mixed
        assert ac.open(tmp_path / name).provenance.replay.status == "not replayed"


@pytest.mark.parametrize(
    "change", [{"block_tokens": 8_388_593}, {"chunk_tokens": 100_000_000, "block_tokens": 100_000_000}]
)
def test_layouts_that_no_reader_would_accept_are_refused_before_anything_is_stored(
    small: ac.Spec, tmp_path: Path, change: dict
):
    with pytest.raises(ac.InvalidInput, match="beyond the bound"):
        ac.build(small.model_copy(update=change), tmp_path / "ds")
    assert not (tmp_path / "ds").exists()


MUTATIONS = {
    "attention": ("hook_attn_out", lambda x: x * 0.5),
    "mid": ("hook_resid_mid", lambda x: x * 1.3),
    "mlp": ("hook_mlp_out", lambda x: x * 0),
    "post": ("hook_resid_post", lambda x: x * 1.3),
    "shifted": ("hook_resid_post", lambda x: x.roll(1, dims=1)),
    "final": ("hook_normalized", lambda x: x + 0.1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_proof_finds_tensors_that_are_a_little_wrong(
    tmp_path: Path, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    """On the trained model, where attention and MLP write what matters; also in bfloat16, which rounds coarsely."""
    import dataclasses

    from actcache.jobs import proof
    from actcache.jobs.parts import ModelParts

    ending, change = MUTATIONS[name]
    honest = ModelParts.taps

    def tampered(parts, sites):
        return [
            dataclasses.replace(tap, transform=lambda x, t=tap.transform: change(x if t is None else t(x)))
            if tap.site.endswith(ending)
            else tap
            for tap in honest(parts, sites)
        ]

    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 30)
    bundled = Path(__file__).parent.parent / "examples/tiny-gpt"
    spec = ac.Spec(model=str(bundled), corpus=(str(tmp_path / "a.txt"),), compute_dtype=dtype)
    assert proof.tolerance("bfloat16", 6) < 0.1
    assert ac.build(spec, tmp_path / "honest").state == "built"
    monkeypatch.setattr(ModelParts, "taps", tampered)
    with pytest.raises(ac.ProofFailed):
        ac.build(spec, tmp_path / "tampered")


def test_a_seal_whose_connection_dropped_after_the_root_was_written_is_ours(
    small: ac.Spec, monkeypatch: pytest.MonkeyPatch
):
    import uuid

    from actcache.cache.remote_store import MemoryStore

    honest, dropped = MemoryStore.put_new, []

    def dropping(self: MemoryStore, key: str, data: bytes) -> bool:
        created = honest(self, key, data)
        if key == "zarr.json" and not dropped:
            dropped.append(key)
            raise ac.StoreError("connection reset")
        return created

    monkeypatch.setattr(MemoryStore, "put_new", dropping)
    assert ac.build(small, f"memory://{uuid.uuid4()}").state == "built"
    assert dropped
