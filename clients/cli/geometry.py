"""`actcache geometry`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from actcache.clients.cli.common import quantised_option, reading_options, with_options
from actcache.clients.cli.output import give, output_options
from actcache.clients.geometry import massive, norms, similarity, spectrum
from actcache.clients.opening import open as open_dataset
from actcache.clients.results import Results
from actcache.schemas.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Any])

shared_options = with_options(
    click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Go over the first N tokens alone."),
    click.option(
        "--sites", metavar="NAMES", help="Names of sites, separated by commas, instead of the residual stream."
    ),
    quantised_option,
    output_options(),
    reading_options,
)
without_option: Callable[[F], F] = click.option(
    "--without", metavar="DIMENSIONS", help="Leave out these dimensions, separated by commas, such as massive ones."
)
intervals_option: Callable[[F], F] = click.option(
    "--no-intervals", is_flag=True, help="Find no intervals: they take another pass over the data."
)


@click.group("geometry")
def geometry_group() -> None:
    """How alike layers are, how many dimensions they use, how norms grow, and which activations are massive.

    \b
    actcache geometry spectrum ./demo.zarr --max-tokens 20000
    """


@geometry_group.command("similarity")
@click.argument("url")
@without_option
@intervals_option
@shared_options
def similarity_command(url: str, without: str | None, no_intervals: bool, **options: Any) -> None:
    """Linear CKA and the cosine of covariances of every two layers, each beside what unrelated layers would give.

    \b
    actcache geometry similarity ./demo.zarr --max-tokens 20000
    """
    _show(similarity, url, options, without=_numbers(without), intervals=not no_intervals)


@geometry_group.command("spectrum")
@click.argument("url")
@without_option
@intervals_option
@shared_options
def spectrum_command(url: str, without: str | None, no_intervals: bool, **options: Any) -> None:
    """Effective rank, participation ratio, and the variance that the first directions hold, by layer.

    \b
    actcache geometry spectrum ./demo.zarr --max-tokens 20000
    """
    _show(spectrum, url, options, without=_numbers(without), intervals=not no_intervals)


@geometry_group.command("norms")
@click.argument("url")
@click.option("--updates", is_flag=True, help="Read the states too: how each block's update lies to what was there.")
@shared_options
def norms_command(url: str, updates: bool, **options: Any) -> None:
    """Percentiles and growth of the L2 norm by layer, from the stored norms.

    \b
    actcache geometry norms ./demo.zarr --updates
    """
    _show(norms, url, options, updates=updates)


@geometry_group.command("massive")
@click.argument("url")
@click.option(
    "--absolute", type=float, default=100.0, show_default=True, help="Magnitude from which on one is massive."
)
@click.option(
    "--ratio", type=float, default=1000.0, show_default=True, help="And how many times its layer's median magnitude."
)
@shared_options
def massive_command(url: str, absolute: float, ratio: float, **options: Any) -> None:
    """Massive activations: in which dimensions, at which layers, positions and tokens.

    \b
    actcache geometry massive ./demo.zarr
    """
    _show(massive, url, options, absolute=absolute, ratio=ratio)


def _show(
    measure: Callable[..., Results],
    url: str,
    options: dict[str, Any],
    **arguments: Any,
) -> None:
    as_json, csv, plot, sites = (options.pop(name) for name in ("as_json", "csv", "plot", "sites"))
    chosen = {name: options.pop(name) for name in ("max_tokens", "quantised")}
    ds = open_dataset(url, **options)
    found = measure(ds, sites=None if sites is None else [s.strip() for s in sites.split(",")], **chosen, **arguments)
    give(found, as_json, csv, plot)


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InvalidInput(f"--without {text!r}: give dimensions as numbers separated by commas") from None
