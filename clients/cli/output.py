"""Where a measurement goes: to the terminal as text or JSON, into a CSV file, into a picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from actcache.clients import figures
from actcache.clients.cli.common import print_json, with_options
from actcache.clients.figures.canvas import picture_path
from actcache.schemas.errors import InvalidInput, StoreError

F = TypeVar("F", bound=Callable[..., Any])


class Told(Protocol):
    """What was measured: `Results`, or a table of predictions."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""

    def to_csv(self, path: str | Path) -> Path:
        """Write it as CSV."""


M = TypeVar("M", bound=Told)


def output_options(draws: str = "Draw the measures") -> Callable[[F], F]:
    """`--csv` and `--plot`, given to the command as `csv` and `plot`; `--json` is among `reading_options`.

    Files that cannot be written are refused before anything is measured. `draws` is what the help says of the picture.
    """
    return with_options(
        click.option("--csv", metavar="FILE", callback=writable_path, help="Write all numbers as CSV."),
        click.option(
            "--plot", metavar="FILE", callback=_plot_path, help=f"{draws}, as PNG or SVG by the file's ending."
        ),
    )


def give(
    found: M,
    as_json: bool,
    csv: str | None,
    plot: str | None,
    draw: Callable[[M, str], Path] = figures.draw,  # type: ignore[assignment]  # of results, unless told otherwise
    text: Callable[[M], str] = str,
) -> None:
    """Print what was measured, as text or JSON, and write the files that were asked for."""
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(text(found))
    write(found, as_json, csv, plot, draw)


def write(
    found: M,
    as_json: bool,
    csv: str | None,
    plot: str | None,
    draw: Callable[[M, str], Path] = figures.draw,  # type: ignore[assignment]  # of results, unless told otherwise
) -> None:
    """Write the files that were asked for, and tell where they are: on standard error where JSON is on the other.

    Raises:
        StoreError: one cannot be written.
    """
    for path, made in ((csv, found.to_csv), (plot, lambda path: draw(found, path))):
        if path is None:
            continue
        try:
            click.echo(str(made(path).absolute()), err=as_json)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror})") from None


def writable(value: str) -> None:
    """Refuse a file that cannot be written; to be asked before long work.

    Raises:
        InvalidInput: a folder, or one in a folder that is not there.
        StoreError: the folder, or the file, is not to be written.
    """
    path = Path(value)
    if path.is_dir():
        raise InvalidInput(f"{value or repr(value)}: a folder; give a file")
    if not path.parent.is_dir():
        raise InvalidInput(f"{value}: the folder {path.parent} does not exist; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StoreError(f"{value}: cannot be written (permission denied)")


def writable_path(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """The value of an option that names a file to write. Raises as `writable`."""
    if value is not None:
        writable(value)
    return value


def _plot_path(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        picture_path(value)
        writable(value)
    return value
