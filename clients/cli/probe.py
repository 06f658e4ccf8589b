"""`actcache probe`."""

from __future__ import annotations

import click

from actcache.clients.cli.common import print_json, quantised_option, reading_options, seed_option
from actcache.clients.cli.label_sources import SOURCES, labels_of
from actcache.clients.cli.output import output_options, writable_path, write
from actcache.clients.opening import open as open_dataset
from actcache.clients.probe import fit


@click.group("probe")
def probe_group() -> None:
    """Linear probes: what a linear map tells of each layer's states.

    \b
    actcache probe fit ./demo.zarr --labels 'token-regex:^\\s+$'
    """


@probe_group.command("fit")
@click.argument("url")
@click.option("--labels", required=True, metavar="SOURCE", help=f"{SOURCES}.")
@click.option("--task", type=click.Choice(["classification", "regression"]), help="By default floats are regression.")
@click.option(
    "--method", type=click.Choice(["ridge", "logistic"]), default="ridge", show_default=True, help="How to fit."
)
@click.option(
    "--sites", multiple=True, metavar="PATTERN", help="States to probe, several times; default the residual stream."
)
@click.option(
    "--alpha", "alphas", multiple=True, type=float, metavar="A", help="A penalty to choose among; several times."
)
@click.option("--held-out", default=0.1, show_default=True, metavar="SHARE", help="Share of the tokens to measure on.")
@click.option("--control/--no-control", default=True, show_default=True, help="Fit labels at random as well.")
@click.option("--draws", type=int, metavar="N", help="Control tasks to take the mean of; default 5 (ridge) or 1.")
@seed_option("Of the held-out documents and the control.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Go over the first N tokens alone.")
@quantised_option
@click.option("--save", metavar="FILE", callback=writable_path, help="Write the probe as safetensors.")
@output_options("Draw the measures by layer")
@reading_options
def fit_command(
    url: str,
    labels: str,
    task: str | None,
    method: str,
    sites: tuple[str, ...],
    alphas: tuple[float, ...],
    held_out: float,
    control: bool,
    draws: int | None,
    seed: int,
    max_tokens: int | None,
    quantised: str | None,
    save: str | None,
    csv: str | None,
    plot: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Fit a linear probe on every layer in one pass, and measure it on held-out documents, with intervals.

    \b
    actcache probe fit ./demo.zarr --labels 'token-regex:^\\s+$' --max-tokens 100000
    actcache probe fit ./demo.zarr --labels field:position --task regression --csv position.csv
    """
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    probe = fit(
        ds,
        labels_of(ds, labels),
        sites=sites or None,
        task=task,  # type: ignore[arg-type]  # click has checked it
        method=method,  # type: ignore[arg-type]
        alphas=alphas or None,
        held_out=held_out,
        seed=seed,
        control=control,
        draws=draws,
        max_tokens=max_tokens,
        quantised=quantised,
    )
    if as_json:
        print_json({"sites": list(probe.sites), **probe.results.to_dict()})
    else:
        click.echo(repr(probe))
    write(probe.results, as_json, csv, plot)
    if save is not None:
        click.echo(str(probe.save(save).absolute()), err=as_json)
