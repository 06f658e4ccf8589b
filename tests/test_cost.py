"""Prices and what follows from them: pure arithmetic, checked against what a bill would say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import actcache as ac
from actcache.jobs.cost import Quantities, break_even, cost, reading, tiered
from actcache.jobs.prices import Compute, Prices, Provider, Tier, load_prices

GIB, TIB = 1 << 30, 1 << 40
PRICES = load_prices()
S3, R2 = PRICES.provider("aws-s3"), PRICES.provider("cloudflare-r2")
SOURCES = {"as_of": "2026-01-01", "sources": ["https://example.org"]}
HOUR = Compute.model_validate({"devices": ["gpu"], "machine": "a machine", "hour": 2.0} | SOURCES)


def quantities(**fields: Any) -> Quantities:
    zero = dict.fromkeys(
        ("bytes_stored", "put_requests", "get_requests", "bytes_read", "build_seconds", "recompute_seconds"), 0
    )
    return Quantities(**(zero | fields))


def test_the_prices_that_come_with_the_package():
    assert PRICES.currency == "USD"
    assert PRICES.provider() is S3
    for entry in (*PRICES.providers.values(), *PRICES.compute):
        assert all(re.match(r"https://\S+$", source) for source in entry.sources)
        assert entry.as_of.year >= 2022
    names = {"NVIDIA H100 80GB HBM3": "p5.48", "NVIDIA H200": "p5en", "NVIDIA A100-SXM4-40GB": "p4d.", "cpu": "m7g"}
    for device, machine in names.items():
        found = PRICES.compute_of(device)
        assert found is not None
        assert machine in found.machine
    assert PRICES.compute_of("NVIDIA GeForce RTX 4090") is None


def test_bills_of_amazon_s3_by_hand():
    tb = 1024 * GIB
    found = cost(quantities(bytes_stored=100 * tb, put_requests=1_000_000), S3, None)
    assert found.storage_month == pytest.approx(50 * 1024 * 0.023 + 50 * 1024 * 0.022)
    assert found.build_requests == pytest.approx(5.0)
    assert (found.build_compute, found.recompute, found.break_even_in_region) == (None, None, None)
    read = cost(quantities(bytes_read=200 * tb, get_requests=1_000_000), S3, None)
    assert read.read_in_region == pytest.approx(0.4)
    assert read.read_over_internet == pytest.approx(0.4 + 1024 * (10 * 0.09 + 40 * 0.085 + 100 * 0.07 + 50 * 0.05))
    assert cost(quantities(bytes_stored=10**12, bytes_read=10**12), R2, None).storage_month == pytest.approx(15.0)
    assert cost(quantities(bytes_read=10**12), R2, None).read_over_internet == 0.0


def test_break_even_by_hand():
    """1 TiB at 0.023 a GiB; a pass on a device at 2 an hour for 10 hours; reading in the region is for nothing."""
    what = quantities(
        bytes_stored=TIB, bytes_read=TIB, put_requests=20_000, build_seconds=72_000, recompute_seconds=36_000
    )
    found = cost(what, S3, HOUR)
    storage = 1024 * 0.023
    assert (found.recompute, found.build_compute) == (pytest.approx(20.0), pytest.approx(40.0))
    assert found.break_even_in_region is not None
    assert found.break_even_in_region.passes_a_month == pytest.approx(storage / 20)
    assert found.break_even_in_region.passes_in_first_month == pytest.approx((storage + 0.1 + 40) / 20)
    assert found.break_even_over_internet is not None
    assert found.break_even_over_internet.passes_a_month is None  # 0.05 × 1024 > 20, even in the cheapest tier


@given(
    stored=st.integers(1, 10 * TIB),
    gets=st.integers(0, 10**6),
    read=st.integers(0, 10 * TIB),
    price=st.floats(0, 0.2),
    recompute=st.floats(0, 1000),
)
def test_with_one_price_the_formula_holds(stored: int, gets: int, read: int, price: float, recompute: float):
    one = S3.model_copy(update={"internet_gb": (Tier(up_to=None, price=price),)})
    what = quantities(bytes_stored=stored, get_requests=gets, bytes_read=read, recompute_seconds=recompute)
    found = cost(what, one, HOUR)
    assert found.recompute is not None
    assert found.break_even_over_internet is not None
    saved = found.recompute - found.read_over_internet
    assume(abs(saved) > 1e-9 * max(1, found.recompute))
    expected = found.storage_month / saved if saved > 0 else None
    assert found.break_even_over_internet.passes_a_month == (expected if expected is None else pytest.approx(expected))


@st.composite
def tiers(draw: st.DrawFn) -> tuple[Tier, ...]:
    """Tiers of any prices, rising ones too."""
    ends = sorted(draw(st.sets(st.integers(1, 500), max_size=4)))
    prices = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=len(ends) + 1, max_size=len(ends) + 1))
    return tuple(Tier(up_to=end, price=price) for end, price in zip([*ends, None], prices, strict=True))


@given(traffic=tiers(), fixed=st.integers(0, 300), recompute=st.integers(0, 40), gb=st.integers(0, 20))
def test_from_the_break_even_on_keeping_is_never_dearer(traffic: tuple[Tier, ...], fixed: int, recompute: int, gb: int):
    what = quantities(bytes_read=gb * GIB)
    passes = break_even(fixed, recompute, what, S3, traffic)

    def gained(passes: float) -> float:
        return passes * recompute - reading(passes, what, S3, traffic) - fixed

    if passes is None:
        assert gained(1e6) <= 1e-6  # far behind the last tier
        return
    assert all(gained(passes + more) >= -1e-6 for more in (0, 0.01, 0.5, 1, 3, 10, 100, 1e4))
    if passes > 0:
        assert gained(passes) == pytest.approx(0, abs=1e-6)
        assert gained(passes - min(passes, 1e-3)) < 1e-9


@given(traffic=tiers(), one=st.integers(0, 1000), other=st.integers(0, 1000))
def test_tiers_add_up(traffic: tuple[Tier, ...], one: int, other: int):
    def price_of(gb: int) -> float:
        return next(tier.price for tier in traffic if tier.up_to is None or gb < tier.up_to)

    assert tiered(one, traffic) == pytest.approx(sum(map(price_of, range(one))))
    assert (tiered(one, traffic) <= tiered(other, traffic)) or one > other


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bytes_stored", "build_seconds"])
def test_what_is_no_quantity(name: str, value: float):
    with pytest.raises(ac.InvalidInput, match=f"{name} is {value}"):
        quantities(**{name: value})


def test_nothing_at_all():
    found = cost(quantities(), S3, HOUR)
    assert replace(found, break_even_in_region=None, break_even_over_internet=None) == replace(
        cost(quantities(), S3, HOUR.model_copy(update={"hour": 5.0})),
        break_even_in_region=None,
        break_even_over_internet=None,
    )
    assert found.break_even_in_region is not None
    assert found.break_even_in_region.passes_a_month is None  # to read and to recompute cost the same


# A file of one's own


def own(**changes: Any) -> dict[str, Any]:
    whole = json.loads(PRICES.model_dump_json())
    return whole | changes


def test_a_file_of_ones_own(tmp_path: Path):
    document = own(currency="EUR")
    document["providers"] = {
        "ours": document["providers"]["cloudflare-r2"] | {"name": "our cluster", "put_per_1000": 0}
    }
    (tmp_path / "prices.json").write_text(json.dumps(document))
    prices = load_prices(tmp_path / "prices.json")
    assert (prices.currency, prices.provider().name, prices.provider("ours").put_per_1000) == ("EUR", "our cluster", 0)
    assert isinstance(prices, Prices)
    assert isinstance(prices.provider(), Provider)
    with pytest.raises(ac.InvalidInput, match=r"no prices of 'aws-s3' \(there is: ours\).*--prices"):
        prices.provider("aws-s3")


def broken() -> dict[str, tuple[Any, str]]:
    def changed(**fields: Any) -> dict[str, Any]:
        return own(providers={"x": own()["providers"]["aws-s3"] | fields})

    return {
        "misspelt": (changed(get_per_1OOO=1), r"providers\.x\.get_per_1OOO: Extra inputs"),
        "negative": (changed(put_per_1000=-1), r"providers\.x\.put_per_1000: .*greater than or equal to 0"),
        "not open": (changed(internet_gb=[{"up_to": 5, "price": 1}]), r"providers\.x\.internet_gb: each tier must end"),
        "falling": (
            changed(internet_gb=[{"up_to": 5, "price": 1}, {"up_to": 5, "price": 1}, {"up_to": None, "price": 1}]),
            "each tier must end above the one before",
        ),
        "open twice": (changed(storage_gb_month=[{"up_to": None, "price": 1}] * 2), "each tier must end above"),
        "no tiers": (changed(region_gb=[]), r"providers\.x\.region_gb: .*at least 1"),
        "undated": (changed(as_of="yesterday"), r"providers\.x\.as_of: .*date"),
        "unsourced": (changed(sources=[]), r"providers\.x\.sources: "),
        "currency": (own(currency="dollars"), "currency: "),
        "none": (own(providers={}), r"providers: .*at least 1"),
        "list": ([], "the whole: "),
        "text": ("{", "the whole: Invalid JSON"),
        "infinite": ('{"currency": "USD", "providers": {}, "compute": [{"hour": Infinity}]}', "no price file"),
    }


@pytest.mark.parametrize("name", broken())
def test_a_bad_file_is_refused_on_one_line(tmp_path: Path, name: str):
    document, says = broken()[name]
    path = tmp_path / "bad.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ac.InvalidInput, match=says) as caught:
        load_prices(path)
    assert str(caught.value).startswith(f"{path}: no price file: ")
    assert "\n" not in str(caught.value)
    assert "prices.json shows the shape" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    for path, says in ((tmp_path / "absent.json", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ac.InvalidInput, match=f"{path}: cannot be read: .*{says}"):
            load_prices(path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ac.InvalidInput, match="no price file"):
        load_prices(tmp_path / "x.json")


def test_prices_and_costs_need_no_torch():
    script = (
        "import sys, actcache.jobs.cost as c, actcache.jobs.prices as p; p.load_prices(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
