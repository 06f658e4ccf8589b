"""Quantised sites: bounds that hold for any values, arrays that anybody can read, damage that is told, nothing silent."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import actcache as ac
from actcache.cache.damage import Errors, block_damage, merged, sample
from actcache.cache.encoder import encode_shard
from actcache.cache.quantise import SMALLEST_SCALE, _e4m3, dequantise, quantise
from actcache.clients.cli import main
from actcache.schemas.errors import Corrupt
from actcache.schemas.quantised import KINDS, error_bound, groups, parse_kinds
from actcache.schemas.root_document import parse_root
from actcache.schemas.spec import ResolvedSpec
from tests.crash import Fault, run, small_spec
from tests.models import save_gpt2
from tests.test_records import change

FLOAT32 = np.finfo(np.float32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def vectors(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Rows of any finite values: hypothesis's own corners, or noise with massive dimensions at any magnitude."""
    n, d, group = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 7, 32, 64]))
    if draw(st.booleans()):
        corners = draw(st.lists(FINITE, min_size=1, max_size=40))
        return np.resize(np.array(corners, np.float32), (n, d)), group
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    magnitude = 2.0 ** draw(st.integers(-149, 110))
    rows = rng.standard_normal((n, d)) * magnitude
    rows[:, :: draw(st.integers(2, 40))] *= draw(st.sampled_from([0, 1, 300, 5000]))
    return rows.astype(np.float32), group


def scale_of(scales: np.ndarray, width: int, group: int) -> np.ndarray:
    return np.repeat(scales.astype(np.float64), group, axis=1)[:, :width]


@given(vectors())
def test_an_int8_value_is_within_half_a_scale(made: tuple[np.ndarray, int]):
    values, group = made
    codes, scales = quantise(values, "int8", group)
    assert (codes.dtype, codes.shape, codes.min() >= -127) == (np.int8, values.shape, True)
    assert scales.shape == (len(values), groups(values.shape[1], group))
    wide = scale_of(scales, values.shape[1], group)
    back = dequantise(codes, scales, "int8", group)
    assert np.array_equal(back, codes * wide), "exact in float32"
    assert (np.abs(values.astype(float) - back) <= wide * (0.5 + 1e-5)).all()


@given(vectors())
def test_an_fp8_value_is_within_a_sixteenth_or_a_step_of_its_smallest_codes(made: tuple[np.ndarray, int]):
    values, group = made
    codes, scales = quantise(values, "fp8", group)
    assert (codes.dtype, codes.shape) == (np.uint8, values.shape)
    wide = scale_of(scales, values.shape[1], group)
    back = dequantise(codes, scales, "fp8", group)
    assert np.isfinite(back).all()
    exact = values.astype(float)
    assert (np.abs(exact - back) <= np.maximum(np.abs(exact) / 16, wide * 2**-10) * (1 + 1e-5)).all()


@given(vectors(), st.sampled_from(KINDS))
def test_scales_have_eight_bits_and_never_overflow_or_vanish(made: tuple[np.ndarray, int], kind):
    values, group = made
    codes, scales = quantise(values, kind, group)
    assert np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32), scales)
    assert (scales >= SMALLEST_SCALE).all()
    back = dequantise(codes, scales, kind, group)
    assert np.isfinite(back).all()
    assert not back[values == 0].any()


@given(vectors(), st.sampled_from(KINDS))
def test_the_bound_of_any_vector(made: tuple[np.ndarray, int], kind):
    values, group = made
    errors = Errors.of(values, dequantise(*quantise(values, kind, group), kind, group))
    told = errors.norm > (2.0**-100) ** 2  # smaller ones lie below the smallest scale
    assert (np.sqrt(errors.error[told]) <= error_bound(kind, group) * np.sqrt(errors.norm[told]) * (1 + 1e-5)).all()


@given(vectors(), st.sampled_from(KINDS))
def test_it_does_not_matter_how_rows_come(made: tuple[np.ndarray, int], kind):
    values, group = made
    whole = quantise(values, kind, group)
    rows = [quantise(values[i : i + 1], kind, group) for i in range(len(values))]
    for together, alone in zip(whole, zip(*rows, strict=True), strict=True):
        assert together.tobytes() == np.concatenate(alone).tobytes()


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=30))
def test_an_fp8_code_is_the_nearest_of_two_the_even_one(values: list[float]):
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(middles, np.float32(end)) for end in (0, 1000)]
    steps = np.concatenate([np.array(values, np.float32), codes, middles, -middles, *near])
    assert np.array_equal(_e4m3(steps), steps.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_float32(kind):
    top, tiny = FLOAT32.max, FLOAT32.smallest_subnormal
    rows = np.array([[top, -top, 1, 0], [tiny, -tiny, 0, 0], [0, 0, 0, 0], [3, 3, 3, 3]], np.float32)
    back = dequantise(*quantise(rows, kind, 2), kind, 2)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[0, :2], rows[0, :2], rtol=2**-7)
    assert np.abs(back[1]).max() <= SMALLEST_SCALE
    assert not back[2].any()
    np.testing.assert_allclose(back[3], 3, rtol=2**-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_values_are_taken_as_they_are(kind, dtype):
    values = np.random.default_rng(0).standard_normal((5, 50)).astype(dtype)
    for mine, theirs in zip(quantise(values, kind, 32), quantise(values.astype(np.float32), kind, 32), strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_raise_nothing_here(kind):
    """The measurement of the same rows tells their place."""
    rows = np.array([[np.nan, 1, np.inf, 2]], np.float32)
    Errors.of(rows, dequantise(*quantise(rows, kind, 2), kind, 2))


def test_a_massive_dimension_costs_its_own_group_alone():
    rows = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    massive = rows.copy()
    massive[:, 5] *= 3000
    plain, beside = (dequantise(*quantise(x, "int8", 32), "int8", 32) for x in (rows, massive))
    assert np.array_equal(plain[:, 32:], beside[:, 32:])


@given(st.integers(0, 1 << 40), st.integers(1, 5000))
def test_the_sample_is_of_the_block_and_as_large_as_it_can_be(start: int, length: int):
    tokens = sample(start, start + length)
    assert (np.diff(tokens) > 0).all()
    assert start <= tokens[0] <= tokens[-1] < start + length
    assert len(tokens) == min(length, 64)
    assert np.array_equal(sample(start, start + length), tokens)


def test_the_sample_meets_every_position():
    """Blocks of a whole number of contexts: a sample in even steps would look at one position again and again."""
    positions = np.concatenate([sample(low, low + 32 * 1024) for low in range(0, 32 * 32 * 1024, 32 * 1024)]) % 1024
    counts = np.bincount(positions // 64, minlength=16)
    assert counts.sum() == 2048
    assert (abs(counts - 128) < 50).all()
    assert sample(0, 1000)[:4].tolist() == [2, 32, 33, 42], "for ever the same"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 99))
def test_blocks_merge_to_what_the_whole_has(lengths: list[int], seed: int):
    rng = np.random.default_rng(seed)
    parts = []
    for n in lengths:
        x = rng.standard_normal((n, 40)).astype(np.float32)
        parts.append((x, dequantise(*quantise(x, "int8", 32), "int8", 32)))
    kls = [rng.random(min(n, 3)) for n in lengths]
    blocks = [block_damage([Errors.of(*part)], kl) for part, kl in zip(parts, kls, strict=True)]
    found = merged([type(block).from_bytes(block.to_bytes(), "x") for block in blocks], None)
    x, q = (np.concatenate(side).astype(float) for side in zip(*parts, strict=True))
    relative = np.linalg.norm(x - q, axis=1) / np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(found.relative_error, np.linalg.norm(x - q) / np.linalg.norm(x))
    np.testing.assert_allclose(found.median_token_error, np.sort(relative)[(len(x) - 1) // 2], rtol=1 / 32)
    np.testing.assert_allclose(found.largest_token_error, relative.max())
    np.testing.assert_allclose(found.kl, np.concatenate(kls).mean())
    np.testing.assert_allclose(found.largest_kl, np.concatenate(kls).max())
    assert found.kl_tokens == len(np.concatenate(kls))
    assert merged([block_damage([Errors.of(*parts[0])], np.array([np.nan]))], None).kl_note is not None


@pytest.fixture(scope="module")
def asked(spec: ac.Spec) -> ac.Spec:
    return spec.model_copy(update={"quantize": ("int8", "fp8"), "sites": "all", "outputs": ()})


@pytest.fixture(scope="module")
def both(asked: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Exact arrays with both quantised forms beside them."""
    url = str(tmp_path_factory.mktemp("quantised") / "both.zarr")
    ac.build(asked, url)
    return url


@pytest.fixture(scope="module")
def only(asked: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Both quantised forms alone."""
    url = str(tmp_path_factory.mktemp("quantised") / "only.zarr")
    ac.build(asked.model_copy(update={"only_quantized": True}), url)
    return url


def test_exact_arrays_are_what_they_are_without(both: str, built: str):
    beside, plain = ac.open(both), ac.open(built)
    assert beside.sites == plain.sites
    for site in plain.sites:
        assert np.array_equal(beside[site].compute(), plain[site].compute())
        assert np.array_equal(beside.norm[site], plain.norm[site])
    assert set(beside.quantised) == set(plain.sites)
    assert set(beside.quantised.values()) == {("int8", "fp8")}
    assert plain.quantised == {}
    assert ac.verify(both, full=True).ok


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_of_the_exact_ones_and_others_read_them_by_hand(both: str, kind):
    """As docs/format.md says it, with plain zarr, tensorstore and xarray."""
    ds, group = ac.open(both), zarr.open_group(both, mode="r")
    opened = xarray.open_zarr(both)
    for site in ds.sites:
        values = ds.site(site, dtype=kind)
        assert (values.dtype, values.shape) == (np.float32, ds[site].shape)
        codes, scales = group[f"{site}.{kind}"], group[f"{site}.{kind}.scale"]
        about = dict(codes.attrs)
        assert (about["of"], about["scale"], about["group"]) == (site, scales.path, 32)
        raw = codes[...]
        raw = raw.view(ml_dtypes.float8_e4m3fn) if about["encoding"] == "float8_e4m3fn" else raw
        by_hand = raw.astype(np.float32) * np.repeat(scales[...], about["group"], axis=1)[:, : raw.shape[1]]
        assert np.array_equal(values.compute(), by_hand)
        exact = ds[site].compute().astype(float)
        error = np.linalg.norm(exact - by_hand) / np.linalg.norm(exact)
        np.testing.assert_allclose(ds.damage(site, kind).relative_error, error, rtol=1e-6)
        for name in (codes.path, scales.path):
            kvstore = {"driver": "file", "path": f"{both}/{name}"}
            theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
            assert np.array_equal(theirs, group[name][...])
            assert np.array_equal(opened[name].values, theirs)
    lazy, whole = ds.site(ds.sites[2], dtype=kind), ds.site(ds.sites[2], dtype=kind).compute()
    for index in (np.s_[5:10], np.s_[::-3], np.s_[-1], np.s_[[1, 700, 3]], np.s_[:, 3], np.s_[10:300:7, ::2]):
        assert np.array_equal(lazy[index].compute(), whole[index])
    assert np.array_equal(ds.rows(ds.sites[2], 150, 170, kind), whole[150:170])


def test_only_quantised_has_the_same_codes_norms_and_damage(both: str, only: str):
    beside, alone = ac.open(both), ac.open(only)
    assert (alone.sites, alone.quantised) == ([], beside.quantised)
    for site, kinds in beside.quantised.items():
        for kind in kinds:
            for name in (f"{site}.{kind}", f"{site}.{kind}.scale"):
                assert beside[name].compute().tobytes() == alone[name].compute().tobytes()
            assert beside.damage(site, kind) == alone.damage(site, kind)
        assert np.array_equal(beside.norm[site], alone.norm[site]), "of the values before quantising"
        for moment in ("mean", "variance"):
            assert np.array_equal(beside.statistics[site][moment], alone.statistics[site][moment])
    assert not [path for site in beside.sites for path in [Path(only) / site] if path.exists()]
    replay = alone.provenance.replay
    assert replay.status == "replayed"
    assert 1e-4 < replay.largest_relative_error < replay.tolerance < 0.05
    assert ac.verify(only, full=True).ok


def test_quantised_values_are_never_given_silently(only: str, both: str, built: str):
    ds = ac.open(only)
    site = next(iter(ds.quantised))
    for ask in (
        lambda: ds[site],
        lambda: ds.site(site),
        lambda: ds.site(site, "stored"),
        lambda: ds.rows(site, 0, 1),
        lambda: ds.resid,
        lambda: ac.lens.logit(ds),
    ):
        with pytest.raises(ac.NotFound, match=r"quantised form alone \(int8, fp8\); ds\.site\('blocks.*dtype='int8'"):
            ask()
    assert site not in ds
    with pytest.raises(ac.NotFound, match="not stored as 'int8'; there is no quantised form"):
        ac.open(built).site(site, dtype="int8")
    with pytest.raises(ac.NotFound, match=r"no site 'absent'; there is blocks.*ds\.quantised"):
        ds.site("absent", dtype="int8")
    with pytest.raises(ac.InvalidInput, match="int4"):
        ds.site(site, dtype="int4")
    assert np.array_equal(ac.open(both)[site].compute(), ac.open(built)[site].compute())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_of_a_form_that_is_asked_for(only: str, both: str, kind):
    beside, alone = ac.open(both), ac.open(only)
    site = beside.sites[2]
    for ds in (beside, alone, ac.open([only, only]), alone.where(position__gt=0)):
        values = ds.site(site, dtype=kind).compute()
        for batch in ds.batches(site, 100, dtype=kind, columns="token_id"):
            at = np.searchsorted(ds.index.tokens(0, ds.n_tokens), batch["token"])
            assert np.array_equal(batch[site], values[at])
            assert batch[site].dtype == np.float32
        (moved,) = ds.batches(site, 10_000, dtype=kind, normalise="center")
        np.testing.assert_allclose(moved[site], values - ds.statistics[site]["mean"].astype(np.float32), atol=1e-5)
    for pattern in ("resid", "all", "blocks.1.*", [site]):
        chosen = [list(batch) for batch in beside.batches(pattern, 10_000)]
        assert [list(batch) for batch in alone.batches(pattern, 10_000, dtype=kind)] == chosen
    state = alone.batches(site, dtype=kind).state_dict()
    beside.batches(site, dtype=kind)
    with pytest.raises(ac.InvalidInput, match="the state is of the stored values"):
        beside.batches(site).load_state_dict(state)
    assert np.array_equal(
        alone.sequences(site, 32, dtype=kind).compute(), beside.sequences(site, 32, dtype=kind).compute()
    )
    assert not np.array_equal(alone.sequences(site, 32, kind).compute(), beside.sequences(site, 32).compute())


def test_torch_trains_on_a_form_that_is_asked_for(only: str):
    ds = ac.open(only)
    site = next(iter(ds.quantised))
    whole = ds.site(site, dtype="int8").compute()
    for batch in ds.torch(site, 100, shuffle=0, dtype="int8"):
        assert np.array_equal(batch[site].numpy(), whole[batch["token"].numpy()])
    source = ds.activations(site, 100, dtype="fp8")
    assert next(source).shape == (100, source.d_in)
    assert source.config["dtype"] == "fp8"


def test_batches_say_which_form_there_is(only: str, both: str, built: str):
    ds = ac.open(only)
    site = next(iter(ds.quantised))
    for sites in (site, "resid", "blocks.1.*", [site, "resid"]):
        with pytest.raises(ac.NotFound, match=r"quantised form alone \(int8, fp8\).*dtype='int8' of batches"):
            ds.batches(sites)
        with pytest.raises(ac.NotFound, match="not stored as 'int8'; there is no quantised form"):
            ac.open(built).batches(sites, dtype="int8")
    for url, dtype in itertools.product((only, both, built), ("float32", "int8")):
        with pytest.raises(ac.NotFound, match="no site 'absent'"):
            ac.open(url).batches("absent", dtype=dtype)
    with pytest.raises(ac.NotFound, match="no site 'absent'"):
        ac.open(both).batches(["resid", "absent"], dtype="int8")
    with pytest.raises(ac.InvalidInput, match="'int4'"):
        ac.open(both).batches(site, dtype="int4")
    with pytest.raises(ac.NotFound, match="quantised form alone"):
        ds.sequences(site, 32)


def test_the_lens_reads_a_form_when_asked(only: str, both: str):
    exact = ac.lens.logit(ac.open(both))
    for kind in KINDS:
        found = ac.lens.logit(ac.open(only), quantised=kind)
        np.testing.assert_allclose(found["loss"], exact["loss"], atol=0.02)
        assert not np.array_equal(found["loss"], exact["loss"])
    shown = CliRunner().invoke(main, ["lens", "logit", only, "--quantized", "fp8"])
    assert shown.exit_code == 0, shown.output
    assert "blocks.2.hook_resid_post" in shown.output
    refused = CliRunner().invoke(main, ["lens", "logit", only])
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1)


def test_the_divergence_is_that_of_the_models_own_head(both: str, model: Path):
    """Of the sampled tokens of every block, by torch and in float64."""
    ds = ac.open(both)
    plain = AutoModelForCausalLM.from_pretrained(model).double().eval()
    tokens = np.concatenate([sample(low, min(low + 160, ds.n_tokens)) for low in range(0, ds.n_tokens, 160)])

    def logs(rows: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(plain.lm_head(plain.transformer.ln_f(torch.from_numpy(rows).double())), dim=-1)

    for site in ds.sites:
        for kind in KINDS:
            damage = ds.damage(site, kind)
            if "hook_resid" not in site:
                assert (damage.kl, damage.kl_tokens) == (None, 0)
                assert damage.kl_note == "not measured: no state of the residual stream"
                continue
            p, q = (logs(array.compute()[tokens]) for array in (ds[site], ds.site(site, kind)))
            kl = (p.exp() * (p - q)).sum(dim=-1)
            assert damage.kl_tokens == len(tokens)
            np.testing.assert_allclose(damage.kl, kl.mean().item(), rtol=0.02, atol=1e-9)
            np.testing.assert_allclose(damage.largest_kl, kl.max().item(), rtol=0.05, atol=1e-8)
    assert ds.damage("blocks.1.hook_resid_post", "int8").kl < ds.damage("blocks.1.hook_resid_post", "fp8").kl


def test_info_tells_the_damage(both: str, only: str, asked: ac.Spec, tmp_path: Path):
    ac.build(asked.model_copy(update={"head": False, "sites": "resid", "quantize": ("fp8",)}), tmp_path / "headless")
    for url, note in ((both, "no state of the residual stream"), (tmp_path / "headless", "not measured: no head")):
        shown = CliRunner().invoke(main, ["info", str(url)]).output
        assert "worst relative error 0.0" in shown
        assert note in shown
        assert "median token" in shown
    assert "in quantised form alone" in CliRunner().invoke(main, ["info", only]).output
    document = json.loads(CliRunner().invoke(main, ["info", "--json", only]).output)
    assert document["dtype"] == "int8, fp8"
    found = document["quantised"]["blocks.0.hook_resid_pre"]["int8"]
    assert found["relative_error"] < 0.02
    listed = CliRunner().invoke(main, ["ls", str(Path(only).parent)]).output
    assert "int8, fp8" in listed


def test_a_resumed_build_ends_in_the_same_bytes_and_figures(both: str, only: str, asked: ac.Spec, tmp_path: Path):
    for url in (both, only):
        half = Path(shutil.copytree(url, tmp_path / Path(url).name))
        (half / "zarr.json").unlink()
        (half / ".actcache/receipts/000002.json").unlink()
        site = "blocks.1.hook_mlp_out"
        (half / f"{site}.int8/c/2/0").unlink()
        (half / f"{site}.fp8.scale/c/2/0").unlink()
        (half / ".actcache/statistics/000002.f64").unlink()
        again = ac.build(asked.model_copy(update={"only_quantized": url == only}), half)
        assert (again.blocks_run, again.manifest) == (1, ac.open(url).manifest)
        assert ac.open(half).damage(site, "fp8") == ac.open(url).damage(site, "fp8")


def test_killed_builds_end_in_the_same_bytes_and_figures(tmp_path: Path):
    update = {"quantize": ("int8", "fp8"), "only_quantized": True, "outputs": ("entropy", "topk=3")}
    spec = small_spec(tmp_path).model_copy(update=update)
    whole = run(spec, str(tmp_path / "whole"))
    assert whole.error is None, whole.error
    for share in (0.3, 0.5, 0.7, 0.9):
        url = str(tmp_path / f"killed-{share}")
        assert run(spec, url, Fault("after", int(share * whole.operations))).killed
        assert run(spec, url).result.manifest == whole.result.manifest
        site = "blocks.1.hook_resid_post"
        assert ac.open(url).damage(site, "int8") == ac.open(tmp_path / "whole").damage(site, "int8")


def test_quantised_values_travel_to_other_processes(both: str):
    ds = ac.open(both)
    lazy = pickle.loads(pickle.dumps(ds.site(ds.sites[1], dtype="fp8")))
    assert np.array_equal(lazy.compute(), ds.site(ds.sites[1], dtype="fp8").compute())
    assert lazy.name != ds.site(ds.sites[1], dtype="int8").name


def test_a_wrong_quantised_shard_is_noticed_by_the_replay(only: str, asked: ac.Spec, tmp_path: Path):
    half = Path(shutil.copytree(only, tmp_path / "half"))
    (half / "zarr.json").unlink()
    ds = ac.open(only)
    name = "blocks.1.hook_resid_post.fp8.scale"
    layout = ds._root.layouts[name]
    with ThreadPoolExecutor(1) as pool:
        for block in range(layout.n_shards):
            rows = ds.rows(name, *layout.shard_range(block)) * np.float32(1.125)
            (half / layout.shard_key(block)).write_bytes(encode_shard(layout, rows, pool))
    with pytest.raises(ac.ProofFailed, match=r"blocks\.1\.hook_resid_post\.fp8, sequence .* replay differs"):
        ac.build(asked.model_copy(update={"only_quantized": True}), half)


def test_a_receipt_without_its_record_is_noticed_by_the_seal(only: str, asked: ac.Spec, tmp_path: Path):
    half = Path(shutil.copytree(only, tmp_path / "half"))
    (half / "zarr.json").unlink()
    path = half / ".actcache/receipts/000001.json"
    receipt = json.loads(path.read_bytes())
    del receipt["quantised"]["blocks.0.hook_resid_pre.int8"]
    path.write_text(json.dumps(receipt))
    with pytest.raises(ac.Corrupt, match=r"hook_resid_pre\.int8.*no record"):
        ac.build(asked.model_copy(update={"only_quantized": True}), half)


def test_a_narrow_model_with_massive_activations(tmp_path: Path, corpus: str):
    """bfloat16, a width that no group divides, and first tokens with a dimension thousands of times as large."""
    folder = save_gpt2(tmp_path / "model", width=44, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 7] = 5000
        model.transformer.wpe.weight[0, 40] = -3000
    model.save_pretrained(folder)
    spec = ac.Spec(model=str(folder), corpus=(corpus,), block_tokens=160, quantize="fp8 int8", only_quantized=True)
    ac.build(spec, tmp_path / "ds")
    ac.build(spec.model_copy(update={"only_quantized": False, "dtype": "float16"}), tmp_path / "exact")
    ds, exact = ac.open(tmp_path / "ds"), ac.open(tmp_path / "exact")
    site = "blocks.2.hook_resid_post"
    assert ds._root.layouts[f"{site}.int8.scale"].shape == (ds.n_tokens, 2)
    first = ds.tokens["position"] == 0
    for kind in KINDS:
        assert np.array_equal(ds.site(site, kind).compute(), exact.site(site, kind).compute()), (
            "of what was computed, whatever the exact arrays are narrowed to"
        )
        damage = ds.damage(site, kind)
        assert damage.largest_token_error <= error_bound(kind, 32) * 1.001
        x, q = exact[site].compute().astype(float)[~first], ds.site(site, kind).compute()[~first]
        assert np.linalg.norm(x - q) / np.linalg.norm(x) < error_bound(kind, 32), "other tokens have their own scales"


def test_quantising_does_not_overflow_where_float16_would(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model", scale=1e7)
    ac.build(ac.Spec(model=str(folder), corpus=(corpus,), quantize="int8", only_quantized=True), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    site = "blocks.0.hook_resid_pre"
    assert np.abs(ds.site(site, "int8").compute()).max() > 1e5
    assert ds.damage(site, "int8").relative_error < error_bound("int8", 32)


def test_zero_activations(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    spec = ac.Spec(model=str(folder), corpus=(corpus,), block_tokens=100, quantize="int8,fp8", only_quantized=True)
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    for site, kinds in ds.quantised.items():
        for kind in kinds:
            assert not ds.site(site, kind).compute().any()
            damage = ds.damage(site, kind)
            assert (damage.relative_error, damage.median_token_error, damage.largest_token_error) == (0, 0, 0)
            assert damage.kl == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_computes_nan_stops_with_the_place(tmp_path: Path, corpus: str, dtype: str):
    from actcache.jobs import blocks

    def wrong(parts, inputs, sites, sink, whole):
        def spoilt(site, tensor):
            tensor[0, 0, 5] = torch.inf
            sink(site, tensor)

        return right(parts, inputs, sites, spoilt, whole)

    right = blocks.run
    folder = save_gpt2(tmp_path / "model", dtype=getattr(torch, dtype))
    spec = ac.Spec(model=str(folder), corpus=(corpus,), sites="resid", quantize="int8,fp8", only_quantized=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "run", wrong)
        with pytest.raises(ac.OutOfRange, match=r"blocks\.0\.hook_resid_pre, token 0, dimension 5"):
            ac.build(spec, tmp_path / "ds")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"only_quantized": True}, "--only-quantized leaves out the exact arrays: say with --quantize"),
        ({"only_quantized": True, "quantize": "int8", "dtype": "float16"}, "--only-quantized stores none"),
        ({"quantize": "int4"}, "quantize: .*'int4' is not one of int8, fp8"),
        ({"quantize": (8,)}, "quantize: .*8 is not one of"),
    ],
)
def test_what_cannot_be_asked_for(spec: ac.Spec, tmp_path: Path, fields: dict, says: str):
    with pytest.raises(ac.InvalidInput, match=says) as caught:
        ac.build(ac.Spec(model=spec.model, corpus=spec.corpus, **fields), tmp_path / "ds")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ds").exists()


def test_specs_of_before_keep_their_key(built: str, both: str):
    plan = json.loads((Path(built) / ".actcache/plan.json").read_bytes())
    assert "quantize" not in plan["spec"]
    assert ResolvedSpec.model_validate(plan["spec"]).key() == plan["key"]
    assert "quantised" not in json.loads((Path(built) / ".actcache/receipts/000000.json").read_bytes())
    asked = json.loads((Path(both) / ".actcache/plan.json").read_bytes())
    assert asked["spec"]["quantize"] == {"kinds": ["int8", "fp8"], "group": 32, "only": False}
    assert ResolvedSpec.model_validate(asked["spec"]).key() == asked["key"]


def test_another_form_is_another_spec(both: str, asked: ac.Spec, tmp_path: Path):
    with pytest.raises(ac.SpecMismatch, match=r"quantize\.only: False here, True asked for"):
        ac.build(asked.model_copy(update={"only_quantized": True}), both)


def test_words_in_any_form():
    assert parse_kinds("fp8,int8") == parse_kinds(["int8", "fp8 int8"]) == ("int8", "fp8")
    assert parse_kinds(()) == ()


CODES, SCALES = "blocks.0.hook_resid_pre.int8", "blocks.0.hook_resid_pre.int8.scale"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda a, m: a["arrays"][CODES].update(group=0), "groups of 0"),
        (lambda a, m: a["arrays"][CODES].update(group=-32), "groups of -32"),
        (lambda a, m: a["arrays"][CODES].update(group=1 << 40), "groups of"),
        (lambda a, m: a["arrays"][CODES].update(group=16), r"scale.* is float32 .*, not float32"),
        (lambda a, m: a["arrays"][CODES].pop("group"), "groups of None"),
        (lambda a, m: a["arrays"][CODES].update(of="elsewhere"), "no site of its name"),
        (lambda a, m: a["arrays"][CODES].update(of="blocks.1.hook_mlp_out"), "no site of its name"),
        (lambda a, m: a["arrays"][CODES].update(scale="absent"), "'absent' is missing"),
        (lambda a, m: a["arrays"].pop(SCALES), "is missing"),
        (lambda a, m: a["arrays"][CODES].update(scale="token_id"), "'token_id' is int32"),
        (lambda a, m: m[CODES].update(data_type="uint8"), "uint8 .* not int8"),
        (lambda a, m: m.update({CODES: m[SCALES]}), "is float32"),
        (lambda a, m: m.update({SCALES: m[CODES]}), "is int8"),
        (lambda a, m: m.update({SCALES: m["token_id"]}), "is int32"),
    ],
)
@pytest.mark.parametrize("which", ["both", "only"])
def test_a_strangers_quantised_arrays_that_do_not_fit_are_refused(which: str, edit, says, request):
    with pytest.raises(Corrupt, match=says):
        parse_root(change(request.getfixturevalue(which), edit), "root")


def test_a_strangers_site_in_no_form_and_a_later_kind(only: str):
    def gone(attributes, members):
        for kind in KINDS:
            attributes["arrays"].pop(f"blocks.0.hook_resid_pre.{kind}")

    with pytest.raises(Corrupt, match="stored in no form"):
        parse_root(change(only, gone), "root")

    def later(attributes, members):
        attributes["arrays"][CODES].update(kind="int4", group=None, scale=None)

    assert parse_root(change(only, later), "root")


def test_the_command_line_takes_commas_and_repeats(model: Path, corpus: str, tmp_path: Path):
    args = ["build", str(tmp_path / "ds"), "--model", str(model), "--corpus", corpus, "--max-tokens", "40"]
    done = CliRunner().invoke(main, [*args, "--quantize", "fp8", "--quantize", "int8,fp8", "--only-quantized"])
    assert done.exit_code == 0, done.output
    assert "40 tokens × 4 sites" in done.output
    assert ac.open(tmp_path / "ds").provenance.spec.quantize.only
    toml = tmp_path / "spec.toml"
    toml.write_text(
        f'model = "{model}"\ncorpus = "{corpus}"\nmax_tokens = 40\nquantize = ["int8", "fp8"]\nonly_quantized = true\n'
    )
    again = CliRunner().invoke(main, ["build", str(toml), str(tmp_path / "ds")])
    assert "nothing to do" in again.output
