"""`actcache lens`."""

from __future__ import annotations

import click

from actcache.clients.cli.common import print_json, reading_options
from actcache.clients.lens.logit import logit
from actcache.clients.opening import open as open_dataset
from actcache.clients.plots import overview
from actcache.schemas.quantised import KINDS


@click.group("lens")
def lens_group() -> None:
    """Read what each layer predicts, from the dataset alone."""


@lens_group.command("logit")
@click.argument("url")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Go over the first N tokens alone.")
@click.option("--quantized", "quantised", type=click.Choice(KINDS), help="Read this quantised form of each state.")
@click.option("--plot", metavar="FILE", help="Draw loss and residual norm by layer as a PNG.")
@reading_options
def logit_command(
    url: str,
    max_tokens: int | None,
    quantised: str | None,
    plot: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """The logit lens: loss, KL to the final prediction, entropy and agreement of each layer, in nats.

    \b
    actcache lens logit ./demo.zarr --plot demo.png
    """
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    measures = logit(ds, max_tokens, quantised)
    if as_json:
        print_json({"sites": ds.residual_sites, **{name: values.tolist() for name, values in measures.items()}})
    else:
        click.echo(f"{'site':<28}" + "".join(f"{name:>11}" for name in measures))
        for index, site in enumerate(ds.residual_sites):
            click.echo(f"{site:<28}" + "".join(f"{values[index]:>11.4f}" for values in measures.values()))
    if plot is not None:
        click.echo(str(overview(ds, measures, plot).absolute()), err=as_json)
