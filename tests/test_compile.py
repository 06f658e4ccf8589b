"""Builds whose blocks are compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import actcache as ac


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a processor with a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that are deprecated
def test_a_compiled_build_holds_the_same_states_and_replays(spec: ac.Spec, tmp_path: Path):
    plain = spec.model_copy(update={"sites": "resid", "max_tokens": 400, "batch_size": None})
    compiled = plain.model_copy(update={"compile": True})
    ac.build(plain, tmp_path / "plain")
    result = ac.build(compiled, tmp_path / "compiled")
    assert ac.build(compiled, tmp_path / "again").manifest == result.manifest, "no bit depends on the run"
    one, other = ac.open(tmp_path / "plain"), ac.open(tmp_path / "compiled")
    assert one.key != other.key
    for site in one.sites:
        assert abs(one.rows(site, 0, one.n_tokens) - other.rows(site, 0, one.n_tokens)).max() < 1e-4
    found = ac.replay(tmp_path / "compiled", model=spec.model)
    assert found.holds
    assert all(array.equal for array in found.arrays.values())


def test_sites_inside_blocks_are_refused(spec: ac.Spec, tmp_path: Path):
    asked = spec.model_copy(update={"sites": "resid blocks.*.hook_mlp_out", "compile": True})
    with pytest.raises(ac.InvalidInput, match=r"blocks\.0\.hook_mlp_out is read inside a block"):
        ac.build(asked, tmp_path / "ds")
    ac.build(spec.model_copy(update={"sites": "resid"}), tmp_path / "plain")
    with pytest.raises(ac.InvalidInput, match="leave it out with --add-sites"):
        ac.build(asked, tmp_path / "plain", add_sites="blocks.*.hook_mlp_out")
