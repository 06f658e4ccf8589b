"""Site patterns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.schemas.errors import InvalidInput
from actcache.schemas.sites import all_sites, expand, expand_braces, residual_stream


@given(st.integers(1, 40))
def test_resid_is_the_whole_stream_and_none_twice(layers: int):
    sites = expand("resid", all_sites(layers), layers)
    assert sites == residual_stream(layers)
    assert len(set(sites)) == layers + 1
    assert sites[0] == "blocks.0.hook_resid_pre"
    assert sites[-1] == f"blocks.{layers - 1}.hook_resid_post"


@given(st.integers(1, 12), st.data())
def test_any_choice_comes_in_model_order_and_once(layers: int, data: st.DataObject):
    available = all_sites(layers)
    wanted = data.draw(st.lists(st.sampled_from(available), min_size=1))
    assert expand(" ".join(wanted), available, layers) == [site for site in available if site in wanted]
    assert expand(wanted, available, layers) == expand(" ".join(wanted), available, layers)


def test_patterns():
    available = all_sites(12)
    assert expand("blocks.{0,6,11}.hook_resid_post", available, 12) == [
        f"blocks.{i}.hook_resid_post" for i in (0, 6, 11)
    ]
    assert len(expand("blocks.*.hook_attn_out", available, 12)) == 12
    assert expand("all", available, 12) == available
    assert expand("blocks.3.hook_resid_pre", available, 12) == ["blocks.2.hook_resid_post"]
    assert expand_braces("a.{1,2}.{x,y}") == ["a.1.x", "a.1.y", "a.2.x", "a.2.y"]


@pytest.mark.parametrize("pattern", ["blocks.12.hook_resid_post", "hook_resid", "blocks.{13,14}.hook_mlp_out"])
def test_a_pattern_that_matches_nothing_lists_what_there_is(pattern: str):
    with pytest.raises(InvalidInput, match=r"12 layers has: blocks\.0\.hook_resid_pre"):
        expand(pattern, all_sites(12), 12)


def test_no_pattern_at_all():
    with pytest.raises(InvalidInput, match="no sites"):
        expand("  ", all_sites(2), 2)
