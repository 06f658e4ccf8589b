"""`actcache lens export` and `actcache lens import`: folders of the package tuned-lens."""

from __future__ import annotations

from pathlib import Path

import click

from actcache.clients.cli.common import print_json, reading_options
from actcache.clients.lens.exchange import export_tuned_lens, import_tuned_lens
from actcache.clients.lens.files import load, save
from actcache.clients.opening import open as open_dataset
from actcache.schemas.errors import InvalidInput


@click.command("export")
@click.argument("file")
@click.argument("url")
@click.argument("folder")
@click.option(
    "--base-model", metavar="NAME", help="The model's name in the folder.  [default: what the dataset calls it]"
)
@reading_options
def export_command(
    file: str,
    url: str,
    folder: str,
    base_model: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Write the lens in FILE as a FOLDER that the package tuned-lens loads. The dataset at URL tells its model.

    \b
    actcache lens export ridge.lens ./demo.zarr ./ridge
    """
    lens = load(file)
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    written = export_tuned_lens(lens, ds, folder, base_model).absolute()
    if as_json:
        print_json({"folder": str(written), "translators": len(lens.sites) - 1, "shared": lens.shared})
        return
    if lens.shared:
        click.echo("one translator for all states, written once for each layer, as the format has it")
    click.echo(str(written))


@click.command("import")
@click.argument("folder")
@click.argument("url")
@click.argument("file")
@reading_options
def import_command(
    folder: str,
    url: str,
    file: str,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Read a lens that the package tuned-lens saved in FOLDER, for the model of the dataset at URL, into FILE.

    \b
    actcache lens import ./ridge ./demo.zarr tuned.lens
    """
    path = Path(file)
    if path.exists() or path.is_symlink():
        raise InvalidInput(f"{file}: is there already; remove it, or give another file")
    if not path.parent.is_dir():
        raise InvalidInput(f"{file}: the folder {path.parent} does not exist; make it first")
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    lens = import_tuned_lens(folder, ds)
    written = save(lens, path).absolute()
    if as_json:
        print_json({"file": str(written), "translators": len(lens.bias), **lens.facts})
        return
    if lens.facts["unembed_hash"] is None:
        click.echo("the folder has no hash of its model's unembedding: nothing says that the lens is this model's")
    click.echo(str(written))
