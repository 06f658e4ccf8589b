"""Where `actcache probe` takes labels from."""

from __future__ import annotations

import csv
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.clients.probe import by_token
from actcache.schemas.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from actcache.clients.whole import Whole

REGEX, FIELD = "token-regex:", "field:"
SOURCES = "FILE.npy, FILE.csv, token-regex:REGEX or field:NAME"


def labels_of(ds: Whole, source: str) -> np.ndarray:
    """Labels of every token, or of every document, as `--labels` says it.

    `FILE.npy` is one label a token or a document; `FILE.csv` has a line for each that has a label, under the header `token,label` or
    `document,label`; `token-regex:REGEX` is whether a token's text contains a match; `field:NAME` is an array of the dataset.

    Raises:
        InvalidInput: no such source, or a file that is none.
        NotFound: no such file, or no such field.
    """
    if source.startswith(REGEX):
        pattern = source.removeprefix(REGEX)
        try:
            found = re.compile(pattern)
        except re.error as error:
            raise InvalidInput(f"--labels {source}: no regular expression: {error}") from None
        return by_token(ds, lambda text: found.search(text) is not None)
    if source.startswith(FIELD):
        name = source.removeprefix(FIELD)
        if name not in ds.fields:
            raise NotFound(f"{ds.url}: no field {name!r}; there is {', '.join(ds.fields)}")
        return ds.tokens[name] if name in ds.tokens else ds.rows(name, 0, ds.n_tokens)
    path = Path(source)
    if path.suffix not in (".npy", ".csv"):
        raise InvalidInput(f"--labels {source}: give {SOURCES}")
    if not path.is_file():
        raise NotFound(f"--labels {source}: no such file")
    return _npy(path) if path.suffix == ".npy" else _csv(ds, path)


def _npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise InvalidInput(f"--labels {path}: no array of numbers, booleans or strings: {error}") from None


def _csv(ds: Whole, path: Path) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip().lower() for name in next(lines, [])]
            if header not in (["token", "label"], ["document", "label"]):
                raise InvalidInput(f"--labels {path}: the first line says what is in it: token,label or document,label")
            count = ds.n_tokens if header[0] == "token" else ds.n_documents
            rows = [row for row in islice(lines, count + 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"--labels {path}: not CSV in UTF-8: {error}") from None
    places = []
    for line, row in enumerate(rows, 2):
        if len(row) != 2 or not row[0].strip().isdecimal() or not int(row[0]) < count:
            raise InvalidInput(
                f"--labels {path}, line {line}: {','.join(row)[:60]!r} is no {header[0]} from 0 to {count - 1} and its label"
            )
        places.append(int(row[0]))
    if len(set(places)) < len(places):
        raise InvalidInput(f"--labels {path}: a {header[0]} has two labels")
    values = [row[1].strip() for row in rows]
    return _placed(values, places, count)


def _placed(values: list[str], places: list[int], count: int) -> np.ndarray:
    """Whole numbers where all values are, else floats where all are, else strings; empty ones are no labels."""
    for kind, none in ((int, -1), (float, np.nan)):
        try:
            numbers = [none if value == "" else kind(value) for value in values]
        except ValueError:
            continue
        found = np.full(count, none)
        found[places] = numbers
        return found
    labels = np.empty(count, object)
    labels[places] = [value or None for value in values]
    return labels
