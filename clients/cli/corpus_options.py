"""The options of `actcache build` that say what is read and how it becomes sequences. Their names are the spec's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from actcache.clients.cli.common import F, with_options


def _flag(name: str, what: str) -> Any:
    return click.option(name, is_flag=True, default=None, help=what)


def _number(name: str, metavar: str, what: str) -> Any:
    return click.option(name, type=int, metavar=metavar, help=what)


corpus_options: Callable[[F], F] = with_options(
    click.option(
        "--corpus", multiple=True, metavar="C…", help="Files, quoted globs, s3:// or http(s)://, hf://datasets/…"
    ),
    click.option("--split", metavar="NAME", help="Split of a dataset.  [default: train]"),
    click.option("--dataset-config", metavar="NAME", help="Configuration of a hub dataset."),
    click.option("--text-field", metavar="NAME", help="Field of a row that holds its text.  [default: text]"),
    click.option("--tokens-field", metavar="NAME", help="Field of a row that holds its token ids."),
    click.option("--messages-field", metavar="NAME", help="Field of a row that holds a conversation."),
    click.option(
        "--token-dtype", type=click.Choice(["uint16", "uint32"]), help="Ids in .bin files.  [default: uint16]"
    ),
    _flag("--split-at-eos", "Cut .npy and .bin tokens into documents after each EOS."),
    _flag("--corpus-anonymous", "Sign no requests for an S3 corpus: for public buckets."),
    _flag("--strict", "Stop at the first row that cannot be used, instead of counting it."),
)

sequence_options: Callable[[F], F] = with_options(
    click.option(
        "--context", type=int, metavar="N", help="Longest sequence in tokens.  [default: 1024, or the model's]"
    ),
    click.option(
        "--long",
        type=click.Choice(["split", "truncate", "stride"]),
        help="What becomes of longer documents.  [default: split]",
    ),
    _number("--stride", "N", "Tokens from one window to the next, with --long stride."),
    _flag("--pack", "Join documents, each ended by EOS, and cut the stream into contexts."),
    click.option(
        "--bos",
        type=click.Choice(["tokenizer", "always", "never"]),
        help="BOS: as the tokenizer adds it, or before every sequence.",
    ),
    _number("--bos-id", "ID", "Id of the BOS token.  [default: the tokenizer's]"),
    _number("--eos-id", "ID", "Id of the EOS token.  [default: the tokenizer's]"),
    _number("--min-tokens", "N", "Drop documents of fewer tokens."),
    _number("--max-document-tokens", "N", "Drop documents of more tokens."),
    _number("--shuffle", "SEED", "Take the documents in a random order."),
    _number("--sample", "N", "Take N documents at random."),
    _number("--max-documents", "N", "Stop after this many documents."),
    _number("--max-tokens", "N", "Stop after this many tokens of the corpus."),
)
