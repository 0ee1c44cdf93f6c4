"""Tokenize documents: each document's own tokens, however long it is, in overlapping windows."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, warn
from corpus.chat import CHAT_TEMPLATE
from corpus.documents import Documents
from corpus.flags import TextConfig
from corpus.tokens import DOCUMENT, RULES, TOKEN_ROW, TokenStream, token_ids

# A document longer than a window is tokenized in windows that overlap, so that memory stays flat (see `_join`).
WINDOW_CHARACTERS = 1 << 16
OVERLAP_CHARACTERS = 1 << 10
ROW_CHARACTERS = 1 << 20  # characters to tokenize at once: enough for the tokenizer's threads, little enough for memory


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Return the tokens of the documents, each followed by the end-of-text token. `datasets` caches them.

    No special tokens are added. If there are conversations and the tokenizer has no chat template, it gets a plain one.
    """
    end = end_of_text_id(tokenizer)
    tokenizer([""])  # switches off truncation and padding, which the tokenizer's file may ask for
    if lacks_template := documents.has_messages and not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    template = tokenizer.chat_template if documents.has_messages else None
    key = (
        f"{documents.fingerprint}\n{tokenizer_fingerprint(tokenizer)}\n{end}\n{template}\n{TOKEN_ROW}{DOCUMENT}{RULES}"
    )
    try:
        table = datasets.Dataset.from_generator(
            token_rows,
            features=TOKEN_ROW,
            gen_kwargs={"documents": documents, "tokenizer": tokenizer, "end": end},
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            writer_batch_size=1,  # rows are large: a buffer of a thousand would hold the corpus in memory
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if lacks_template:
        warn("the tokenizer has no chat template; a plain one is used and saved with the model")
    return TokenStream(table)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a document: the eos token, or the sep token for BERT's family."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise UserError(
        f"--tokenizer {tokenizer.name_or_path}: has no eos or sep token to end documents with. "
        f"Set eos_token in its tokenizer_config.json."
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that decides the ids.

    That is a whole fast tokenizer, or the class, settings and vocabulary of a slow one.
    """
    if tokenizer.is_fast:
        description = tokenizer.backend_tokenizer.to_str()
    else:
        settings = sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items())
        description = f"{type(tokenizer).__name__}{settings}{sorted(tokenizer.get_vocab().items())}"
    return hashlib.sha256(description.encode()).hexdigest()


@dataclass
class _Window:
    """A part of a document, from character ``start`` on."""

    text: str
    start: int
    is_last: bool
    num_bytes: int  # UTF-8 bytes with loss that no earlier window has counted
    bounds: list[int]  # characters of the document at which text without loss begins, ends, begins, ...
    ids: np.ndarray | None = None  # ~id for a token without loss
    starts: np.ndarray | None = None  # the character of the document at which each token starts
    first_own: int = 0  # tokens before this index belong to the previous window


def _windows(documents: Documents, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[_Window]:
    for pieces in documents.with_loss_mask(tokenizer):
        text, start, num_bytes, bounds = "", 0, 0, []
        for piece, has_loss in pieces:
            num_bytes += len(piece.encode()) if has_loss else 0
            if has_loss == len(bounds) % 2:
                bounds.append(start + len(text))
            for offset in range(0, len(piece), size):
                text += piece[offset : offset + size]
                while len(text) > size:
                    yield _Window(text[:size], start, False, num_bytes, bounds)
                    step, num_bytes = size - OVERLAP_CHARACTERS, 0
                    text, start = text[step:], start + step
        yield _Window(text, start, True, num_bytes, bounds)


@dataclass
class _Record:
    """Collects the DOCUMENT record of one document."""

    digest: Any = field(default_factory=hashlib.sha256)
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_bytes: int = 0

    def add(self, ids: np.ndarray) -> None:
        """Add tokens, with ~id for a token without loss."""
        self.digest.update(np.ascontiguousarray(token_ids(ids), np.int32))
        self.num_tokens += len(ids)
        self.num_loss_tokens += int(np.count_nonzero(ids >= 0))

    def as_tuple(self) -> tuple[bytes, int, int, int]:
        return self.digest.digest()[:16], self.num_tokens, self.num_loss_tokens, self.num_bytes


def token_rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[dict[str, Any]]:
    """Yield the tokens of the documents as rows of TOKEN_ROW, each of about ROW_CHARACTERS characters of text."""
    # A slow (pure Python) tokenizer gives no character offsets, so its documents stay whole.
    windows = _windows(documents, tokenizer, WINDOW_CHARACTERS if tokenizer.is_fast else sys.maxsize)
    previous: _Window | None = None  # of the same document
    record = _Record()
    for batch in _batches(windows):
        _encode(batch, tokenizer)
        ids, records = [np.empty(0, np.int32)], []
        for window in batch:
            parts: list[np.ndarray] = []  # tokens of the document that later windows cannot change
            record.num_bytes += window.num_bytes
            if previous is not None:
                window = _join(previous, window, parts, tokenizer)
            previous = None if window.is_last else window
            if window.is_last:
                end_has_loss = len(window.bounds) % 2 == 0
                end_ids = [end if end_has_loss else ~end] if documents.has_end_of_text else []
                parts += [window.ids[window.first_own :], np.array(end_ids, np.int32)]
            for part in parts:
                record.add(part)
            if window.is_last:
                records.append(record.as_tuple())
                record = _Record()
            ids += parts
        data = np.concatenate(ids).tobytes()
        yield {
            "input_ids": data,
            "documents": np.array(records, DOCUMENT).tobytes(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def _batches(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    batch, characters = [], 0
    for window in windows:
        batch.append(window)
        characters += len(window.text)
        if characters >= ROW_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(windows: list[_Window], tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the ids of the windows. Set the start of each token as well if a window needs it."""
    has_loss_mask = any(window.bounds for window in windows)
    needs_offsets = has_loss_mask or any(window.start or not window.is_last for window in windows)
    texts = [window.text for window in windows]
    if not tokenizer.is_fast:
        slow = f"--loss_on completion: {type(tokenizer).__name__} is a slow tokenizer without character offsets"
        require(not has_loss_mask, f"{slow}. Use --loss_on all, or --tokenizer with a fast one.")
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)  # no warning about long texts
        for window, ids in zip(windows, encoded["input_ids"], strict=True):
            window.ids = np.asarray(ids, np.int32)
        return
    # Call the backend directly: transformers would make Python lists of every field of the encoding.
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if needs_offsets else backend.encode_batch_fast  # the fast one has no offsets
    for window, encoding in zip(windows, encode(texts, add_special_tokens=False), strict=True):
        window.ids = np.asarray(encoding.ids, np.int32)
        if needs_offsets:
            window.starts, ends = window.start + np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
            # The last character decides: many tokens begin with the space before the text that carries loss.
            side = np.searchsorted(window.bounds, np.maximum(ends - 1, window.starts), side="right")
            window.ids = np.where(side % 2 == 0, window.ids, ~window.ids)


def _join(left: _Window, right: _Window, parts: list[Any], tokenizer: PreTrainedTokenizerBase) -> _Window:
    """Append the tokens that later windows cannot change to ``parts``; return the window with the other tokens.

    The tokens of a word may depend on the text near it, but not on text far away. If 8 tokens on either side agree in
    both windows, the whole text has the same tokens, and the windows are joined there. If they do not agree, both
    windows are tokenized as one.
    """
    middle = (right.start + left.start + len(left.text)) // 2
    i, j = np.searchsorted(left.starts, middle), np.searchsorted(right.starts, middle)
    near_left, near_right = slice(max(0, i - 8), i + 8), slice(max(0, j - 8), j + 8)
    if np.array_equal(left.ids[near_left], right.ids[near_right]) and np.array_equal(
        left.starts[near_left], right.starts[near_right]
    ):
        parts.append(left.ids[left.first_own : i])
        right.first_own = j
        return right
    merged = _Window(left.text[: right.start - left.start] + right.text, left.start, right.is_last, 0, right.bounds)
    _encode([merged], tokenizer)
    merged.first_own = np.searchsorted(merged.starts, left.starts[left.first_own]) if left.first_own else 0
    return merged


def load_stream(config: TextConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase, name: str) -> TokenStream:
    """Return the tokens of the documents, without long ones if they are to be dropped.

    Print the number of long documents and of tokens with loss, if either matters. ``name`` is the label of that line.
    """
    stream, drops = tokenize(documents, tokenizer), config.long_documents == "drop"
    is_long = stream.documents["tokens"] > config.block_size
    if drops:
        count = f"all {len(is_long):,} documents of the {name} text are longer than --block_size {config.block_size}"
        require(not is_long.all(), f"--long_documents drop: {count}. Use a larger block, or --long_documents split.")
        stream = stream.select(np.flatnonzero(~is_long))
    if drops or stream.num_loss_tokens < len(stream):
        print(
            f"{name:<10}{is_long.sum():,} of {len(is_long):,} documents are longer than {config.block_size} tokens: "
            f"{'dropped' if drops else 'split'}; {stream.num_loss_tokens:,} of {len(stream):,} tokens carry loss"
        )
    return stream
