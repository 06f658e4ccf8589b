"""Added builds: more sites for the tokens of a sealed dataset, which stays whole and readable all the while."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import actcache as ac
from actcache.cache.store import open_store
from actcache.clients.cli import main
from actcache.schemas.root_document import parse_root, root_bytes

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
