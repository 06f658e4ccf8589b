"""What each layer knows of the part of speech of a piece of Python: `python examples/code_tokens_probe.py [DATASET]`.

The dataset, `./demo.zarr` unless given, is of Python files. Python's own tokenizer says what every character is (a keyword, a name,
a string, …); each token of the model has the class of most of its characters. A linear probe on each layer is to tell it.
See docs/examples/code-tokens-probe.md.
"""

from __future__ import annotations

import argparse
import io
import keyword
import tokenize
from collections.abc import Iterator

import numpy as np

import actcache as ac

CLASSES = {tokenize.NAME: "name", tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.COMMENT: "comment"}


def spans(text: str) -> Iterator[tuple[int, int, str]]:
    """The class of the characters [start, end) of a Python file, as far as it is one; white space between them has none."""
    lines = list(io.StringIO(text))
    begins = np.cumsum([0, *map(len, lines)])
    try:
        for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
            if token.string.strip():
                kind = "keyword" if keyword.iskeyword(token.string) else CLASSES.get(token.type, "string")
                (row, column), (last_row, last_column) = token.start, token.end
                yield int(begins[row - 1]) + column, int(begins[last_row - 1]) + last_column, kind
    except (tokenize.TokenError, SyntaxError):
        return  # the last file may be cut off


def classes(ds: ac.Dataset) -> np.ndarray:
    """The class of every token: that of its characters, or `whitespace`."""
    labels = ac.probe.by_span(ds, spans)
    none = np.array([label is None for label in labels])
    return np.where(none & ac.probe.by_token(ds, str.isspace), "whitespace", labels)


def by_table(ds: ac.Dataset, labels: np.ndarray, tokens: int) -> float:
    """The share of tokens of odd documents whose class is their id's most frequent one in the even documents."""
    ids, odd = ds.tokens["token_id"][:tokens], ds.tokens["document"][:tokens] % 2 == 1
    there = np.array([label is not None for label in labels[:tokens]])
    kinds, number = np.unique(labels[:tokens][there].astype(str), return_inverse=True)
    ids, odd = ids[there], odd[there]
    counts = np.zeros((ids.max() + 1, len(kinds)))
    np.add.at(counts, (ids[~odd], number[~odd]), 1)
    most = counts.sum(axis=0).argmax()
    best = np.where(counts.any(axis=1), counts.argmax(axis=1), most)
    return float((best[ids[odd]] == number[odd]).mean())


def main() -> None:
    """Label, probe, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", default="demo.zarr")
    parser.add_argument("--method", choices=["ridge", "logistic"], default="ridge")
    parser.add_argument("--max-tokens", type=int, default=250_000)
    parser.add_argument("--csv", help="write the measures there")
    asked = parser.parse_args()
    ds = ac.open(asked.dataset)
    labels = classes(ds)
    there = [label for label in labels[: asked.max_tokens] if label is not None]
    kinds, counts = np.unique(there, return_counts=True)
    print("share of tokens:", ", ".join(f"{k} {c / len(there):.3f}" for k, c in zip(kinds, counts, strict=True)))
    print(f"right by a table of token ids alone: {by_table(ds, labels, asked.max_tokens):.4f}")
    alphas = None if asked.method == "ridge" else [1e-4 * len(there)]
    probe = ac.probe.fit(ds, labels, method=asked.method, alphas=alphas, held_out=0.2, max_tokens=asked.max_tokens)
    print(probe)
    for name in ("accuracy", "selectivity"):
        low, high = probe.results.interval(name)
        print(
            name,
            "95 %:",
            ", ".join(f"{label} {a:.4f} to {b:.4f}" for label, a, b in zip(probe.labels, low, high, strict=True)),
        )
    if asked.csv:
        print(probe.results.to_csv(asked.csv))


if __name__ == "__main__":
    main()
