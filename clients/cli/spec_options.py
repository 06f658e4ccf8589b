"""The options that `actcache build` and `actcache plan` share: what is built, and on which machines."""

from __future__ import annotations

from collections.abc import Callable
from glob import has_magic
from pathlib import Path
from typing import Any

import click

from actcache.clients.cli.common import F, with_options
from actcache.clients.cli.corpus_options import corpus_options, sequence_options
from actcache.jobs.batching import AUTO
from actcache.jobs.options import RETRIES
from actcache.schemas.dtypes import ACTIVATION_DTYPES
from actcache.schemas.spec import Spec

CLUSTER = ("workers", "scheduler", "scheduler_file", "gpus_per_worker", "retries")


class ManyCorpora(click.Command):
    """A command whose `--corpus` takes every word up to the next option, as a shell's glob leaves them.

    The last of them is the URL where no other word is one: `build --model M --corpus *.txt ./out.zarr`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite `--corpus a b` as `--corpus a --corpus b`."""
        corpora: list[str] = []
        others: list[str] = []
        words: list[str] = []
        flags = {
            name
            for p in self.params
            if isinstance(p, click.Option) and p.is_flag
            for name in (*p.opts, *p.secondary_opts)
        }
        index = 0
        while index < len(args):
            word = args[index]
            index += 1
            if word == "--":
                words += args[index:]
                break
            if word == "--corpus":
                taken: list[str] = []
                while index < len(args) and not args[index].startswith("-"):
                    taken.append(args[index])
                    index += 1
                if not taken:
                    raise click.UsageError("--corpus needs at least one file or glob", ctx)
                corpora += taken
            elif word.startswith("--corpus="):
                corpora.append(word.removeprefix("--corpus="))
            elif word.startswith("-") and word not in flags and "=" not in word and word not in ("-h", "--help"):
                others += args[index - 1 : index + 1]
                index += 1
            elif word.startswith("-"):
                others.append(word)
            else:
                words.append(word)
        spec_alone = len(words) == 1 and words[0].endswith(".toml")
        if len(corpora) > 1 and (not words or spec_alone):
            words.append(corpora.pop())
            if has_magic(words[-1]) or Path(words[-1]).is_file():
                raise click.UsageError(
                    f"no URL: {words[-1]!r} is a part of the corpus; say where the dataset goes", ctx
                )
        return super().parse_args(
            ctx, [*others, *(part for item in corpora for part in ("--corpus", item)), "--", *words]
        )


class TokensOrAuto(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """A number of tokens, or `auto`."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A word as a number, or as it is."""
        if value == AUTO:
            return AUTO
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is no number of tokens, nor 'auto'", param, ctx)


spec_options: Callable[[F], F] = with_options(
    click.option("--model", metavar="M", help="A hub id, or a folder that save_pretrained wrote."),
    click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model."),
    corpus_options,
    sequence_options,
    click.option(
        "--sites", metavar="PATTERN", help="What to store: 'resid', 'all', or globs of site names.  [default: resid]"
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", *ACTIVATION_DTYPES]), help="Stored dtype.  [default: auto, as computed]"
    ),
    click.option(
        "--compute-dtype",
        type=click.Choice(ACTIVATION_DTYPES),
        help="Dtype of the forward pass.  [default: the checkpoint's]",
    ),
    click.option(
        "--attention", metavar="A", help="sdpa, eager, flash_attention_2.  [default: sdpa where there is one]"
    ),
    click.option(
        "--with",
        "outputs",
        multiple=True,
        metavar="OUTPUT,…",
        help="Also store per token: loss, entropy (nats), topk=K (the K largest logits).",
    ),
    click.option(
        "--quantize", multiple=True, metavar="KIND,…", help="Also store the sites quantised, with loss: int8, fp8."
    ),
    click.option(
        "--only-quantized",
        flag_value=True,
        default=None,
        help="Leave out the exact arrays of the sites; with --quantize.",
    ),
    click.option("--no-head", "head", flag_value=False, default=None, help="Do not store final norm and unembedding."),
    click.option(
        "--batch-tokens",
        type=TokensOrAuto(),
        metavar="N|auto",
        help="Tokens a forward pass; auto tries what fits.  [default: 8192]",
    ),
    click.option("--batch-size", type=int, metavar="B", help="Sequences a forward pass instead, in their order."),
    click.option(
        "--compile", is_flag=True, default=None, help="Compile the model's blocks; for sites between them, as 'resid'."
    ),
    click.option("--block-tokens", type=int, metavar="T", help="Tokens a block and shard.  [default: about 64 MiB]"),
    click.option(
        "--chunk-tokens", type=int, metavar="t", help="Tokens a chunk, the least that is read.  [default: 512 KiB]"
    ),
    click.option("--model-license", metavar="ID", help="Licence to record.  [default: from the model's card]"),
    click.option("--corpus-license", metavar="ID", help="Licence of the corpus, to record."),
)

cluster_options: Callable[[F], F] = with_options(
    click.option("--workers", type=int, metavar="N", help="Run blocks in N processes of this machine."),
    click.option("--scheduler", metavar="ADDRESS", help="Run blocks on the Dask cluster of this scheduler."),
    click.option("--scheduler-file", metavar="FILE", help="The same, its address from a file."),
    click.option("--gpus-per-worker", type=int, metavar="G", help="GPUs of its own for each worker."),
    click.option(
        "--retries",
        type=int,
        default=RETRIES,
        show_default=True,
        metavar="R",
        help="Try a block R more times on a cluster.",
    ),
)


def spec_and_url(target: tuple[str, ...], options: dict[str, Any], adds: bool) -> tuple[Spec, str]:
    """The spec of the options, over a SPEC.toml if there is one, and the URL. `adds`: sites of the spec are left open.

    Raises:
        click.UsageError: one of them is missing.
    """
    if len(target) > 2 or (len(target) == 2 and not target[0].endswith(".toml")):
        raise click.UsageError(f"one URL, with a SPEC.toml before it or not; got: {' '.join(target)}")
    if len(target) == 1 and target[0].endswith(".toml"):
        raise click.UsageError(f"a URL after {target[0]}")
    fields: dict[str, Any] = Spec.from_toml(target[0]) if len(target) == 2 else {}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if adds and "sites" in given:
        raise click.UsageError("--sites is for a dataset's first build; give --add-sites alone to add to a sealed one")
    for name in ("model",) if adds else ("model", "corpus"):
        if name not in fields | given:
            raise click.UsageError(f"no {name}: give --{name}, or a SPEC.toml that has it")
    return Spec(**(fields | given)), target[-1]
