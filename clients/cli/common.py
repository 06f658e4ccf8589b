"""What every command shares: options, JSON output, and errors on one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from actcache.clients.summary import printable
from actcache.schemas.errors import ActcacheError, InvalidInput, OutOfRange
from actcache.schemas.quantised import KINDS

F = TypeVar("F", bound=Callable[..., Any])


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several option decorators as one, shown in the order given."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().meta["debug"] = True


def seed_option(said: str) -> Callable[[F], F]:
    """`--seed`, 0 or more."""
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help=said)


quantised_option: Callable[[F], F] = click.option(
    "--quantized", "quantised", type=click.Choice(KINDS), help="Read this quantised form of each state."
)
debug_option: Callable[[F], F] = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
)
json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
endpoint_option: Callable[[F], F] = click.option(
    "--endpoint-url", metavar="URL", help="S3 endpoint; default as botocore finds it (AWS_ENDPOINT_URL)."
)
profile_option: Callable[[F], F] = click.option("--profile", metavar="NAME", help="Profile of the AWS configuration.")
anonymous_option: Callable[[F], F] = click.option(
    "--anonymous", is_flag=True, help="Sign no requests: for public buckets."
)
reading_options = with_options(endpoint_option, profile_option, anonymous_option, json_option, debug_option)
writing_options = with_options(endpoint_option, profile_option, json_option, debug_option)


def print_json(value: Any) -> None:
    """Print a dataclass, a record or plain data as indented JSON on standard output."""
    click.echo(json.dumps(value, indent=2, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"actcache: warning: {printable(' '.join(str(message).split()))}", err=True)


class OneLineErrors(click.Group):
    """A group whose commands end with one clear line and exit code 1 (failed) or 2 (usage)."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _one_line
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:
            sys.stderr.close()  # whoever read the output has enough
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("actcache: stopped; run the same command again to go on", err=True)
            ctx.exit(130)
        except ActcacheError as error:
            self._fail(
                ctx,
                error,
                str(error),
                2 if isinstance(error, InvalidInput) and not isinstance(error, OutOfRange) else 1,
            )
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug"
            self._fail(ctx, error, text, 1)

    def _fail(self, ctx: click.Context, error: Exception, text: str, code: int) -> None:
        if ctx.meta.get("debug"):
            raise error
        click.echo(f"actcache: error: {printable(' '.join(text.split()))}", err=True)
        ctx.exit(code)
