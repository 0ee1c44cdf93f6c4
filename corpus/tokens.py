"""The token stream: the tokens of all documents, one after another.

A token without loss, such as one of a question whose answer is learnt, is stored as its bitwise complement.
"""

import hashlib

import datasets
import numpy as np

# What is kept of each document: 128 bits of the SHA-256 of its ids, the number of its tokens, of those that are scored,
# and the UTF-8 bytes of the text that is scored.
DOCUMENT = np.dtype([("hash", "S16"), ("tokens", "<i8"), ("loss_tokens", "<i8"), ("bytes", "<i8")])
RULES = 1  # to be counted up where the same text would give other tokens: those that are cached are then made anew


class TokenStream:
    """The tokens of some documents, one after another; a read-only, memory-mapped sequence of int32.

    ``documents`` (of dtype DOCUMENT) are the table's, or those ``numbers`` of the table's, in that order.
    ``num_loss_tokens`` tokens are scored, of text with ``num_bytes`` in UTF-8. ``sha256`` is of the tokens.
    """

    def __init__(self, table: datasets.Dataset, numbers: np.ndarray | None = None):
        self._table, self._chosen = table, numbers
        rows, documents, sums = (
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
        starts = ends - self.documents["tokens"]
        begins = np.flatnonzero(
            np.append(True, starts[1:] != ends[:-1])[: len(starts)]
        )  # of runs of the table's tokens
        self._begins = starts[begins]
        self._document_starts = np.append(0, np.cumsum(self.documents["tokens"]))
        self._starts = self._document_starts[np.append(begins, len(starts))]
        chosen = b"" if numbers is None else numbers.tobytes()
        self.sha256 = hashlib.sha256("".join(row.as_py() for row in sums).encode() + chosen).hexdigest()

    def __reduce__(self) -> tuple:
        return TokenStream, (self._table, self._chosen)  # a worker process maps the same file; no tokens are copied

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """Returns the tokens [start, stop) as a new int64 array, those that are not scored as ~id."""
        start, stop, _ = place.indices(len(self))
        parts = [np.empty(0, np.int32)]
        while start < stop:
            run = np.searchsorted(self._starts, start, side="right") - 1
            begin = self._begins[run] + start - self._starts[run]
            row = np.searchsorted(self._row_starts, begin, side="right") - 1
            begin -= self._row_starts[row]
            parts.append(self._rows[row][begin : begin + min(stop, self._starts[run + 1]) - start])
            start += len(parts[-1])
        return np.concatenate(parts, dtype=np.int64)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """How far each of the tokens [start, stop) is from the start of its document, or else from ``start``."""
        numbers = np.arange(start, min(stop, len(self)))
        begins = self._document_starts[np.searchsorted(self._document_starts, numbers, side="right") - 1]
        return numbers - np.maximum(begins, start)

    def select(self, indices: np.ndarray) -> "TokenStream":
        """The stream of these of the documents, in this order; one may be there repeatedly."""
        return TokenStream(self._table, self.numbers[indices])


# The ids are int32, one after the other; of a list of them `datasets` would make Python numbers. A document's record
# stands in the row in which the document ends.
TOKEN_ROW = datasets.Features(
    {"input_ids": datasets.Value("binary"), "documents": datasets.Value("binary"), "sha256": datasets.Value("string")}
)


def token_ids(ids: np.ndarray) -> np.ndarray:
    """The ids, scored or not."""
    return np.where(ids < 0, ~ids, ids)
