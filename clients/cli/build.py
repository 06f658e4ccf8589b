"""`actcache build` and `actcache seal`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from pathlib import Path
from typing import Any

import click

from actcache.cache.added import seal_finished
from actcache.cache.seal import seal
from actcache.cache.store import open_store
from actcache.clients.cli.common import print_json, writing_options
from actcache.clients.cli.progress import reporter
from actcache.jobs.build import STAGES, BuildResult, build
from actcache.schemas.dtypes import ACTIVATION_DTYPES
from actcache.schemas.spec import Spec


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


@click.command("build", cls=ManyCorpora)
@click.argument("target", nargs=-1, required=True, metavar="[SPEC.toml] URL")
@click.option("--model", metavar="M", help="A hub id, or a folder that save_pretrained wrote.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@click.option("--corpus", multiple=True, metavar="C…", help="Text or .jsonl[.gz|.zst] files, or quoted globs.")
@click.option("--text-field", metavar="NAME", help="Field of a JSONL row that holds its text.  [default: text]")
@click.option("--context", type=int, metavar="N", help="Longest sequence in tokens.  [default: 1024, or the model's]")
@click.option(
    "--sites", metavar="PATTERN", help="What to store: 'resid', 'all', or globs of site names.  [default: resid]"
)
@click.option(
    "--add-sites", metavar="PATTERN", help="Add these sites to the sealed dataset at URL; needs --model, no --corpus."
)
@click.option(
    "--dtype", type=click.Choice(["auto", *ACTIVATION_DTYPES]), help="Stored dtype.  [default: auto, as computed]"
)
@click.option(
    "--compute-dtype",
    type=click.Choice(ACTIVATION_DTYPES),
    help="Dtype of the forward pass.  [default: the checkpoint's]",
)
@click.option("--attention", metavar="A", help="sdpa, eager, flash_attention_2.  [default: sdpa where there is one]")
@click.option(
    "--with",
    "outputs",
    multiple=True,
    metavar="OUTPUT,…",
    help="Also store per token: loss, entropy (nats), topk=K (the K largest logits).",
)
@click.option(
    "--quantize", multiple=True, metavar="KIND,…", help="Also store the sites quantised, with loss: int8, fp8."
)
@click.option(
    "--only-quantized",
    flag_value=True,
    default=None,
    help="Leave out the exact arrays of the sites; with --quantize.",
)
@click.option("--no-head", "head", flag_value=False, default=None, help="Do not store final norm and unembedding.")
@click.option("--max-tokens", type=int, metavar="N", help="Stop after this many tokens of the corpus.")
@click.option("--batch-size", type=int, metavar="B", help="Sequences a forward pass.  [default: about 8192 tokens]")
@click.option("--block-tokens", type=int, metavar="T", help="Tokens a block and shard.  [default: about 64 MiB]")
@click.option(
    "--chunk-tokens", type=int, metavar="t", help="Tokens a chunk, the least that is read.  [default: 512 KiB]"
)
@click.option("--model-license", metavar="ID", help="Licence to record.  [default: from the model's card]")
@click.option("--corpus-license", metavar="ID", help="Licence of the corpus, to record.")
@click.option("--stage", type=click.Choice(STAGES), default="all", help="Stop after a stage.", show_default=True)
@writing_options
def build_command(
    target: tuple[str, ...],
    add_sites: str | None,
    stage: str,
    endpoint_url: str | None,
    profile: str | None,
    as_json: bool,
    corpus: tuple[str, ...],
    outputs: tuple[str, ...],
    quantize: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a model over a corpus and store what its sites hold in a sealed dataset at URL.

    Run the same command again to resume one that was stopped; on a sealed dataset it does nothing.

    \b
    actcache build s3://lab/gpt2-owt --model openai-community/gpt2 --corpus 'owt/*.jsonl.zst' --dtype bfloat16
    actcache build spec.toml ./gpt2-owt.zarr
    actcache build ./gpt2-owt.zarr --model openai-community/gpt2 --add-sites 'blocks.*.hook_attn_out'
    """
    if len(target) > 2 or (len(target) == 2 and not target[0].endswith(".toml")):
        raise click.UsageError(f"one URL, with a SPEC.toml before it or not; got: {' '.join(target)}")
    if len(target) == 1 and target[0].endswith(".toml"):
        raise click.UsageError(f"a URL after {target[0]}")
    fields: dict[str, Any] = Spec.from_toml(target[0]) if len(target) == 2 else {}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"corpus": corpus} if corpus else {}
    given |= {"outputs": outputs} if outputs else {}
    given |= {"quantize": quantize} if quantize else {}
    if add_sites is not None and "sites" in given:
        raise click.UsageError("--sites is for a dataset's first build; give --add-sites alone to add to a sealed one")
    for name in ("model", "corpus") if add_sites is None else ("model",):
        if name not in fields | given:
            raise click.UsageError(f"no {name}: give --{name}, or a SPEC.toml that has it")
    spec = Spec(**(fields | given))
    with reporter() as show:
        result = build(
            spec,
            target[-1],
            add_sites=add_sites,
            endpoint_url=endpoint_url,
            profile=profile,
            stage=stage,
            reporter=show,
        )
    if as_json:
        print_json(result)
    else:
        click.echo(_said(result))


def _said(result: BuildResult) -> str:
    if result.state == "tokenised":
        return f"{result.url}: tokens stored; run the same command without --stage to go on"
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
