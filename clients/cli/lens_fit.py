"""`actcache lens fit` and `actcache lens eval`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from actcache.clients.cli.common import print_json, quantised_option, reading_options, seed_option
from actcache.clients.cli.output import give, output_options, writable
from actcache.clients.lens.compare import compare
from actcache.clients.lens.files import load, save
from actcache.clients.lens.fitting import fit
from actcache.clients.lens.logit import evaluate
from actcache.clients.opening import open as open_dataset
from actcache.clients.states import states
from actcache.schemas.errors import InvalidInput

if TYPE_CHECKING:
    from actcache.clients.lens.training import Progress


@click.command("fit")
@click.argument("url")
@click.argument("file")
@click.option(
    "--kind", type=click.Choice(["tuned", "ridge"]), default="tuned", show_default=True, help="ridge needs no torch."
)
@click.option("--shared", is_flag=True, help="One translator for all states.")
@click.option(
    "--offset", type=click.IntRange(0), default=0, metavar="K", help="Predict what is predicted K tokens later."
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Look at the first N tokens alone.")
@click.option(
    "--held-out", default=0.1, show_default=True, metavar="SHARE", help="Share of tokens, in whole documents, held out."
)
@click.option("--tokens", type=click.IntRange(1), metavar="N", help="Train on N tokens, those of every pass counted.")
@seed_option("Of the split and of the order.")
@click.option("--device", metavar="NAME", help="Where torch computes; default a GPU if there is one.")
@quantised_option
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@reading_options
def fit_command(
    url: str,
    file: str,
    kind: str,
    shared: bool,
    offset: int,
    max_tokens: int | None,
    held_out: float,
    tokens: int | None,
    seed: int,
    device: str | None,
    quantised: str | None,
    overwrite: bool,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Fit a lens and write it to FILE. The same command goes on with a training that was interrupted, from .FILE.training beside it.

    \b
    actcache lens fit ./demo.zarr tuned.lens
    actcache lens fit ./demo.zarr ridge.lens --kind ridge --max-tokens 100000
    """
    path = Path(file)
    if path.is_file() and not overwrite:
        raise InvalidInput(f"{file}: is there already; --overwrite replaces it")
    writable(file)
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    with _reporter() as report, _between_steps(report) as after_step:
        lens = fit(
            states(ds, offset=offset, max_tokens=max_tokens, quantised=quantised),
            kind,  # type: ignore[arg-type]  # click has checked it
            shared=shared,
            target_offset=offset,
            held_out=held_out,
            seed=seed,
            tokens=tokens,
            device=device,
            checkpoint=path.with_name(f".{path.name}.training"),
            report=after_step,
        )
    save(lens, path)
    if as_json:
        print_json({"file": str(path.absolute()), "lens": lens.kind, "sites": list(lens.sites), **lens.facts})
        return
    click.echo(lens.held_out())
    click.echo(str(path.absolute()))


@click.command("eval")
@click.argument("url")
@click.option("--lens", "file", required=True, metavar="FILE", help="The lens, as `lens fit` wrote it.")
@click.option(
    "--against", metavar="FILE", help="Another lens: the differences, this one less that; `logit` for the logit lens."
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Go over the first N tokens alone.")
@quantised_option
@output_options("Draw the measures by layer")
@reading_options
def eval_command(
    url: str,
    file: str,
    against: str | None,
    max_tokens: int | None,
    quantised: str | None,
    csv: str | None,
    plot: str | None,
    endpoint_url: str | None,
    profile: str | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Loss, KL to the final prediction, entropy and agreement by layer, read by a lens, or how two lenses differ.

    \b
    actcache lens eval ./demo.zarr --lens tuned.lens --plot tuned.svg
    """
    ds = open_dataset(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    lens = load(file)
    read = states(ds, offset=lens.offset, max_tokens=max_tokens, quantised=quantised)
    other = None if against in (None, "logit") else load(str(against))
    give(evaluate(lens, read) if against is None else compare(lens, other, read), as_json, csv, plot)


@contextmanager
def _reporter() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, on standard error; a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, facts="")
        yield lambda state: bar.update(task, completed=state.step, total=state.steps, facts=state.text)


@contextmanager
def _between_steps(report: Callable[[Progress], None]) -> Iterator[Callable[[Progress], None]]:
    """The reporter, where Ctrl-C ends the training after a step, so that its state is kept. A second one ends it at once."""
    training = stopped = False
    if threading.current_thread() is not threading.main_thread():
        yield report
        return

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped or not training:
            raise KeyboardInterrupt
        stopped = True

    def after_step(state: Progress) -> None:
        nonlocal training
        report(state)
        training = state.step < state.steps
        if stopped:
            raise KeyboardInterrupt

    usual = signal.signal(signal.SIGINT, stop)
    try:
        yield after_step
    finally:
        signal.signal(signal.SIGINT, usual)


def _line(state: Progress) -> None:
    if state.step in (1, state.steps) or not state.step % 50:
        click.echo(f"step {state.step}/{state.steps}  {state.text}", err=True)
