"""Site patterns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.schemas.errors import InvalidInput
from actcache.schemas.sites import expand, expand_braces, residual_stream

KINDS = ("hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


def all_sites(layers: int) -> list[str]:
    """The sites of a model whose blocks are attention, then MLP."""
    blocks = [f"blocks.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    return ["blocks.0.hook_resid_pre", *blocks, "ln_final.hook_normalized"]


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
    with pytest.raises(InvalidInput, match=r"12 layers has blocks\.0\.hook_resid_pre, blocks\.\{0…11\}\.hook_attn_out"):
        expand(pattern, all_sites(12), 12)


def test_no_pattern_at_all():
    with pytest.raises(InvalidInput, match="no sites"):
        expand("  ", all_sites(2), 2)


def test_a_kind_that_some_blocks_lack_is_named_by_layer():
    available = [name for name in all_sites(6) if name not in ("blocks.1.hook_resid_mid", "blocks.4.hook_resid_mid")]
    assert expand("blocks.*.hook_resid_mid", available, 6) == [f"blocks.{i}.hook_resid_mid" for i in (0, 2, 3, 5)]
    with pytest.raises(InvalidInput, match=r"blocks\.\{0,2,3,5\}\.hook_resid_mid"):
        expand("blocks.4.hook_resid_mid", available, 6)


def test_each_alternative_must_match():
    with pytest.raises(InvalidInput, match=r"no site matches 'blocks\.9\.hook_mlp_out'"):
        expand("blocks.{0,9}.hook_mlp_out", all_sites(6), 6)


def test_modules_are_chosen_by_their_prefix_alone():
    modules = [f"module:h.{i}.mlp.{part}" for i in range(3) for part in ("c_fc", "act")]
    available = all_sites(3)
    assert expand("all", available, 3, modules) == available
    assert expand("module:h.*.mlp.act resid", available, 3, modules) == [
        *residual_stream(3),
        *(f"module:h.{i}.mlp.act" for i in range(3)),
    ]
    with pytest.raises(InvalidInput, match=r"close: module:h\.1\.mlp\.act"):
        expand("module:h.1.mlp.acts", available, 3, modules)


def test_sites_of_several_builds_stand_in_model_order():
    from actcache.schemas.order import model_order

    first = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.10.hook_resid_post"]
    second = ["blocks.0.hook_attn_out", "blocks.2.hook_mlp_out", "ln_final.hook_normalized", "module:a"]
    third = ["blocks.0.hook_mlp_out", "blocks.1.hook_later", "later", "blocks.10.hook_resid_mid"]
    assert model_order([first]) == first
    assert model_order([first, second, third]) == [
        "blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post",
        "blocks.1.hook_later", "later", "blocks.2.hook_mlp_out", "blocks.10.hook_resid_mid", "blocks.10.hook_resid_post",
        "ln_final.hook_normalized", "module:a",
    ]  # fmt: skip
    odd = ["x", "blocks.3.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.99999999999999999999.y"]
    assert model_order([odd]) == odd
    assert model_order([odd, ["blocks.2.hook_mlp_out"]])[:2] == ["x", "blocks.2.hook_mlp_out"]
