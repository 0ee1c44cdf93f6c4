"""The token stream: the tokens of all documents, one document after another.

A token without loss, such as a question's token, is stored as its bitwise complement: ~id instead of id.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cli.errors import SaveError, root_cause
from cli.hub import datasets_cache

# A document: 128 bits of the SHA-256 of its ids; 64 bits of the SHA-256 of its ids with loss mask; its number of
# tokens; the number of tokens with loss; the UTF-8 bytes of the text with loss.
DOCUMENT = np.dtype([("hash", "S16"), ("mask", "S8"), ("tokens", "<i8"), ("loss_tokens", "<i8"), ("bytes", "<i8")])


class TokenStream:
    """The tokens of documents, one document after another; a read-only, memory-mapped sequence of int32.

    ``files`` hold the tokens. ``documents``, of dtype DOCUMENT, begin at the tokens ``starts``, counted over all files.
    ``num_loss_tokens`` tokens carry loss; their text has ``num_bytes`` UTF-8 bytes.
    """

    def __init__(self, files: tuple[np.ndarray, ...], documents: np.ndarray, starts: np.ndarray):
        self._files, self.documents, self._starts = files, documents, starts
        self._file_starts = np.cumsum([0] + [len(file) for file in files])
        self.num_documents, self.num_tokens = len(documents), int(documents["tokens"].sum())
        self.num_loss_tokens, self.num_bytes = (int(documents[name].sum()) for name in ("loss_tokens", "bytes"))
        # A run is a range of consecutive tokens of one file. It has a start in the files and a start in this stream.
        ends = starts + documents["tokens"]
        is_first = np.append(True, (starts[1:] != ends[:-1]) | np.isin(starts[1:], self._file_starts))[: len(starts)]
        first_of_run = np.flatnonzero(is_first)
        self._document_starts = np.append(0, np.cumsum(documents["tokens"]))
        self._run_sources, self._run_starts = starts[first_of_run], self._document_starts[np.append(first_of_run, -1)]

    @property
    def counted_documents(self) -> str:
        """Return "1 document" or, for example, "1,234 documents"."""
        return f"{self.num_documents:,} document{'' if self.num_documents == 1 else 's'}"

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the tokens and their loss mask."""
        return hashlib.sha256(np.ascontiguousarray(self.documents)).hexdigest()

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return the tokens [start, stop) as a new int64 array, with ~id for a token without loss."""
        start, stop, _ = key.indices(len(self))
        parts = [np.empty(0, np.int32)]
        while start < stop:
            run = np.searchsorted(self._run_starts, start, side="right") - 1
            count = min(stop, self._run_starts[run + 1]) - start
            offset = self._run_sources[run] + start - self._run_starts[run]
            file = np.searchsorted(self._file_starts, offset, side="right") - 1
            offset -= self._file_starts[file]
            parts.append(self._files[file][offset : offset + count])
            start += count
        return np.concatenate(parts, dtype=np.int64)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the position of each token [start, stop) in its document, (tokens,) int64.

        For a document that begins before ``start``, positions count from ``start``.
        """
        indices = np.arange(start, min(stop, len(self)))
        begins = self._document_starts[np.searchsorted(self._document_starts, indices, side="right") - 1]
        return indices - np.maximum(begins, start)

    def first_documents(self, count: int, most: int) -> list[np.ndarray]:
        """Return at most the first ``most`` tokens of each of the first documents."""
        bounds = self._document_starts[: count + 1].tolist()
        return [self[start : min(stop, start + most)] for start, stop in pairwise(bounds)]

    def select(self, indices: np.ndarray) -> "TokenStream":
        """Return the stream of the documents at ``indices``, in this order; an index may repeat."""
        return TokenStream(self._files, self.documents[indices], self._starts[indices])


def concatenate(streams: Iterable[TokenStream]) -> TokenStream:
    """Return the documents of several streams as one stream."""
    streams = list(streams)
    offsets = np.cumsum([0] + [stream._file_starts[-1] for stream in streams])
    starts = [stream._starts + offset for stream, offset in zip(streams, offsets, strict=False)]
    files = tuple(file for stream in streams for file in stream._files)
    return TokenStream(files, np.concatenate([stream.documents for stream in streams]), np.concatenate(starts))


def token_ids(ids: np.ndarray) -> np.ndarray:
    """Return the ids, with or without loss."""
    return np.where(ids < 0, ~ids, ids)


def with_prefix(
    prefix: np.ndarray, ids: np.ndarray, positions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ids and positions with ``prefix`` before them, unless they begin with it. The first document gets it."""
    if not len(prefix) or np.array_equal(ids[: len(prefix)], prefix):
        return ids, positions
    if positions is not None:
        starts = np.append(np.flatnonzero(positions[1:] == 0) + 1, len(positions))
        positions = np.append(np.arange(len(prefix) + starts[0]), positions[starts[0] :])
    return np.append(prefix, ids), positions


class TokenPart(NamedTuple):
    """Consecutive tokens of one document, with ~id for a token without loss. The last part has the place after it."""

    ids: np.ndarray
    num_bytes: int
    is_last: bool
    place: Any


def cached_stream(key: str, parts: Iterator[TokenPart]) -> TokenStream:
    """Return the tokens that the cache holds for ``key``. If there are none, write the tokens of ``parts`` first.

    The cache is the folder HF_DATASETS_CACHE/tokens. It holds a flat file of int32 tokens and a file of DOCUMENT
    records. Each is written under another name, locked, and renamed. A second process waits for the first one. Raise
    SaveError if that fails.
    """
    folder = datasets_cache() / "tokens"
    tokens, documents = folder / f"{key}.tokens", folder / f"{key}.documents"
    if not _is_whole(tokens, documents):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            with _new_file(tokens) as file, _new_file(documents) as index:
                if not _is_whole(tokens, documents):  # another process may have written them before the lock
                    _write(parts, file, index)
                    for written, path in ((file, tokens), (index, documents)):
                        written.flush()
                        os.fsync(written.fileno())
                        os.replace(written.name, path)
        except OSError as error:
            fix = "Make it writable, make room, or set HF_DATASETS_CACHE to another folder."
            raise SaveError(f"{folder}: tokens cannot be written ({root_cause(error)}). {fix}") from error
    table = np.memmap(documents, DOCUMENT, "r")
    return TokenStream((np.memmap(tokens, np.int32, "r"),), table, np.cumsum(table["tokens"]) - table["tokens"])


def _is_whole(tokens: Path, documents: Path) -> bool:
    size = documents.stat().st_size if tokens.exists() and documents.exists() else 0
    if size == 0 or size % DOCUMENT.itemsize:
        return False
    return tokens.stat().st_size == 4 * int(np.memmap(documents, DOCUMENT, "r")["tokens"].sum())


def _write(parts: Iterator[TokenPart], file: BinaryIO, index: BinaryIO) -> None:
    digest, mask, counts = hashlib.sha256(), hashlib.sha256(), np.zeros(3, np.int64)
    for ids, num_bytes, is_last, _ in parts:
        file.write(np.ascontiguousarray(ids))
        digest.update(np.ascontiguousarray(token_ids(ids)))
        mask.update(ids >= 0)
        counts += len(ids), np.count_nonzero(ids >= 0), num_bytes
        if is_last:
            index.write(np.array([(digest.digest()[:16], mask.digest()[:8], *counts)], DOCUMENT))
            digest, mask, counts = hashlib.sha256(), hashlib.sha256(), np.zeros(3, np.int64)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` under another name, and lock it: wait for a process that writes it. Remove it at the end."""
    temporary = path.with_name(f"{path.name}.partial")
    while True:
        with open(temporary, "ab") as file:
            flock(file, LOCK_EX)
            if not temporary.exists() or not os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                continue  # it was renamed or removed before the lock
            file.truncate(0)
            try:
                yield file
            finally:
                temporary.unlink(missing_ok=True)
            return


def _remove_leftovers(folder: Path) -> None:
    """Remove the partial files of dead processes. A running process keeps its files locked."""
    for path in folder.glob("*.partial"):
        with suppress(OSError), open(path, "r+b") as file:
            flock(file, LOCK_EX | LOCK_NB)
            path.unlink()
