"""The group of all commands."""

from __future__ import annotations

import click

import actcache
from actcache.clients.cli.build import build_command, seal_command
from actcache.clients.cli.common import OneLineErrors, debug_option
from actcache.clients.cli.geometry import geometry_group
from actcache.clients.cli.inspect import info_command, ls_command, verify_command
from actcache.clients.cli.lens import lens_group
from actcache.clients.cli.lens_exchange import export_command, import_command
from actcache.clients.cli.plan import plan_command
from actcache.clients.cli.probe import probe_group
from actcache.clients.cli.prove import prove_command
from actcache.clients.cli.replay import replay_command


@click.group(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or unusable input.",
)
@click.version_option(actcache.__version__, prog_name="actcache")
@debug_option
def main() -> None:
    """Run a GPT model over a corpus once, keep every layer's residual stream, and never run the model again.

    \b
    actcache build ./demo.zarr --model examples/tiny-gpt --corpus 'texts/*.txt'
    actcache info ./demo.zarr
    """


for command in (
    plan_command,
    build_command,
    prove_command,
    replay_command,
    info_command,
    verify_command,
    ls_command,
    seal_command,
    lens_group,
    geometry_group,
    probe_group,
):
    main.add_command(command)

for command in (export_command, import_command):
    lens_group.add_command(command)
