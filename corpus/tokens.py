"""The token stream: the tokens of all documents, one document after another.

A token without loss, such as one of a question, is stored as its bitwise complement: ~id instead of id.
"""

import hashlib

import datasets
import numpy as np

# The record of a document: 128 bits of the SHA-256 of its ids, its number of tokens, and how many of them carry loss.
# "bytes" counts the UTF-8 bytes of the text with loss.
DOCUMENT = np.dtype([("hash", "S16"), ("tokens", "<i8"), ("loss_tokens", "<i8"), ("bytes", "<i8")])
RULES = 1  # version of the tokenization rules; a new number makes cached tokens invalid


class TokenStream:
    """The tokens of documents, one document after another; a read-only, memory-mapped sequence of int32.

    ``documents``, of dtype DOCUMENT, are all documents of the table, or those with the indices ``numbers``, in that
    order. ``num_loss_tokens`` tokens carry loss; their text has ``num_bytes`` UTF-8 bytes. ``sha256`` identifies the
    tokens.
    """

    def __init__(self, table: datasets.Dataset, numbers: np.ndarray | None = None):
        self._table, self._selection = table, numbers
        rows, documents, hashes = (
            [row for chunk in table.data.column(name).chunks for row in chunk] for name in TOKEN_ROW
        )
        self._rows = [np.frombuffer(row.as_buffer(), np.int32) for row in rows]  # no copies
        self._row_starts = np.cumsum([0] + [len(row) for row in self._rows])
        documents = np.concatenate([np.frombuffer(row.as_buffer(), DOCUMENT) for row in documents])
        ends = np.cumsum(documents["tokens"])
        self.numbers = np.arange(len(ends)) if numbers is None else numbers
        self.documents, ends = documents[self.numbers], ends[self.numbers]
        self.num_documents = len(self.documents)
        self.num_loss_tokens, self.num_bytes = (int(self.documents[name].sum()) for name in ("loss_tokens", "bytes"))
        # A run is a range of consecutive tokens of the table. It has a start in the table and a start in this stream.
        starts = ends - self.documents["tokens"]
        first_of_run = np.flatnonzero(np.append(True, starts[1:] != ends[:-1])[: len(starts)])
        self._run_table_starts = starts[first_of_run]
        self._document_starts = np.append(0, np.cumsum(self.documents["tokens"]))
        self._run_starts = self._document_starts[np.append(first_of_run, len(starts))]
        selection = b"" if numbers is None else numbers.tobytes()
        self.sha256 = hashlib.sha256("".join(row.as_py() for row in hashes).encode() + selection).hexdigest()

    def __reduce__(self) -> tuple:
        return TokenStream, (self._table, self._selection)  # another process maps the same file; no tokens are copied

    def __len__(self) -> int:
        return int(self._run_starts[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return the tokens [start, stop) as a new int64 array, with ~id for a token without loss."""
        start, stop, _ = key.indices(len(self))
        parts = [np.empty(0, np.int32)]
        while start < stop:
            run = np.searchsorted(self._run_starts, start, side="right") - 1
            offset = self._run_table_starts[run] + start - self._run_starts[run]
            row = np.searchsorted(self._row_starts, offset, side="right") - 1
            offset -= self._row_starts[row]
            parts.append(self._rows[row][offset : offset + min(stop, self._run_starts[run + 1]) - start])
            start += len(parts[-1])
        return np.concatenate(parts, dtype=np.int64)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the position of each token [start, stop) in its document, (tokens,) int64.

        For a document that begins before ``start``, positions count from ``start``.
        """
        indices = np.arange(start, min(stop, len(self)))
        begins = self._document_starts[np.searchsorted(self._document_starts, indices, side="right") - 1]
        return indices - np.maximum(begins, start)

    def select(self, indices: np.ndarray) -> "TokenStream":
        """Return the stream of the documents at ``indices``, in this order; an index may repeat."""
        return TokenStream(self._table, self.numbers[indices])


# The ids are int32 in one binary value, because `datasets` would turn a list into Python numbers. The record of a
# document is in the row in which the document ends.
TOKEN_ROW = datasets.Features(
    {"input_ids": datasets.Value("binary"), "documents": datasets.Value("binary"), "sha256": datasets.Value("string")}
)


def token_ids(ids: np.ndarray) -> np.ndarray:
    """Return the ids, with or without loss."""
    return np.where(ids < 0, ~ids, ids)
