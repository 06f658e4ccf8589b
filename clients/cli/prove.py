"""`actcache prove`."""

from __future__ import annotations

import dataclasses

import click

from actcache.clients.cli.common import debug_option, json_option, print_json
from actcache.jobs.torch_half import torch_half
from actcache.schemas.dtypes import ACTIVATION_DTYPES


@click.command("prove")
@click.argument("model")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@click.option("--compute-dtype", type=click.Choice(ACTIVATION_DTYPES), help="Dtype of the forward pass.")
@click.option("--attention", metavar="A", help="sdpa, eager, flash_attention_2.")
@click.option("--text", metavar="FILE", help="Use a text file's tokens rather than tokens drawn at random.")
@json_option
@debug_option
def prove_command(
    model: str, revision: str | None, compute_dtype: str | None, attention: str | None, text: str | None, as_json: bool
) -> None:
    """Show a model's sites, and check every identity that its captured tensors must satisfy; exit code 1 if one fails.

    \b
    actcache prove examples/tiny-gpt
    """
    proved = torch_half("prove").prove_model(
        model, revision=revision, compute_dtype=compute_dtype, attention=attention, text=text
    )
    if as_json:
        print_json({**dataclasses.asdict(proved), "holds": proved.holds})
    else:
        click.echo(
            f"{proved.model}: {proved.family}, {proved.n_layers} layers × {proved.d_model}, "
            f"{proved.compute_dtype}, {proved.attention} attention"
        )
        width = max(map(len, proved.sites))
        for site, where in proved.sites.items():
            click.echo(f"  {site:<{width}}  {where}")
        click.echo(f"  head: {', '.join(proved.head)}")
        for name, found in proved.identities.items():
            verdict = "holds" if found["holds"] else "FAILS"
            click.echo(f"{verdict}  {name:<10}  {found['error']:.2e} of {found['tolerance']:.2e}  {found['says']}")
    if not proved.holds:
        raise click.exceptions.Exit(1)
