"""Documents -> token ids, cached by `datasets`. Long documents are tokenized in overlapping windows."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
ROW_CHARACTERS = 1 << 20  # text tokenized at once: enough for the tokenizer's threads, little enough for memory


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Tokenizes without special tokens; each document is followed by the end-of-text token. Cached by `datasets`.

    Where there are conversations, a tokenizer without a chat template is given one.
    """
    end = end_of_text_id(tokenizer)
    tokenizer([""])  # switches off the truncation and padding that its file may ask for
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
            writer_batch_size=1,  # rows are large: buffering a thousand of them would hold the corpus in memory
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if lacks_template:
        warn("the tokenizer has no chat template; a plain one is used, and saved with the model")
    return TokenStream(table)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a document: the tokenizer's end-of-sequence token, for BERT's family its separator."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise UserError(
        f"--tokenizer {tokenizer.name_or_path}: it has neither an eos nor a sep token to end documents with; "
        f"set eos_token in its tokenizer_config.json"
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids: the whole fast tokenizer, or class, settings and vocabulary of a slow one."""
    if tokenizer.is_fast:
        description = tokenizer.backend_tokenizer.to_str()
    else:
        settings = sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items())
        description = f"{type(tokenizer).__name__}{settings}{sorted(tokenizer.get_vocab().items())}"
    return hashlib.sha256(description.encode()).hexdigest()


@dataclass
class _Window:
    """A stretch of a document, from character ``start``; ``num_bytes`` are of its scored text, but once a document."""

    text: str
    start: int
    last: bool
    num_bytes: int
    bounds: list[int]  # the characters of the document where what is not scored begins, ends, begins, ...
    ids: np.ndarray | None = None  # ~id where a token is not scored
    starts: np.ndarray | None = None  # the character of the document at which each token starts
    owned: int = 0  # tokens before this index belong to the window before


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


def token_rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[dict[str, Any]]:
    # A slow (pure Python) tokenizer cannot say where its tokens start: its documents stay whole.
    windows = _windows(documents, tokenizer, WINDOW_CHARACTERS if tokenizer.is_fast else sys.maxsize)
    before: _Window | None = None  # a window whose document goes on
    digest, num_tokens, num_loss_tokens, num_bytes = hashlib.sha256(), 0, 0, 0  # of a document
    for batch in _batches(windows):
        _encode(batch, tokenizer)
        ids, records = [], []
        for window in batch:
            parts: list[np.ndarray] = []  # what is final of the document
            num_bytes += window.num_bytes
            if before is not None:
                window = _join(before, window, parts, tokenizer)
            before = None if window.last else window
            if window.last:
                last = [~end if len(window.bounds) % 2 else end] if documents.ended else []
                parts += [window.ids[window.owned :], np.array(last, np.int32)]
            for part in parts:
                digest.update(token_ids(part) if window.bounds else part)
                num_tokens, num_loss_tokens = num_tokens + len(part), num_loss_tokens + np.count_nonzero(part >= 0)
            if window.last:
                records.append((digest.digest()[:16], num_tokens, num_loss_tokens, num_bytes))
                digest, num_tokens, num_loss_tokens, num_bytes = hashlib.sha256(), 0, 0, 0
            ids += parts
        data, ended = np.concatenate([np.empty(0, np.int32), *ids]).tobytes(), np.array(records, DOCUMENT).tobytes()
        yield {"input_ids": data, "documents": ended, "sha256": hashlib.sha256(data).hexdigest()}


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
    with_loss_mask = any(window.bounds for window in windows)
    in_parts = with_loss_mask or any(window.start or not window.last for window in windows)
    texts = [window.text for window in windows]
    if not tokenizer.is_fast:
        slow = f"--loss_on completion: {type(tokenizer).__name__} is a slow tokenizer, which cannot say where tokens"
        require(not with_loss_mask, f"{slow} start; give --loss_on all, or a fast one with --tokenizer")
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)  # no warning about long texts
        for window, ids in zip(windows, encoded["input_ids"], strict=True):
            window.ids = np.asarray(ids, np.int32)
        return
    # Called directly, as transformers would make lists of all that it knows about a token.
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if in_parts else backend.encode_batch_fast  # which knows no offsets
    for window, encoding in zip(windows, encode(texts, add_special_tokens=False), strict=True):
        window.ids = np.asarray(encoding.ids, np.int32)
        if in_parts:
            window.starts, ends = window.start + np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
            # The last character decides: many tokens begin with the space that stands before what is scored.
            side = np.searchsorted(window.bounds, np.maximum(ends - 1, window.starts), side="right")
            window.ids = np.where(side % 2 == 0, window.ids, ~window.ids)


def _join(left: _Window, right: _Window, parts: list[Any], tokenizer: PreTrainedTokenizerBase) -> _Window:
    """Appends the tokens that are final to ``parts`` and returns the window that holds the rest.

    How a tokenizer splits a word can depend on what stands around it, but not from far away: where eight tokens to
    either side agree in both windows, the whole text has the same tokens, and there the windows are joined.
    """
    middle = (right.start + left.start + len(left.text)) // 2
    i, j = np.searchsorted(left.starts, middle), np.searchsorted(right.starts, middle)
    near_left, near_right = slice(max(0, i - 8), i + 8), slice(max(0, j - 8), j + 8)
    if np.array_equal(left.ids[near_left], right.ids[near_right]) and np.array_equal(
        left.starts[near_left], right.starts[near_right]
    ):
        parts.append(left.ids[left.owned : i])
        right.owned = j
        return right
    whole = _Window(left.text[: right.start - left.start] + right.text, left.start, right.last, 0, right.bounds)
    _encode([whole], tokenizer)
    whole.owned = np.searchsorted(whole.starts, left.starts[left.owned]) if left.owned else 0
    return whole


def load_stream(config: TextConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase, name: str) -> TokenStream:
    """The tokens of the documents. Says how many are long and how much is scored, where that matters."""
    stream, drops = tokenize(documents, tokenizer), config.long_documents == "drop"
    is_long = stream.documents["tokens"] > config.block_size
    if drops:
        every = f"--long_documents drop: all {len(is_long):,} documents of the {name} text are longer than --block_size"
        require(not is_long.all(), f"{every} {config.block_size}; raise it, or split them")
        stream = stream.select(np.flatnonzero(~is_long))
    if drops or stream.num_loss_tokens < len(stream):
        print(
            f"{name:<10}{is_long.sum():,} of {len(is_long):,} documents are longer than {config.block_size} tokens: "
            f"{'dropped' if drops else 'split'}; {stream.num_loss_tokens:,} of {len(stream):,} tokens are scored"
        )
    return stream
