"""Documents -> token ids -> one flat token stream -> `group_texts` blocks -> `DataLoader`.

    stream = tokenize(documents, tokenizer)            # int32, memory-mapped, cached by `datasets`
    blocks = group_texts(stream, block_size=128)       # every token in exactly one block
    loader = make_loader(blocks, batch_size=8)         # {"input_ids", "labels"}: (batch, block_size) int64
    blocks = group_texts(stream, 128, apart=True)      # "position_ids" as well, which begin again with each document

Memory stays flat: documents are read in pieces, tokens live in a memory-mapped Arrow file, blocks are views of it.
A token that is not scored, such as one of a question whose answer is learnt, is stored as its bitwise complement.
"""

import ctypes
import hashlib
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from config import UserError, require, warn
from text import CHAT_TEMPLATE, DataConfig, Documents, TextConfig, parse_source

T = TypeVar("T")

IGNORED_LABEL = -100  # what F.cross_entropy and every Hugging Face model skip

# A document longer than a window is tokenized in windows that overlap, so that memory stays flat (see `_join`).
WINDOW_CHARACTERS = 1 << 16
OVERLAP_CHARACTERS = 1 << 10
ROW_CHARACTERS = 1 << 20  # text tokenized at once: enough for the tokenizer's threads, little enough for memory
PIECE_TOKENS = 1 << 20  # of a stream that are looked at together


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


# What is kept of each document: 128 bits of the SHA-256 of its ids, the number of its tokens, of those that are scored,
# and the UTF-8 bytes of the text that is scored.
DOCUMENT = np.dtype([("hash", "S16"), ("tokens", "<i8"), ("scored", "<i8"), ("bytes", "<i8")])


RULES = 1  # to be counted up where the same text would give other tokens: those that are cached are then made anew


class TokenStream:
    """The tokens of some documents, one after another; a read-only, memory-mapped sequence of int32.

    ``documents`` (of dtype DOCUMENT) are the table's, or those ``numbers`` of the table's, in that order.
    ``num_scored`` tokens are scored, of text with ``num_bytes`` in UTF-8. ``sha256`` is of the tokens.
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
        self.num_scored, self.num_bytes = (int(self.documents[name].sum()) for name in ("scored", "bytes"))
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


def unmarked(ids: np.ndarray) -> np.ndarray:
    """The ids, scored or not."""
    return np.where(ids < 0, ~ids, ids)


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
    for pieces in documents.marked(tokenizer):
        text, start, num_bytes, bounds = "", 0, 0, []
        for piece, scored in pieces:
            num_bytes += len(piece.encode()) if scored else 0
            if scored == len(bounds) % 2:
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
    digest, num_tokens, num_scored, num_bytes = hashlib.sha256(), 0, 0, 0  # of a document
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
                digest.update(unmarked(part) if window.bounds else part)
                num_tokens, num_scored = num_tokens + len(part), num_scored + np.count_nonzero(part >= 0)
            if window.last:
                records.append((digest.digest()[:16], num_tokens, num_scored, num_bytes))
                digest, num_tokens, num_scored, num_bytes = hashlib.sha256(), 0, 0, 0
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
    marked = any(window.bounds for window in windows)
    in_parts = marked or any(window.start or not window.last for window in windows)
    texts = [window.text for window in windows]
    if not tokenizer.is_fast:
        slow = f"--loss_on completion: {type(tokenizer).__name__} is a slow tokenizer, which cannot say where tokens"
        require(not marked, f"{slow} start; give --loss_on all, or a fast one with --tokenizer")
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


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and batches


class Blocks(Dataset):
    """Block i is tokens [i * stride, i * stride + block_size) of a stream; only the last one may be shorter.

    With stride = block_size these are consecutive blocks. With a smaller stride they overlap, and only tokens that no
    block before holds carry labels: each token but the first is predicted once, with at least block_size - stride
    tokens before it (the evaluation of the guide "Perplexity of fixed-length models" of transformers). The items are
    all blocks, or those that ``kept`` names. Where documents are ``apart``, their first tokens carry no labels.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, stride: int, apart: bool = False, kept: Sequence[int] | None = None
    ):
        self.stream, self.block_size, self.stride, self.apart = stream, block_size, stride, apart
        beyond_first = max(0, len(self.stream) - self.block_size)
        count = min(1, len(self.stream)) + math.ceil(beyond_first / self.stride)
        self.kept = range(count) if kept is None else kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """Returns input_ids and labels, and position_ids where documents are apart, all (block_size,) int64."""
        start = int(self.kept[item]) * self.stride
        ids = self.stream[start : start + self.block_size]
        item = block_item(ids, self.stream.positions(start, start + self.block_size) if self.apart else None)
        if start > 0:
            item["labels"][: self.block_size - self.stride] = IGNORED_LABEL
        return item


def block_item(ids: np.ndarray, positions: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """A block of ``ids``, ~id where not scored, and their ``positions`` where documents are apart, all (length,)."""
    labels = np.where(ids < 0, IGNORED_LABEL, ids)
    item = {"input_ids": unmarked(ids), "labels": labels}
    if positions is not None:
        item["position_ids"] = positions
        labels[positions == 0] = IGNORED_LABEL
    return {key: torch.from_numpy(value) for key, value in item.items()}


def group_texts(stream: TokenStream, block_size: int, stride: int | None = None, apart: bool = False) -> Blocks:
    """Groups all tokens into blocks: none is dropped, and the remainder is the last, short block."""
    return Blocks(stream, block_size, stride or block_size, apart)


def load_stream(config: TextConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase, name: str) -> TokenStream:
    """The tokens of the documents. Says how many are long and how much is scored, where that matters."""
    stream, drops = tokenize(documents, tokenizer), config.long_documents == "drop"
    is_long = stream.documents["tokens"] > config.block_size
    if drops:
        every = f"--long_documents drop: all {len(is_long):,} documents of the {name} text are longer than --block_size"
        require(not is_long.all(), f"{every} {config.block_size}; raise it, or split them")
        stream = stream.select(np.flatnonzero(~is_long))
    if drops or stream.num_scored < len(stream):
        print(
            f"{name:<10}{is_long.sum():,} of {len(is_long):,} documents are longer than {config.block_size} tokens: "
            f"{'dropped' if drops else 'split'}; {stream.num_scored:,} of {len(stream):,} tokens are scored"
        )
    return stream


def load_blocks(
    config: DataConfig, training: Documents, evaluation: Documents, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple["TrainingData", Blocks]:
    """What to train on and the blocks to evaluate on. Says what of the text is there twice.

    Raises UserError where there is too little text.
    """
    train, held_out = (
        load_stream(config, documents, tokenizer, name)
        for documents, name in ((training, "training"), (evaluation, "held out"))
    )
    hashes = np.concatenate([train.documents["hash"], held_out.documents["hash"]])
    _, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = np.arange(len(hashes))
    is_twice, is_known = np.split(firsts[which] < np.minimum(numbers, train.num_documents), [train.num_documents])
    if config.deduplicate:
        train, held_out = train.select(np.flatnonzero(~is_twice)), held_out.select(np.flatnonzero(~is_known))
    if config.mix:
        sizes = [len(source) for source in training.sources]
        train = train.select(_mixture(config.mix, np.repeat(np.arange(len(sizes)), sizes)[train.numbers], seed))
    rule = f"the training text has {len(train)} tokens, and {config.block_size} or more are needed"
    require(len(train) >= config.block_size, f"{rule}; give more text or a smaller --block_size")
    apart = config.pack == "documents"
    blocks, eval_blocks = (group_texts(stream, config.block_size, apart=apart) for stream in (train, held_out))
    is_within = blocks_within(eval_blocks, train)
    if config.deduplicate:
        eval_blocks = Blocks(held_out, config.block_size, config.block_size, apart, np.flatnonzero(~is_within))
    twice, known, within = (int(found.sum()) for found in (is_twice, is_known, is_within))
    if twice or known or within:
        print(
            f"twice     {twice:,} training documents; trained on are {known:,} held-out documents and {within:,} "
            f"held-out blocks{': dropped' if config.deduplicate else '; --deduplicate drops all these'}"
        )
    need_text(eval_blocks)
    return TrainingData(blocks, seed), eval_blocks


def _mixture(mix: list[str], sources: np.ndarray, seed: int) -> np.ndarray:
    """The documents, whose ``sources`` are given, in a random order in which their numbers are as ``mix`` weights them.

    Of the source that its weight favours least each is there once; others are gone through again, each time whole.
    """
    names, weights = zip(*map(parse_source, mix), strict=True)
    sizes, shares = np.bincount(sources, minlength=len(mix)), np.array(weights) / sum(weights)
    require(sizes.all(), f"--mix {names[sizes.argmin()]}: none of its documents is left; leave it out")
    total = (sizes / shares).max()
    many = f"--mix {' '.join(mix)}: to see all, {total:.0e} documents would be drawn"
    require(total < 1e9, f"{many}; give the largest source more weight")
    random, drawn = np.random.default_rng(seed), []
    for i, (name, size, count) in enumerate(zip(names, sizes, np.rint(total * shares).astype(int), strict=True)):
        passes = [random.permutation(np.flatnonzero(sources == i)) for _ in range(math.ceil(count / size))]
        drawn.append(np.concatenate(passes)[:count])
        print(f"mix       {name}: {size:,} documents, each {count / size:.2f} times an epoch")
    return random.permutation(np.concatenate(drawn))


def need_text(blocks: Blocks) -> None:
    """Raises UserError where there is no token to predict: the first one of a block has nothing to predict it."""
    predicts = any((blocks[i]["labels"][1:] != IGNORED_LABEL).any() for i in range(len(blocks)))
    require(predicts, "no token of the evaluation text is left to predict; give more text")


def blocks_within(blocks: Blocks, stream: TokenStream) -> np.ndarray:
    """Which of the blocks stand in ``stream`` at any place, scored or not; only whole blocks are sought."""
    size, found = blocks.block_size, np.zeros(len(blocks), bool)
    sought: dict[int, list[int]] = {}  # the blocks of each hash
    for i in range(len(blocks.stream) // size):
        sought.setdefault(int(_window_hashes(blocks[i]["input_ids"].numpy(), size)[0]), []).append(i)
    hashes = np.array(list(sought), np.uint64)
    for start in range(0, len(stream) - size + 1, PIECE_TOKENS):
        piece = unmarked(stream[start : start + PIECE_TOKENS + size - 1])
        windows = _window_hashes(piece, size)
        for place in np.flatnonzero(np.isin(windows, hashes)):
            for i in sought[int(windows[place])]:
                found[i] = found[i] or np.array_equal(blocks[i]["input_ids"], piece[place : place + size])
    return found


def _window_hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """Hash i is of the ``size`` ids from i on; (len(ids) - size + 1,) uint64.

    It is the polynomial with the ids as coefficients, modulo 2^64: a difference of two prefix sums, divided by a power
    of the base.
    """
    base = 0x9E3779B97F4A7C15
    powers = np.cumprod(np.full(len(ids), base, np.uint64))
    inverses = np.cumprod(np.full(len(ids) - size + 1, pow(base, -1, 1 << 64), np.uint64))
    ids = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ids ^= ids >> np.uint64(32)  # else the ids' own patterns would be the polynomial's
    sums = np.append(np.uint64(0), np.cumsum(ids * powers))
    return (sums[size:] - sums[:-size]) * inverses


def collate(
    items: list[dict[str, torch.Tensor]], rows: int = 0, length: int = 0, apart: bool = False
) -> dict[str, torch.Tensor]:
    """Stacks blocks to (batch, longest), at least (rows, length); the rest is token 0 with the ignored label, alone.

    No mask is needed: what follows a token cannot change its logits (`model.check_causal` has seen to that), and
    filled places are never scored. Where there are no blocks at all, everything is filled.
    """
    items = items or [block_item(np.array([~0, ~0]), np.arange(2) if apart else None)]
    batch = {}
    for key in items[0]:
        value = IGNORED_LABEL if key == "labels" else 0
        stacked = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        missing = (0, max(0, length - stacked.shape[1]), 0, max(0, rows - len(items)))
        batch[key] = torch.nn.functional.pad(stacked, missing, value=value)
    return batch


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same blocks in batches of at most ``size``."""
    for start in range(0, len(batch["labels"]), size):
        yield {key: tensor[start : start + size] for key, tensor in batch.items()}


class WorkerError(UserError):
    """A DataLoader worker process died or hangs."""

    exit_code = 6


def _init_worker(worker_id: int) -> None:
    """Signals to the process group are the parent's to handle, and a worker does not outlive its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_batches(indices: Sequence[int], batch_size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[int]]:
    """Batches of the indices that fall to one of the ``ranks``. All ranks have as many, be it some without blocks."""
    count = math.ceil(math.ceil(len(indices) / ranks) / batch_size)
    return [indices[rank::ranks][i * batch_size : (i + 1) * batch_size] for i in range(count)]


def make_loader(
    blocks: Blocks,
    batch_size: int,
    batches: list[Sequence[int]] | None = None,
    num_workers: int = 0,
    same_shape: bool = False,
) -> DataLoader:
    """Loads ``batches`` of the blocks, or all blocks in their own order.

    With ``same_shape`` the last ones are filled up to (batch_size, block_size), so that compiled code fits them all.
    """
    shape = {"rows": batch_size, "length": blocks.block_size} if same_shape else {}
    # Without a generator of its own, a DataLoader draws from the global one whenever iteration starts, and dropout
    # would depend on how often that happened.
    return DataLoader(
        blocks,
        batch_sampler=in_batches(range(len(blocks)), batch_size) if batches is None else batches,
        collate_fn=partial(collate, **shape, apart=blocks.apart),
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        num_workers=num_workers,
        worker_init_fn=_init_worker,
    )


@dataclass(frozen=True)
class Position:
    """A place in the training data: ``blocks`` of epoch ``epoch`` have been seen."""

    epoch: int = 0
    blocks: int = 0


def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the blocks in an epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def training_batches(
    blocks: Blocks,
    batch_size: int,
    blocks_per_update: int,
    seed: int,
    position: Position,
    rank: int = 0,
    ranks: int = 1,
    same_shape: bool = False,
    num_workers: int = 0,
    worker_timeout: int = 300,
) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
    """Yields, without end, one rank's micro-batches of an update, the position after it, and all its blocks' numbers.

    Which blocks make an update does not depend on the number of ranks. An epoch ends with what is left, be it fewer
    blocks: each is seen once in an epoch, by one rank. Raises WorkerError where a worker has died, or nothing comes for
    ``worker_timeout`` seconds.
    """
    while True:
        order = epoch_order(len(blocks), seed, position.epoch)[position.blocks :]
        updates = [order[i : i + blocks_per_update] for i in range(0, len(order), blocks_per_update)]
        shares = [in_batches(update, batch_size, rank, ranks) for update in updates]
        batches = iter(make_loader(blocks, batch_size, list(chain(*shares)), num_workers, same_shape))
        if num_workers:
            batches = _guarded(batches, num_workers, worker_timeout)
        for update, share in zip(updates, shares, strict=True):
            position = Position(position.epoch, position.blocks + len(update))
            if position.blocks == len(blocks):
                position = Position(position.epoch + 1)
            yield list(islice(batches, len(share))), position, update.tolist()


class TrainingData:
    """What the loop trains on: blocks of text that is on the disk, in an order of the ``seed``."""

    def __init__(self, blocks: Blocks, seed: int):
        self.blocks, self._seed = blocks, seed
        stream = blocks.stream
        self.identity = stream.sha256
        self.scored = stream.num_scored / len(stream)  # the part of all tokens that counts as tokens seen

    def __str__(self) -> str:
        stream, size = self.blocks.stream, self.blocks.block_size
        return f"{stream.num_documents:,} documents, {len(stream):,} tokens, {len(self.blocks):,} blocks of {size}"

    def updates_per_epoch(self, blocks_per_update: int) -> int | None:
        """None where it is not known."""
        return math.ceil(len(self.blocks) / blocks_per_update)

    def epochs(self, position: Position) -> float:
        return position.epoch + position.blocks / len(self.blocks)

    def first(self, count: int) -> dict[str, torch.Tensor]:
        """The first blocks as a batch."""
        return collate([self.blocks[i] for i in range(min(count, len(self.blocks)))])

    def batches(
        self, batch_size: int, blocks_per_update: int, position: Position, *options: Any
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
        """What `training_batches` yields, whose ``options`` follow the position."""
        return training_batches(self.blocks, batch_size, blocks_per_update, self._seed, position, *options)

    def state(self, rank: int = 0, ranks: int = 1) -> None:
        """What a checkpoint must hold beside the position, of which each rank gives its part."""

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """What all ranks' `state` have returned, as a checkpoint holds it: in JSON's terms, and as tensors by group."""
        return {}, {}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Goes on from what `joined` has returned, of the tensors those of the group "stream"."""


def _guarded(batches: Iterator[T], num_workers: int, timeout: int) -> Iterator[T]:
    """Raises WorkerError instead of waiting for ever, and only where a batch is due."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"no batch came for {timeout} seconds")

    # PyTorch raises from a handler of SIGCHLD, anywhere, and an update could be half done. Its own timeout does not
    # help where a worker stops in the middle of handing over a batch; an alarm interrupts any wait.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, expire)
    while True:
        signal.alarm(timeout)
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            fix = "go on with --resume, perhaps with --num_workers 0"
            raise WorkerError(f"--num_workers {num_workers}: a worker died or hangs ({error}); {fix}") from error
        finally:
            signal.alarm(0)
        if batch is None:
            return
        yield batch
