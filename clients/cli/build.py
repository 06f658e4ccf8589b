"""`actcache build` and `actcache seal`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from actcache.cache.added import seal_finished
from actcache.cache.seal import seal
from actcache.cache.store import open_store
from actcache.clients.cli.build_log import BuildLog
from actcache.clients.cli.common import print_json, writing_options
from actcache.clients.cli.progress import reporter
from actcache.clients.cli.spec_options import CLUSTER, ManyCorpora, cluster_options, spec_and_url, spec_options
from actcache.jobs.build import BuildResult, build
from actcache.jobs.options import STAGES


@click.command("build", cls=ManyCorpora)
@click.argument("target", nargs=-1, required=True, metavar="[SPEC.toml] URL")
@spec_options
@click.option(
    "--add-sites", metavar="PATTERN", help="Add these sites to the sealed dataset at URL; needs --model, no --corpus."
)
@click.option("--stage", type=click.Choice(STAGES), default="all", help="Stop after a stage.", show_default=True)
@cluster_options
@click.option("--part", metavar="I/N", help="Run the I-th of N parts of the blocks and seal nothing.")
@click.option("--log", metavar="FILE", help="Where to log, a JSON object a line.  [default: in the state folder]")
@writing_options
def build_command(
    target: tuple[str, ...],
    add_sites: str | None,
    stage: str,
    part: str | None,
    log: str | None,
    endpoint_url: str | None,
    profile: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a model over a corpus and store what its sites hold in a sealed dataset at URL.

    Run the same command again to resume one that was stopped; on a sealed dataset it does nothing.

    \b
    actcache build s3://lab/gpt2-owt --model openai-community/gpt2 --corpus 'owt/*.jsonl.zst' --dtype bfloat16
    actcache build spec.toml ./gpt2-owt.zarr --workers 4
    actcache build spec.toml s3://lab/gpt2-owt --part 3/8
    actcache build ./gpt2-owt.zarr --model openai-community/gpt2 --add-sites 'blocks.*.hook_attn_out'
    """
    cluster = {name: options.pop(name) for name in CLUSTER}
    spec, url = spec_and_url(target, options, add_sites is not None)
    with reporter(BuildLog(url, log)) as show:
        result = build(
            spec,
            url,
            add_sites=add_sites,
            endpoint_url=endpoint_url,
            profile=profile,
            stage=stage,
            part=part,
            reporter=show,
            **cluster,
        )
    if as_json:
        print_json(result)
    else:
        click.echo(_said(result, part))


def _said(result: BuildResult, part: str | None) -> str:
    if result.state == "tokenised":
        return f"{result.url}: tokens stored; run the same command without --stage to go on"
    if result.blocks is not None:
        first, end = result.blocks
        what = f"blocks {first:,} to {end - 1:,} are stored" if end > first else "there are no blocks in it"
        return f"{result.url}: part {part}: {what}; run 'actcache seal' once every part is"
    size = f"{result.n_tokens:,} tokens × {len(result.sites)} sites"
    size += f", {len(result.added)} of them added" if result.added else ""
    told = {
        "built": f"sealed: {size}",
        "already sealed": f"already sealed: {size}; nothing to do",
        "sealed by another build": f"sealed by another build that ran at the same time: {size}",
    }[result.state]
    return f"{result.url}: {told}\nmanifest {result.manifest}"


@click.command("seal")
@click.argument("url")
@writing_options
def seal_command(url: str, endpoint_url: str | None, profile: str | None, as_json: bool) -> None:
    """Seal a build whose blocks are all stored, the first or added ones, without the model at hand.

    `actcache build` seals by itself. Sealed this way, the provenance records that no sequence was replayed.

    \b
    actcache seal s3://lab/gpt2-owt
    """
    store = open_store(url, endpoint_url=endpoint_url, profile=profile)
    with ThreadPoolExecutor() as pool:
        sealed = seal(store, pool)
        added, unfinished = seal_finished(store, pool)
    generation = sealed.root.attributes.generations[0]
    state = "sealed" if sealed.by_us else "already sealed"
    if as_json:
        parts = [{"key": part.key, "manifest": part.manifest, "sites": part.sites} for part in added]
        document = {"url": store.location.url, "state": state, "key": generation.key, "manifest": generation.manifest}
        print_json({**document, "added": parts})
    else:
        click.echo(f"{store.location.url}: {state}\nmanifest {generation.manifest}")
        for part in added:
            click.echo(f"added {len(part.sites)} sites: sealed\nmanifest {part.manifest}")
    if unfinished:
        raise unfinished[0]
