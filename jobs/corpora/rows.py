"""Files of text: whole ones, JSON lines, and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

from actcache.jobs.corpora.document import Bad, BadRow, Document
from actcache.jobs.corpora.field import Field
from actcache.jobs.corpora.files import CorpusFile
from actcache.jobs.corpora.streams import decompressed

BOM = b"\xef\xbb\xbf"
LONGEST_CSV_FIELD = (1 << 31) - 1  # what a C long holds everywhere; the default, 128 KiB, is shorter than many texts


def whole_file(file: CorpusFile, source: int) -> Iterator[Document | BadRow]:
    """A text file: one document, byte for byte."""
    try:
        text = file.read().decode("utf-8")
        if not text:
            raise Bad("empty", "the file is empty")
        yield Document(source, 0, text)
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: {error.reason} at byte {error.start}"
        yield BadRow(source, 0, "not UTF-8", f"{file.where}: {what}; convert the file")
    except Bad as bad:
        yield bad.at(source, 0, file.where)


def json_lines(file: CorpusFile, source: int, field: Field) -> Iterator[Document | BadRow]:
    """A document a line; the row is the index of the line. Blank lines are no rows."""
    with decompressed(file) as lines:
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                yield Document(source, row, field.of(_parsed(line.removeprefix(BOM) if row == 0 else line)))
            except Bad as bad:
                yield bad.at(source, row, f"{file.where}, line {row + 1}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Bad("not UTF-8", f"not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise Bad("not JSON", f"not JSON: {error}") from None


def csv_rows(file: CorpusFile, source: int, field: Field) -> Iterator[Document | BadRow]:
    """A document a record after the header; a record may span lines, its index is the row."""
    csv.field_size_limit(LONGEST_CSV_FIELD)
    with decompressed(file) as data:
        text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = csv.DictReader(text, strict=True)
        for row in count():
            try:
                yield Document(source, row, field.of(_record(records)))
            except StopIteration:
                return
            except Bad as bad:
                escaped = bad.reason == "half a surrogate pair"  # a byte that is no UTF-8, as surrogateescape leaves it
                bad = Bad("not UTF-8", "not UTF-8 text") if escaped else bad
                yield bad.at(source, row, f"{file.where}, row {row}")


def _record(records: csv.DictReader[str]) -> dict[str, Any]:
    try:
        record: dict[Any, Any] = next(records)
    except csv.Error as error:
        raise Bad("not CSV", f"not CSV: {error}") from None
    record.pop(None, None)  # more cells than the header has names
    return record
