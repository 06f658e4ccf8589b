"""Files of columns: Parquet, and the Arrow files of a saved dataset. Read in portions of rows, the one column alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actcache.jobs.corpora.document import Bad, BadRow, Document
from actcache.jobs.corpora.field import Field
from actcache.jobs.corpora.files import CorpusFile, LocalFile
from actcache.schemas.errors import InvalidInput

ROWS_AT_ONCE, BYTES_AT_ONCE = 256, 16 << 20
BUFFER = 1 << 20


def parquet_rows(file: CorpusFile, source: int, field: Field) -> Iterator[Document | BadRow]:
    """A document a row of a Parquet file.

    Raises:
        InvalidInput: it is no Parquet file.
    """
    import pyarrow.parquet

    with file.open(seekable=True) as opened, _arrow_errors(file, "Parquet"):
        table = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=BUFFER)
        names = table.schema_arrow.names
        if field.name not in names:
            yield from _absent(file, source, field, names, 0, table.metadata.num_rows)
            return
        row = 0
        size = _rows_at_once(table.metadata)
        for batch in table.iter_batches(batch_size=size, columns=[field.name], use_threads=False):
            yield from _rows(file, source, field, batch.column(0), row, names)
            row += len(batch)


def parquet_row_count(file: CorpusFile) -> int:
    """How many rows a Parquet file has, as its footer says.

    Raises:
        InvalidInput: it is no Parquet file.
    """
    import pyarrow.parquet

    with file.open(seekable=True) as opened, _arrow_errors(file, "Parquet"):
        return int(pyarrow.parquet.ParquetFile(opened, pre_buffer=False).metadata.num_rows)


def _rows_at_once(metadata: Any) -> int:
    """How many rows have some 16 MiB where they are largest."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1)
    return max(1, min(ROWS_AT_ONCE, int(BYTES_AT_ONCE / max(largest, 1))))


def arrow_rows(file: CorpusFile, source: int, field: Field) -> Iterator[Document | BadRow]:
    """A document a row of an Arrow stream file, as a dataset's `save_to_disk` writes them.

    Raises:
        InvalidInput: it is no such file.
    """
    import pyarrow

    with file.open() as opened, _arrow_errors(file, "Arrow"):
        row = 0
        with pyarrow.ipc.open_stream(opened) as batches:
            names = batches.schema.names
            for batch in batches:
                if field.name in names:
                    yield from _rows(file, source, field, batch.column(names.index(field.name)), row, names)
                else:
                    yield from _absent(file, source, field, names, row, len(batch))
                row += len(batch)


def arrow_row_count(file: LocalFile) -> int:
    """How many rows an Arrow stream file has; what is in them is passed over.

    Raises:
        InvalidInput: it is no such file.
    """
    import pyarrow

    with (
        _arrow_errors(file, "Arrow"),
        pyarrow.memory_map(str(file.path)) as opened,
        pyarrow.ipc.open_stream(opened) as batches,
    ):
        return sum(len(batch) for batch in batches)


def _rows(
    file: CorpusFile, source: int, field: Field, column: Any, first: int, names: list[str]
) -> Iterator[Document | BadRow]:
    values = _values(column, field)
    for index in range(len(column)):
        try:
            value = values[index] if values is not None else _value(column[index], field)
            if value is None:
                raise Bad("field missing", field.absent(names))
            yield Document(source, first + index, field.content(value, names))
        except Bad as bad:
            yield bad.at(source, first + index, f"{file.where}, row {first + index}")


def _values(column: Any, field: Field) -> list[Any] | None:
    """All values of a column at once, None where they must be taken one by one."""
    if field.holds == "tokens":
        return None
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return None


def _value(scalar: Any, field: Field) -> Any:
    import pyarrow

    if not scalar.is_valid:
        return None
    if field.holds == "tokens" and isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
        values = scalar.values
        if pyarrow.types.is_integer(values.type) and values.null_count == 0:
            return values.to_numpy(zero_copy_only=False)
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise Bad("not UTF-8", f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _absent(file: CorpusFile, source: int, field: Field, names: list[str], first: int, rows: int) -> Iterator[BadRow]:
    for row in range(first, first + rows):
        yield BadRow(source, row, "field missing", f"{file.where}, row {row}: {field.absent(names)}")


@contextmanager
def _arrow_errors(file: CorpusFile, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"{file.where}: not a {kind} file that can be read: {first}") from None
