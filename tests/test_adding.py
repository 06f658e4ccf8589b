"""Added builds: more sites for the tokens of a sealed dataset, which stays whole and readable all the while."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import actcache as ac
from actcache.cache.store import open_store
from actcache.clients.cli import main

MORE = "blocks.*.hook_attn_out ln_final.*"
ADDED = [f"blocks.{layer}.hook_attn_out" for layer in range(3)] + ["ln_final.hook_normalized"]


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def first(spec: ac.Spec) -> ac.Spec:
    """What the first build stores: the residual stream, and no loss."""
    return spec.model_copy(update={"sites": "resid", "outputs": ()})


@pytest.fixture(scope="module")
def more(model: Path) -> ac.Spec:
    """What an added build needs to be told: the model."""
    return ac.Spec(model=str(model))


@pytest.fixture(scope="module")
def sealed(first: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("first") / "ds"
    ac.build(first, url)
    return url


@pytest.fixture(scope="module")
def grown(sealed: Path, more: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two generations. Tests must not change it."""
    url = Path(shutil.copytree(sealed, tmp_path_factory.mktemp("grown") / "ds"))
    ac.build(more, url, add_sites=MORE)
    return url


@pytest.fixture
def ds(sealed: Path, tmp_path: Path) -> Path:
    """A dataset of one generation, of this test's own."""
    return Path(shutil.copytree(sealed, tmp_path / "ds"))


def check_whole(url: str | Path) -> None:
    report = ac.verify(url, full=True)
    assert (report.problems, report.unexpected, report.unfinished) == ([], [], [])


def test_only_quantized_without_a_kind_is_refused_as_in_a_first_build(ds: Path, more: ac.Spec):
    with pytest.raises(ac.InvalidInput, match="--only-quantized leaves out the exact arrays: say with --quantize"):
        ac.build(more.model_copy(update={"only_quantized": True}), ds, add_sites=MORE)
    check_whole(ds)


def test_added_sites_are_what_one_build_of_all_sites_stores(sealed: Path, grown: Path, built: str):
    """Bit for bit, to the bytes of the shards; and nothing of the first build has changed but the root."""
    old, new, whole = ac.open(sealed), ac.open(grown), ac.open(built)
    assert new.sites == [site for site in whole.sites if site in {*old.sites, *ADDED}]
    for site in ADDED:
        for path in (Path(built) / site).rglob("*"):
            if path.is_file():
                assert (grown / site / path.relative_to(Path(built) / site)).read_bytes() == path.read_bytes()
        assert np.array_equal(new.norm[site], whole.norm[site])
        assert np.array_equal(new.statistics[site]["variance"], whole.statistics[site]["variance"])
    for path in sealed.rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            assert (grown / path.relative_to(sealed)).read_bytes() == path.read_bytes()
    assert (new.key, new.manifest, new.provenance) == (old.key, old.manifest, old.provenance)
    assert old.resid.name == new.resid.name or old[old.sites[0]].name != new[old.sites[0]].name
    check_whole(grown)


def test_a_grown_dataset_as_its_users_see_it(grown: Path, first: ac.Spec):
    ds = ac.open(grown)
    assert [generation.sites for generation in ds.generations] == [tuple(ds.residual_sites), tuple(ADDED)]
    assert ds.generations[1].provenance.replay.status == "replayed"
    assert len(ds.generations[1].provenance.environments) == 1
    assert (ds.dtype, set(ds.dtypes)) == ("float32", set(ds.sites))
    assert set(ds.norm) == set(ds.statistics) == set(ds.sites)
    for site in ADDED:
        rows = ds[site].compute().astype(float)
        np.testing.assert_allclose(ds.norm[site], np.linalg.norm(rows, axis=1), rtol=1e-6)
        np.testing.assert_allclose(ds.statistics[site]["mean"], rows.mean(axis=0), rtol=1e-10, atol=1e-12)
        assert np.array_equal(ds.zarr[site][...], rows)
    assert ds.zarr["norm/1"].attrs["sites"] == ADDED
    assert ac.lens.logit(ds)["loss"].shape == (4,)
    names = ["norm/1", ".actcache/roots", f".actcache/{ds.generations[1].key}"]
    assert all((grown / name).is_dir() for name in names)
    left = {path.name for path in (grown / ".actcache").rglob("*") if path.is_dir()}
    assert left == {"receipts", "statistics", "tokenizer", "roots", ds.generations[1].key}
    assert (grown / "zarr.json").read_bytes() == (grown / ".actcache/roots/000002.json").read_bytes()
    again = ac.build(first, grown)
    assert (again.state, again.key, len(again.sites)) == ("already sealed", ds.key, 8)


def test_old_arrays_keep_their_names_in_dask_when_a_dataset_grows(ds: Path, more: ac.Spec):
    before = ac.open(ds)
    ac.build(more, ds, add_sites="blocks.0.hook_mlp_out")
    after = ac.open(ds)
    assert before[before.sites[0]].name == after[before.sites[0]].name
    assert before.sites == [site for site in after.sites if site != "blocks.0.hook_mlp_out"]
    assert "blocks.0.hook_mlp_out" not in before


def test_what_is_there_is_not_built_again(ds: Path, more: ac.Spec):
    assert ac.build(more, ds, add_sites="resid").state == "already sealed"
    assert not (ds / ".actcache/roots").exists()
    from tests.test_build import Listener

    listener = Listener()
    result = ac.build(more, ds, add_sites=["resid", "blocks.1.hook_mlp_out"], reporter=listener)
    assert (result.state, result.added, result.blocks_run) == ("built", ("blocks.1.hook_mlp_out",), 5)
    assert any("4 of the 5 sites are there already" in note for note in listener.notes)
    assert len(result.sites) == 5
    again = ac.build(more, ds, add_sites=["resid", "blocks.1.hook_mlp_out"])
    assert (again.state, again.manifest, again.key) == ("already sealed", result.manifest, result.key)
    assert again.added == ()
    check_whole(ds)


def test_a_third_and_a_fourth_generation(ds: Path, more: ac.Spec):
    for number, layer in enumerate((2, 0, 1), 2):
        assert ac.build(more, ds, add_sites=f"blocks.{layer}.hook_mlp_out").state == "built"
        assert len(ac.open(ds).generations) == number
        check_whole(ds)
    found = [site for site in ac.open(ds).sites if "mlp" in site]
    assert found == [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    assert sorted(path.name for path in (ds / ".actcache/roots").iterdir()) == [f"00000{n}.json" for n in (2, 3, 4)]


def test_an_added_build_may_be_of_another_dtype_and_cut(ds: Path, more: ac.Spec):
    other = more.model_copy(update={"dtype": "bfloat16", "block_tokens": 100, "batch_size": 3})
    assert ac.build(other, ds, add_sites="blocks.0.hook_mlp_out").state == "built"
    found = ac.open(ds)
    assert (found.dtype, found.dtypes["blocks.0.hook_mlp_out"]) == ("float32, bfloat16", "bfloat16")
    assert found["blocks.0.hook_mlp_out"].chunks[0][0] == 100
    assert found.generations[1].provenance.spec.execution.batch_size == 3
    assert found.generations[1].provenance.spec.layout.chunk_tokens == 100
    rows = found["blocks.0.hook_mlp_out"].compute().astype(float)
    np.testing.assert_allclose(found.norm["blocks.0.hook_mlp_out"], np.linalg.norm(rows, axis=1), rtol=1e-6)
    assert ac.catalog(ds.parent)[0].dtype == "float32, bfloat16"
    assert "float32, bfloat16" in repr(found)
    check_whole(ds)
    assert ac.build(other, ds, add_sites="blocks.0.hook_mlp_out").state == "already sealed"
    with pytest.raises(ac.SpecMismatch, match="stored_dtype: bfloat16 here, float16 asked for"):
        ac.build(more.model_copy(update={"dtype": "float16"}), ds, add_sites="blocks.0.hook_mlp_out")


def test_outputs_that_are_missing_are_added_with_sites(ds: Path, more: ac.Spec, built: str):
    with_loss = more.model_copy(update={"outputs": ("loss",)})
    with pytest.raises(ac.InvalidInput, match="loss can be added with a site that it lacks"):
        ac.build(with_loss, ds, add_sites="resid")
    ac.build(with_loss, ds, add_sites="blocks.0.hook_mlp_out")
    found = ac.open(ds)
    assert np.array_equal(found["loss"].compute(), ac.open(built)["loss"].compute(), equal_nan=True)
    assert "loss, head" in repr(found)
    ac.build(with_loss, ds, add_sites="blocks.1.hook_mlp_out")
    assert ac.open(ds).generations[2].provenance.spec.outputs == ()
    check_whole(ds)


def test_a_residual_stream_stored_in_two_builds_of_two_dtypes_is_one(first: ac.Spec, more: ac.Spec, sealed: Path):
    url = "memory://two"
    ac.build(first.model_copy(update={"sites": "blocks.{0,2}.hook_resid_post"}), url)
    with pytest.raises(ac.NotFound, match="needs every residual state"):
        _ = ac.open(url).resid
    ac.build(more.model_copy(update={"dtype": "bfloat16"}), url, add_sites="resid")
    found, whole = ac.open(url), ac.open(sealed)
    assert found.sites == whole.sites
    assert [found.dtypes[site] for site in found.sites] == ["bfloat16", "float32", "bfloat16", "float32"]
    np.testing.assert_allclose(found.resid.compute(), whole.resid.compute(), rtol=2**-8)
    np.testing.assert_allclose(ac.lens.logit(found)["loss"], ac.lens.logit(whole)["loss"], rtol=0.05)
    check_whole(url)


def test_modules_of_another_width_can_be_added(ds: Path, more: ac.Spec):
    module = "module:transformer.h.1.mlp.c_fc"
    result = ac.build(more, ds, add_sites=["blocks.0.hook_mlp_out", module])
    assert (result.added, result.sites[-1]) == (("blocks.0.hook_mlp_out", module), module)
    found = ac.open(ds)
    assert found[module].shape == (found.n_tokens, 4 * found.d_model)
    rows = found[module].compute().astype(float)
    np.testing.assert_allclose(found.norm[module], np.linalg.norm(rows, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.statistics[module]["mean"], rows.mean(axis=0), rtol=1e-10, atol=1e-12)
    ac.build(more, ds, add_sites="ln_final.*")
    assert ac.open(ds).sites[-2:] == ["ln_final.hook_normalized", module]
    check_whole(ds)


def test_an_added_build_may_quantise(ds: Path, more: ac.Spec, built: str):
    """With what that costs, measured by the dataset's own head."""
    other = more.model_copy(update={"quantize": ("int8",), "only_quantized": True, "outputs": ("topk=3",)})
    ac.build(other, ds, add_sites="blocks.1.hook_resid_mid")
    found = ac.open(ds)
    assert found.quantised == {"blocks.1.hook_resid_mid": ("int8",)}
    assert len(found.generations[1].provenance.replay.sequences) == 4
    assert found.damage("blocks.1.hook_resid_mid", "int8").kl is not None
    whole = ac.open(built)["blocks.1.hook_resid_mid"].compute()
    values = found.site("blocks.1.hook_resid_mid", "int8").compute()
    assert np.linalg.norm(values - whole) / np.linalg.norm(whole) < 0.02
    check_whole(ds)
    assert ac.build(other, ds, add_sites="blocks.1.hook_resid_mid").state == "already sealed"
    with pytest.raises(ac.SpecMismatch, match=r"holds topk.* already.*outputs: topk=3 here, topk=5 asked for"):
        ac.build(more.model_copy(update={"outputs": ("topk=5",)}), ds, add_sites="blocks.1.hook_mlp_out")


def test_a_dataset_without_a_head_gets_none(first: ac.Spec, more: ac.Spec, tmp_path: Path):
    ac.build(first.model_copy(update={"head": False}), tmp_path / "ds")
    ac.build(more, tmp_path / "ds", add_sites="blocks.0.hook_mlp_out")
    with pytest.raises(ac.NotFound, match="without a head"):
        _ = ac.open(tmp_path / "ds").head
    assert not (tmp_path / "ds/head").exists()


def test_the_whole_first_command_with_add_sites_is_checked_against_the_tokens(ds: Path, spec: ac.Spec, tmp_path: Path):
    (tmp_path / "other.txt").write_text("other")
    before = open_store(ds).list()
    for change, says in (
        ({"corpus": (str(tmp_path / "other.txt"),)}, "corpus.content: .* asked for"),
        ({"context": 16}, "context: 32 here, 16 asked for"),
        ({"max_tokens": 9}, "max_tokens: None here, 9 asked for"),
    ):
        with pytest.raises(ac.SpecMismatch, match=says):
            ac.build(spec.model_copy(update=change), ds, add_sites=MORE)
    assert open_store(ds).list() == before
    assert ac.build(spec.model_copy(update={"outputs": ()}), ds, add_sites=MORE).added == tuple(ADDED)


def test_another_model_is_refused(ds: Path, tmp_path: Path):
    from tests.models import save_gpt2

    other = save_gpt2(tmp_path / "other", seed=9)
    with pytest.raises(ac.SpecMismatch, match=r"model\.weights: .* here, .* asked for"):
        ac.build(ac.Spec(model=str(other)), ds, add_sites=MORE)


def test_the_model_alone_is_needed_not_its_tokenizer(ds: Path, model: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare / name)
    assert ac.build(ac.Spec(model=str(bare)), ds, add_sites=MORE).state == "built"
    assert ac.open(ds).generations[1].provenance.labels.model == "bare"
    assert ac.open(ds).provenance.labels.model == "random-gpt2"


def test_places_where_nothing_can_be_added(first: ac.Spec, more: ac.Spec, ds: Path, tmp_path: Path):
    with pytest.raises(ac.NotFound, match="no dataset here"):
        ac.build(more, tmp_path / "absent", add_sites=MORE)
    assert not (tmp_path / "absent").exists()
    ac.build(first, tmp_path / "begun", stage="tokenise")
    with pytest.raises(ac.NotSealed, match="resume"):
        ac.build(more, tmp_path / "begun", add_sites=MORE)
    for patterns, says in (("blocks.9.*", "no site matches"), ([], "no sites asked for")):
        with pytest.raises(ac.InvalidInput, match=says):
            ac.build(more, ds, add_sites=patterns)
    with pytest.raises(ac.InvalidInput, match="leave --stage out"):
        ac.build(more, ds, add_sites=MORE, stage="tokenise")
    with pytest.raises(ac.InvalidInput, match="no corpus"):
        ac.build(more, tmp_path / "new")
    with pytest.raises(ac.SpecMismatch, match="give another URL or, for more sites, --add-sites"):
        ac.build(first.model_copy(update={"sites": "all"}), ds)


def test_the_command_line(ds: Path, model: Path):
    done = call("build", ds, "--model", model, "--add-sites", MORE)
    assert done.exit_code == 0, done.output
    assert "sealed: 777 tokens × 8 sites, 4 of them added" in done.output
    again = call("build", ds, "--model", model, "--add-sites", MORE, "--json")
    assert json.loads(again.stdout)["state"] == "already sealed"
    info = json.loads(call("info", ds, "--json").stdout)
    assert [part["sites"] for part in info["generations"]][1] == ADDED
    assert info["generations"][1]["manifest"] == json.loads(again.stdout)["manifest"]
    human = call("info", ds).output
    assert "added build 1: sites" in human
    assert info["generations"][1]["key"] in human
    assert "sealed  777 tokens  8 sites  float32  random-gpt2" in call("ls", ds.parent).output
    assert call("verify", "--full", ds).exit_code == 0
    for args, says in (
        (("--add-sites", MORE), "no model"),
        (("--add-sites", MORE, "--model", model, "--sites", "all"), "give --add-sites alone"),
    ):
        failed = call("build", ds, *args)
        assert failed.exit_code == 2
        assert says in failed.output


def test_nothing_to_add_needs_no_torch(grown: Path, model: Path):
    import subprocess
    import sys

    code = (
        "import sys, actcache as ac\n"
        f"assert ac.build(ac.Spec(model={str(model)!r}), {str(grown)!r}, add_sites={MORE!r}).state == 'already sealed'\n"
        "assert not {'torch', 'transformers', 'dask'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
