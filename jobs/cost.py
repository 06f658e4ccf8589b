"""What a dataset costs to build, to keep and to read, and from how many readings on that is less than computing anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import inf, isfinite

from actcache.jobs.prices import Compute, Provider, Tier
from actcache.schemas.errors import InvalidInput


@dataclass(frozen=True)
class Quantities:
    """What is paid for.

    Attributes:
        bytes_stored: bytes of all objects.
        put_requests: requests of the build that write or list.
        get_requests, bytes_read: requests and bytes of one pass over all that is stored for reading.
        build_seconds: seconds of one device (GPU, or CPU core) that the build takes, summed over all devices.
        recompute_seconds: the same for a pass that computes the activations anew and stores nothing.
    """

    bytes_stored: int
    put_requests: int
    get_requests: int
    bytes_read: int
    build_seconds: float
    recompute_seconds: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isfinite(value) and value >= 0):
                raise InvalidInput(f"{field.name} is {value}; a cost needs a number that is not negative")


@dataclass(frozen=True)
class BreakEven:
    """From how many passes over all of the data on keeping it is cheaper; None: never.

    Attributes:
        passes_a_month: every month, the build left aside.
        passes_in_first_month: within the first month, with what the build costs.
    """

    passes_a_month: float | None
    passes_in_first_month: float | None


@dataclass(frozen=True)
class Cost:
    """Money, in the currency of the prices.

    Attributes:
        build_requests: the requests of the build.
        build_compute: the devices of the build; None where they have no price.
        storage_month: a month of storage.
        read_in_region, read_over_internet: one pass over all of the data.
        recompute: one pass that computes the activations anew; None where the device has no price.
        break_even_in_region, break_even_over_internet: None where the device has no price.
    """

    build_requests: float
    build_compute: float | None
    storage_month: float
    read_in_region: float
    read_over_internet: float
    recompute: float | None
    break_even_in_region: BreakEven | None
    break_even_over_internet: BreakEven | None


def cost(what: Quantities, provider: Provider, compute: Compute | None) -> Cost:
    """What a dataset costs with a provider, built on devices of this price.

    Storage and traffic are priced as if the dataset were all that the account has.
    """
    requests = what.put_requests * provider.put_per_1000 / 1000
    storage = tiered(what.bytes_stored / provider.gb_bytes, provider.storage_gb_month)
    build = recompute = in_region = over_internet = None
    if compute is not None:
        build = what.build_seconds / 3600 * compute.hour
        recompute = what.recompute_seconds / 3600 * compute.hour
        in_region, over_internet = (
            BreakEven(
                break_even(storage, recompute, what, provider, traffic),
                break_even(requests + build + storage, recompute, what, provider, traffic),
            )
            for traffic in (provider.region_gb, provider.internet_gb)
        )
    return Cost(
        build_requests=requests,
        build_compute=build,
        storage_month=storage,
        read_in_region=reading(1, what, provider, provider.region_gb),
        read_over_internet=reading(1, what, provider, provider.internet_gb),
        recompute=recompute,
        break_even_in_region=in_region,
        break_even_over_internet=over_internet,
    )


def tiered(amount: float, tiers: tuple[Tier, ...]) -> float:
    """The price of an amount, each part of it at the price of its own tier."""
    return sum(max(0.0, min(amount, end) - start) * price for start, end, price in _steps(tiers))


def reading(passes: float, what: Quantities, provider: Provider, traffic: tuple[Tier, ...]) -> float:
    """The price of so many passes over all of the data within a month."""
    requests = passes * what.get_requests * provider.get_per_1000 / 1000
    return requests + tiered(passes * what.bytes_read / provider.gb_bytes, traffic)


def break_even(
    fixed: float, recompute: float, what: Quantities, provider: Provider, traffic: tuple[Tier, ...]
) -> float | None:
    """From how many passes a month on keeping the data costs no more than computing it anew for each; None: never.

    It is the least p* with fixed + reading(p) <= p · recompute for every p >= p*. Where traffic has one price that is

        p* = fixed / (recompute - reading(1))

    and never where reading once costs as much as recomputing. With a price that falls, or rises, by tiers both sides are still
    straight between the ends of the tiers, so that the last crossing is found from the last tier backwards.
    """
    saved = recompute - what.get_requests * provider.get_per_1000 / 1000
    gb = what.bytes_read / provider.gb_bytes
    if gb == 0:
        traffic = (Tier(up_to=None, price=0),)
    pieces = []  # where each begins, what has been gained by then, and what every further pass gains
    gained = -fixed
    for start, end, price in _steps(traffic):
        slope = saved - gb * price
        begin = start / gb if gb else 0.0
        pieces.append((begin, gained, slope))
        if end != inf:
            gained += slope * (end / gb - begin)
    begin, gained, slope = pieces[-1]
    if slope < 0 or (slope == 0 and gained <= 0):
        return None
    for begin, gained, slope in reversed(pieces):
        if gained < 0:
            passes = begin - gained / slope if slope > 0 else inf
            return passes if isfinite(passes) else None
    return 0.0


def _steps(tiers: tuple[Tier, ...]) -> Iterator[tuple[float, float, float]]:
    """Where each tier begins and ends, and its price."""
    start = 0.0
    for tier in tiers:
        end = inf if tier.up_to is None else tier.up_to
        yield start, end, tier.price
        start = end
