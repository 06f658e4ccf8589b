"""Prices of storage, requests, traffic and compute: the ones that come with actcache, or a file of the user's own."""

from __future__ import annotations

from datetime import date
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from actcache.schemas.errors import InvalidInput
from actcache.schemas.record import Record, first_problem

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Some = Annotated[tuple[Text, ...], Field(min_length=1)]


class Entry(Record):
    """A part of a price file. A field that is misspelt is an error: a price that is not read would be none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tier(Entry):
    """The price of a GB between the end of the tier before and `up_to` GB a month; no end where that is None."""

    up_to: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    price: Price


def _rising(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    ends = [tier.up_to if tier.up_to is not None else inf for tier in tiers]
    if ends != sorted(set(ends)) or ends[-1] != inf:
        raise ValueError("each tier must end above the one before, and the last alone at null")
    return tiers


Tiers = Annotated[tuple[Tier, ...], Field(min_length=1), AfterValidator(_rising)]


class Provider(Entry):
    """What an object store asks for. What an account has for nothing is not in it: that is used up but once.

    Attributes:
        name: what is sold, and where.
        as_of: the day of which the prices are known.
        sources: where they stand.
        note: what one should know of them.
        gb_bytes: bytes of what the provider calls a GB.
        storage_gb_month: a GB stored for a month.
        put_per_1000, get_per_1000: a thousand requests that write or list, and that read.
        region_gb, internet_gb: a GB read from within the region, and over the internet.
    """

    name: Text
    as_of: date
    sources: Some
    note: str = ""
    gb_bytes: Annotated[int, Field(ge=1)]
    storage_gb_month: Tiers
    put_per_1000: Price
    get_per_1000: Price
    region_gb: Tiers
    internet_gb: Tiers


class Compute(Entry):
    """An hour of one device: a GPU, or for `cpu` one core. It is the price of whatever has one of `devices` in its name."""

    devices: Some
    machine: Text
    hour: Price
    as_of: date
    sources: Some


class Prices(Entry):
    """A price file. Providers are by a short name; the first of them is the default."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    providers: Annotated[dict[Text, Provider], Field(min_length=1)]
    compute: tuple[Compute, ...] = ()

    def provider(self, name: str | None = None) -> Provider:
        """The provider of this name, by default the first.

        Raises:
            InvalidInput: there is none.
        """
        found = self.providers.get(next(iter(self.providers)) if name is None else name)
        if found is None:
            raise InvalidInput(
                f"no prices of {name!r} (there is: {', '.join(self.providers)}); give a file that has them with --prices"
            )
        return found

    def compute_of(self, device: str) -> Compute | None:
        """The first price of a device by its name (`cpu`, `NVIDIA H200`), None where there is none."""
        name = device.casefold()
        return next((one for one in self.compute if any(part.casefold() in name for part in one.devices)), None)


def load_prices(path: str | Path | None = None) -> Prices:
    """The prices of a JSON file, by default of the one that comes with actcache.

    Raises:
        InvalidInput: the file cannot be read, or is no price file.
    """
    own = files("actcache.jobs") / "prices.json"
    try:
        data = own.read_bytes() if path is None else Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path or own}: cannot be read: {error.strerror}") from None
    try:
        return Prices.model_validate_json(data)
    except ValidationError as error:
        problem = " ".join(first_problem(error).split())
        raise InvalidInput(f"{path or own}: no price file: {problem}; {own} shows the shape") from None
