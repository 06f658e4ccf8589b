"""`actcache info`, `actcache verify` and `actcache ls`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from actcache.cache.catalog import Entry
from actcache.clients.cli.common import print_json, reading_options
from actcache.clients.dataset import Dataset
from actcache.clients.opening import catalog, verify
from actcache.clients.opening import open as open_dataset
from actcache.clients.summary import printable
from actcache.schemas.root import Provenance


@click.command("info")
@click.argument("url")
@reading_options
def info_command(url: str, endpoint_url: str | None, profile: str | None, anonymous: bool, as_json: bool) -> None:
    """Show what a dataset holds and where it comes from.

    \b
    actcache info s3://lab/gpt2-owt
    """
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    if as_json:
        print_json(_document(ds))
        return
    facts = ds.facts() | {name: printable(value) for name, value in _origin(ds).items()}
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
    for line in _damage(ds):
        click.echo(printable(line))


def _origin(ds: Dataset) -> dict[str, str]:
    labels = ds.provenance.labels
    licences = f"model {labels.model_license or 'not stated'}, corpus {labels.corpus_license or 'not stated'}"
    facts = {"manifest": ds.manifest, "licences": licences, **_course(ds.provenance)}
    for number, generation in enumerate(ds.generations[1:], 1):
        sites, spec = generation.captured, generation.provenance.spec
        added = {
            "sites": f"{len(sites)}: {' '.join(sites if len(sites) < 4 else (sites[0], '…', sites[-1]))}",
            "key": generation.key,
            "manifest": generation.manifest,
            "dtype": f"{spec.stored_as} (computed in {spec.execution.compute_dtype})",
            **_course(generation.provenance),
        }
        facts |= {f"added build {number}: {name}": value for name, value in added.items()}
    return facts


def _course(provenance: Provenance) -> dict[str, str]:
    """How a build went."""
    replay, layout = provenance.replay, provenance.spec.layout
    devices = sorted({str(environment.get("device")) for environment in provenance.environments})
    said = f"{replay.status}"
    if replay.largest_relative_error is not None:
        said = f"{len(replay.sequences)} sequences, largest relative error {replay.largest_relative_error:.2g}"
    mixed = [name for name in ("mixed_environments", "mixed_attempts") if getattr(provenance, name)]
    return {
        "layout": f"blocks of {layout.block_tokens:,} tokens, chunks of {layout.chunk_tokens:,}",
        "built": f"{provenance.began or '?'} to {provenance.sealed} by actcache {provenance.software.get('actcache')}",
        "device": ", ".join(devices) or "not recorded",
        "replay": said,
        **({"mixed": ", ".join(mixed)} if mixed else {}),
    }


def _damage(ds: Dataset) -> Iterator[str]:
    """What quantising did to each site, as a table."""
    rows = []
    for site, kinds in ds.quantised.items():
        for kind in kinds:
            damage = ds.damage(site, kind)
            if damage is None:
                rows.append([site, kind, "not recorded", "", "", ""])
                continue
            errors = (damage.relative_error, damage.median_token_error, damage.largest_token_error)
            kl = f"{damage.kl:.2g}" if damage.kl is not None else damage.kl_note or ""
            rows.append([site, kind, *(f"{error:.2g}" for error in errors), kl])
    if rows:
        yield ""
        yield from _table(
            [["quantised", "kind", "relative error", "median token", "largest token", "KL (nats)"], *rows]
        )


def _document(ds: Dataset) -> dict[str, Any]:
    return {
        "url": ds.url,
        "format": ds.format,
        "key": ds.key,
        "manifest": ds.manifest,
        "n_tokens": ds.n_tokens,
        "n_sequences": ds.n_sequences,
        "n_documents": ds.n_documents,
        "d_model": ds.d_model,
        "dtype": ds.dtype,
        "dtypes": ds.dtypes,
        "sites": ds.sites,
        "quantised": {
            site: {kind: damage.document() if (damage := ds.damage(site, kind)) else None for kind in kinds}
            for site, kinds in ds.quantised.items()
        },
        "raw_bytes": ds.raw_bytes,
        "provenance": ds.provenance.document(),
        "generations": [generation.document() for generation in ds.generations],
    }


@click.command("verify")
@click.argument("url")
@click.option("--full", is_flag=True, help="Recompute the SHA-256 of every object, not keys and sizes alone.")
@reading_options
def verify_command(
    url: str, full: bool, endpoint_url: str | None, profile: str | None, anonymous: bool, as_json: bool
) -> None:
    """Check every object of a dataset against its manifest; exit code 1 if one is bad.

    \b
    actcache verify --full s3://lab/gpt2-owt
    """
    with _bar() as progress:
        report = verify(
            url, full=full, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous, progress=progress
        )
    if as_json:
        print_json({"ok": report.ok, **vars(report)})
    else:
        for key in report.unexpected:
            click.echo(printable(f"unexpected  {key}: in no manifest"))
        for work in report.unfinished:
            click.echo(printable(f"unfinished  {work.what}"))
        for problem in report.problems:
            click.echo(printable(f"bad  {problem.key}: {problem.what}"))
        how = "sha256 of every object" if full else "keys and sizes; --full recomputes every sha256"
        verdict = "ok" if report.ok else f"{len(report.problems)} bad objects"
        click.echo(f"{report.url}: {verdict} ({report.objects:,} objects, {report.bytes / 1e6:,.1f} MB; {how})")
    if not report.ok:
        raise click.exceptions.Exit(1)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar in bytes where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, label="checking", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield progress


@click.command("ls")
@click.argument("prefix")
@reading_options
def ls_command(prefix: str, endpoint_url: str | None, profile: str | None, anonymous: bool, as_json: bool) -> None:
    """List the datasets under a prefix, half-built ones too.

    \b
    actcache ls s3://lab/
    """
    entries = catalog(prefix, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    if as_json:
        print_json(entries)
        return
    for line in _table([_row(entry) for entry in entries]):
        click.echo(printable(line))
    if not entries:
        click.echo(f"no datasets under {prefix}", err=True)


def _row(entry: Entry) -> list[str]:
    if entry.problem is not None:
        return [entry.state, "", "", "", "", f"{entry.url}  ({entry.problem})"]
    tokens = f"{entry.n_tokens:,} tokens" if entry.n_tokens is not None else ""
    return [entry.state, tokens, f"{len(entry.sites)} sites", entry.dtype or "", entry.model or "", entry.url]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
