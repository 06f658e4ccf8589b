"""The command line: `actcache …`. Only this package of `clients` knows `jobs`."""

from actcache.clients.cli.main import main

__all__ = ["main"]
