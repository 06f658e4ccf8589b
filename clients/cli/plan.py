"""`actcache plan`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from actcache.clients.cli.common import print_json, writing_options
from actcache.clients.cli.forecast import lines
from actcache.clients.cli.spec_options import ManyCorpora, spec_and_url, spec_options
from actcache.jobs.planning import plan


@click.command("plan", cls=ManyCorpora)
@click.argument("target", nargs=-1, required=True, metavar="[SPEC.toml] URL")
@spec_options
@click.option("--workers", type=int, default=1, show_default=True, metavar="N", help="Tell the time on N workers.")
@click.option("--prices", metavar="FILE", help="Prices of your own, a file like actcache's jobs/prices.json.")
@click.option("--provider", metavar="NAME", help="Whose prices for storage.  [default: the first, aws-s3]")
@writing_options
def plan_command(
    target: tuple[str, ...],
    workers: int,
    prices: str | None,
    provider: str | None,
    endpoint_url: str | None,
    profile: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell what `actcache build` with the same options would take and give. Nothing is stored.

    Runs the model over a batch of the corpus to measure it.

    \b
    actcache plan s3://lab/gpt2-owt --model openai-community/gpt2 --corpus 'owt/*.jsonl.zst' --workers 8
    actcache plan spec.toml ./gpt2-owt.zarr --json
    """
    spec, url = spec_and_url(target, options, adds=False)
    found = plan(
        spec, url, workers=workers, prices=prices, provider=provider, endpoint_url=endpoint_url, profile=profile
    )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    click.echo(f"{url}: nothing stored")
    for line in lines(found):
        click.echo(line)
