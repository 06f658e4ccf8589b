"""`actcache lens`."""

from __future__ import annotations

from functools import partial
from typing import get_args

import click

from actcache.clients import figures
from actcache.clients.cli.common import print_json, quantised_option, reading_options
from actcache.clients.cli.lens_fit import eval_command, fit_command
from actcache.clients.cli.output import give, output_options, write
from actcache.clients.figures.table import Colour
from actcache.clients.lens.files import load
from actcache.clients.lens.logit import logit
from actcache.clients.lens.predictions import predictions
from actcache.clients.lens.transfer import MAX_TOKENS, transfer
from actcache.clients.opening import open as open_dataset

max_tokens_option = click.option(
    "--max-tokens", type=click.IntRange(1), metavar="N", help="Go over the first N tokens alone."
)


@click.group("lens")
def lens_group() -> None:
    """Read what each layer predicts, from the dataset alone.

    \b
    actcache lens logit ./demo.zarr --plot demo.png
    actcache lens fit ./demo.zarr tuned.lens
    actcache lens eval ./demo.zarr --lens tuned.lens --against logit
    """


lens_group.add_command(fit_command)
lens_group.add_command(eval_command)


@lens_group.command("logit")
@click.argument("url")
@max_tokens_option
@quantised_option
@output_options("Draw loss and residual norm by layer")
@reading_options
def logit_command(
    url: str,
    max_tokens: int | None,
    quantised: str | None,
    csv: str | None,
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
    write(measures, as_json, csv, plot, lambda found, path: figures.overview(ds, found, path))


@lens_group.command("transfer")
@click.argument("url")
@click.option("--lens", "lens_file", metavar="FILE", required=True, help="The lens, as `lens fit` writes it.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=MAX_TOKENS, metavar="N", help="Tokens to read.", show_default=True
)
@quantised_option
@output_options("Draw each measure, lens by layer")
@reading_options
def transfer_command(
    url: str,
    lens_file: str,
    max_tokens: int,
    quantised: str | None,
    csv: str | None,
    plot: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """What it costs to read each layer by the lens of each other one: loss and penalty, in nats and bits per byte.

    \b
    actcache lens transfer ./demo.zarr --lens tuned.lens --plot transfer.svg
    """
    lens = load(lens_file)
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    give(transfer(lens, ds, max_tokens, quantised), as_json, csv, plot)


@lens_group.command("show")
@click.argument("url")
@click.option("--sequence", type=int, required=True, metavar="I", help="Which sequence; -1 is the last.")
@click.option("--start", type=int, default=0, metavar="N", help="Its first token that is shown.", show_default=True)
@click.option("--stop", type=int, metavar="N", help="The token before which to stop.  [default: its end]")
@click.option("--lens", "lens_file", metavar="FILE", help="A lens, as `lens fit` writes it.  [default: the logit lens]")
@click.option("--top", type=click.IntRange(1), default=1, metavar="K", help="Predictions each.", show_default=True)
@click.option(
    "--colour", type=click.Choice(get_args(Colour)), default="probability", help="What colours tell.", show_default=True
)
@quantised_option
@output_options("Draw the table")
@reading_options
def show_command(
    url: str,
    sequence: int,
    start: int,
    stop: int | None,
    lens_file: str | None,
    top: int,
    colour: Colour,
    quantised: str | None,
    csv: str | None,
    plot: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """What each layer predicts at each position of a sequence, as a table.

    \b
    actcache lens show ./demo.zarr --sequence 3 --stop 20
    """
    lens = None if lens_file is None else load(lens_file)
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    found = predictions(lens, ds, sequence, start, stop, top, quantised=quantised)
    draw = partial(figures.draw_predictions, colour=colour)
    give(found, as_json, csv, plot, draw, text=lambda table: table.table(top=top))
