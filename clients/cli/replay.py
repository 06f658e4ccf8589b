"""`actcache replay`."""

from __future__ import annotations

import dataclasses

import click

from actcache.clients.cli.common import print_json, reading_options
from actcache.clients.summary import printable
from actcache.jobs.replaying import SEQUENCES, replay


@click.command("replay")
@click.argument("url")
@click.option(
    "--sequences", type=click.IntRange(1), default=SEQUENCES, show_default=True, help="How many to run again."
)
@click.option("--model", metavar="FOLDER", help="Where the model is, if it was built from a local folder.")
@reading_options
def replay_command(
    url: str,
    sequences: int,
    model: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Run some sequences through the model again, from the provenance alone, and compare; exit code 1 if they differ.

    \b
    actcache replay s3://lab/gpt2-owt --sequences 20
    """
    found = replay(
        url, sequences=sequences, model=model, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous
    )
    if as_json:
        print_json({**dataclasses.asdict(found), "holds": found.holds})
    else:
        width = max(map(len, found.arrays))
        click.echo(f"{'':<{width}}  {'largest':>10}  {'relative':>10}  {'tolerance':>10}")
        for name, site in found.arrays.items():
            verdict = "equal bits" if site.equal else "holds" if site.holds else "DIFFERS"
            numbers = (site.largest_difference, site.relative_error, site.tolerance)
            click.echo(printable(f"{name:<{width}}  {'  '.join(f'{number:>10.2e}' for number in numbers)}  {verdict}"))
        for name, what in found.differs.items():
            click.echo(printable(f"note: {name}: {what}"))
        verdict = "holds" if found.holds else "DIFFERS"
        click.echo(f"{found.url}: {len(found.sequences)} sequences replayed: {verdict}")
    if not found.holds:
        raise click.exceptions.Exit(1)
