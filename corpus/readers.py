"""Read the records of one file, and resume exactly after any record.

    for record, place in read_json(file, None): ...
    for record, place in read_json(file, place): ...      # the records after that place

A place is JSON. In a file that cannot seek, reading skips forward to it. A new format is one entry in READERS.
"""

import codecs
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet

from cli.errors import UserError, root_cause

PIECE = 1 << 16  # characters or bytes to read at once
Record = dict[str, Any]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any error in the context into a UserError: ``name`` cannot be read."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason}). Use iconv to convert it.") from error
    except Exception as error:  # the class depends on the format and on the library that reads a URL
        is_wrong = isinstance(error, (ContentError, pa.ArrowInvalid))
        fix = "Pass a valid file." if is_wrong else "Pass a readable file, or use --resume when it is readable again."
        raise UserError(f"{name}: cannot be read ({root_cause(error) or type(error).__name__}). {fix}") from error


class ContentError(ValueError):
    """The content of a file is wrong, so reading it again would not help."""


def open_file(path: str, has_ranges: bool = True) -> BinaryIO:
    """Open a path or a URL. A name that ends in .gz is decompressed.

    Without ``has_ranges``, an HTTP server is asked for the whole file at once.
    """
    if "://" in path:
        options = {} if has_ranges or not path.startswith("http") else {"block_size": 0}
        return io.BufferedReader(fsspec.open(path, "rb", compression="infer", **options).open())
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def skip_to(file: BinaryIO, offset: int) -> None:
    try:
        file.seek(offset)
    except (ValueError, OSError):  # an HTTP server without ranges
        while offset and (skipped := file.read(min(PIECE, offset))):
            offset -= len(skipped)


def read_text(file: BinaryIO, place: int | None) -> Iterator[tuple[str, int]]:
    """Yield the text of a file in pieces, with its line ends, without a byte order mark. A place counts characters."""
    text, num_read = io.TextIOWrapper(file, "utf-8-sig", newline=""), 0
    while piece := text.read(PIECE):
        if num_read == 0 and 10 * piece.count("\0") > len(piece):
            raise ContentError("every tenth character or more is a NUL: this is UTF-16 or no text")
        num_read += len(piece)
        if num_read > (place or 0):
            yield piece, num_read


def read_json(file: BinaryIO, place: list[int] | None) -> Iterator[tuple[Any, list[int]]]:
    """Yield the records of JSON Lines, or of a JSON list, which is read as a whole. A place is [bytes, lines]."""
    offset, line = place or (0, 0)
    if file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        with parsing():
            records = json.loads(file.read().decode("utf-8-sig"))
        yield from ((record, [0, i]) for i, record in enumerate(records[line:], line + 1))
        return
    skip_to(file, offset)
    for content in file:
        offset, line = offset + len(content), line + 1
        if content := content.removeprefix(codecs.BOM_UTF8).strip():
            with parsing(line - 1):
                record = json.loads(content.decode())
            yield record, [offset, line]


@contextmanager
def parsing(lines_before: int = 0) -> Iterator[None]:
    """Raise ContentError, which names the line, if a parser fails."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ContentError(f"line {lines_before + error.lineno}: {error.msg}") from None
    except csv.Error as error:
        raise ContentError(f"line {lines_before + 1}: {error}") from None


def read_csv(file: BinaryIO, place: list | None, delimiter: str = ",") -> Iterator[tuple[Record, list]]:
    """Yield the rows of a CSV file as they are written: all cells are text. A place is [bytes, lines, header]."""
    offset, line, header = place or (0, 0, None)
    skip_to(file, offset)
    csv.field_size_limit(sys.maxsize)

    def lines() -> Iterator[str]:
        nonlocal offset, line
        for content in file:
            offset, line = offset + len(content), line + 1
            yield content.decode("utf-8" if line > 1 else "utf-8-sig")

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        before = line
        with parsing(before):
            row = next(rows, None)
        if row is None:
            return
        if header is None:
            header = row or None
            if len(set(row)) < len(row):
                raise ContentError(f"line {line} names a column twice")
        elif len(row) == len(header):
            yield dict(zip(header, row, strict=True)), [offset, line, header]
        elif row:
            raise ContentError(f"line {before + 1} has {len(row)} cells, and the header has {len(header)}")


def read_parquet(file: BinaryIO, place: list[int] | None, columns: set[str] | None) -> Iterator:
    """Yield the rows of a Parquet file. A place is [row group, rows of it]."""
    table, (first, _) = pa.parquet.ParquetFile(file), place or (0, 0)
    names = [name for name in table.schema_arrow.names if columns is None or name in columns]

    def batches(group: int) -> Iterator[pa.RecordBatch]:
        some = next(table.iter_batches(1, [group], names), None)  # its size on the disk may be smaller
        return table.iter_batches(rows_at_once(some.nbytes, 1), [group], names) if some else iter([])

    return _rows(map(batches, range(first, table.num_row_groups)), place or [0, 0], columns)


def read_arrow(file: BinaryIO, place: list[int] | None, columns: set[str] | None) -> Iterator:
    """Yield the rows of an Arrow file of either format. A place is [record batch, rows of it]."""
    first, _ = place = place or [0, 0]
    if file.peek(6).startswith(b"ARROW1"):
        source = pa.ipc.open_file(file)
        batches = map(source.get_batch, range(first, source.num_record_batches))
    else:
        batches = islice(pa.ipc.open_stream(file), first, None)
    groups = (_slices(batch, rows_at_once(batch.nbytes, len(batch))) for batch in batches)
    return _rows(groups, place, columns)


def rows_at_once(num_bytes: int, num_rows: int) -> int:
    """Return how many rows to turn into Python objects at once: about 16 MB, and at most 1,000 rows."""
    return max(1, min(1000, (1 << 24) * num_rows // max(1, num_bytes)))


def _slices(batch: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    return (batch.slice(start, size) for start in range(0, len(batch), size))


def _rows(groups: Iterator[Iterable[pa.RecordBatch]], place: list[int], columns: set[str] | None) -> Iterator:
    """Yield the rows after ``place``."""
    first, num_read = place
    for group, batches in enumerate(groups, first):
        row = 0
        for batch in batches:
            names = [name for name in batch.schema.names if columns is None or name in columns]
            is_read = row + len(batch) <= num_read
            for record in [None] * len(batch) if is_read else batch.select(names).to_pylist():
                row += 1
                if row > num_read:
                    yield without_nulls(record), [group, row]
        num_read = 0


def without_nulls(value: Any, is_record: bool = True) -> Any:
    """Return the value without null keys below its columns. An Arrow table fills in the keys of all other rows."""
    if isinstance(value, list):
        return [without_nulls(item, False) for item in value]
    if isinstance(value, dict):
        items = ((key, without_nulls(item, False)) for key, item in value.items())
        return {key: item for key, item in items if is_record or item is not None}
    return value


READERS: dict[str, Callable | None] = {  # without a reader, a file is one document
    ".txt": None,
    ".md": None,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
FILES_HELP = f"files, directories or globs: {' '.join(READERS)}, also with .gz"
