"""Text -> token ids -> one flat token stream -> `group_texts` blocks -> `DataLoader`.

    train_documents, eval_documents = load_documents(config, seed=42)
    stream = tokenize(train_documents, tokenizer)      # int32, memory-mapped, cached by `datasets`
    blocks = group_texts(stream, block_size=128)       # every token in exactly one block
    loader = make_loader(blocks, batch_size=8)         # {"input_ids", "labels"}: (batch, block_size) int64

Memory stays flat: documents are read in pieces, tokens live in a memory-mapped Arrow file, blocks are views of it.
"""

import ctypes
import dataclasses
import glob
import gzip
import hashlib
import json
import math
import os
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from config import Count, Range, UserError, find_hub, flag, one_line, require, warn

T = TypeVar("T")

IGNORED_LABEL = -100  # what F.cross_entropy and every Hugging Face model skip

# A document longer than a window is tokenized in windows that overlap, so that memory stays flat (see `_join`).
WINDOW_CHARACTERS = 1 << 16
OVERLAP_CHARACTERS = 1 << 10
ROW_CHARACTERS = 1 << 20  # text tokenized at once: enough for the tokenizer's threads, little enough for memory

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass
class TextConfig:
    """Where text comes from and how long a block is; shared by train.py and perplexity.py."""

    dataset: str | None = flag(None, "a Hub dataset id, or a directory made by save_to_disk")
    dataset_config: str | None = flag(None, "the dataset's configuration, where it has several")
    dataset_split: str = flag("train", "the split to read; slices such as train[:5000] are understood")
    dataset_revision: str | None = flag(None, "a branch, tag or commit of the Hub dataset")
    text_column: str = flag("text", "column that holds the text; a dotted path such as answers.text, lists are joined")
    text_separator: str = flag(" ", "what stands between the joined items of a list")
    max_documents: Count | None = flag(None, "take the first N documents only")
    block_size: Annotated[int, Range(least=2)] = flag(128, "tokens a block")

    def rules(self) -> list[tuple[bool, str]]:
        unused = self.dataset_config is None and self.dataset_revision is None and self.dataset_split == "train"
        return [(bool(self.dataset) or unused, "--dataset_config, _split and _revision need --dataset; leave them out")]


@dataclass
class DataConfig(TextConfig):
    train_files: list[str] = flag([], "paths or globs: .txt .jsonl .json .csv .parquet .arrow, also .gz")
    eval_files: list[str] = flag([], "the same for evaluation text; without it a part is held out")
    dataset_eval_split: str | None = flag(None, "the dataset's split to evaluate on; without it a part is held out")
    eval_fraction: Annotated[float, Range(above=0, below=1)] = flag(
        0.1, "held out by document when no evaluation text is given, chosen by the seed"
    )

    def rules(self) -> list[tuple[bool, str]]:
        both = f"--dataset {self.dataset} and --train_files exclude each other; give one of them"
        none = "no training text: give --dataset or --train_files"
        split = f"--dataset_eval_split {self.dataset_eval_split}"
        return [
            *super().rules(),
            (bool(self.dataset) != bool(self.train_files), both if self.dataset else none),
            (not self.dataset_eval_split or bool(self.dataset), f"{split}: needs --dataset; use --eval_files instead"),
            (not (self.dataset_eval_split and self.eval_files), f"{split} and --eval_files exclude each other"),
            (self.dataset_eval_split != self.dataset_split, f"{split}: is the split that is trained on; give another"),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Documents: what is read. Iterating gives each document as an iterator of pieces of text, so that one document may be
# larger than memory.


@dataclass(frozen=True)
class Rows:
    """The documents of a table, one a row."""

    table: datasets.Dataset
    column: str
    separator: str = " "
    ended: bool = True  # False where the last document was cut and goes on elsewhere: no end-of-text follows it
    numbers: np.ndarray | None = None  # of the records in all that was read, where these are a part of it

    def __len__(self) -> int:
        return len(self.table)

    @property
    def _numbers(self) -> np.ndarray:
        return np.arange(len(self)) if self.numbers is None else self.numbers

    @property
    def fingerprint(self) -> str:
        return f"{self.table._fingerprint}:{self.column}:{self.separator!r}:{self.ended}"

    def __iter__(self) -> Iterator[Iterator[str]]:
        head, *path = self.column.split(".")
        values = (value for batch in self.table.select_columns([head]).iter(batch_size=100) for value in batch[head])
        where = f"--text_column {self.column}: record"
        number = -1
        try:
            for number, value in zip(self._numbers, values, strict=True):
                text = self._join(value, path)
                if text is None or "\0" in text:
                    held = f"{str(value)[:40]}, not text" if text is None else "a NUL character"
                    raise UserError(f"{where} {number + 1} holds {held}; take it out")
                yield iter([text])
        except UnicodeDecodeError as error:
            raise UserError(f"{where} {number + 2} or a later one is not UTF-8 ({error.reason}); convert it") from error

    def _join(self, value: Any, path: list[str]) -> str | None:
        """The text at ``path`` below ``value``, or None where something there is not text."""
        if isinstance(value, list):
            parts = [self._join(item, path) for item in value]
            return None if None in parts else self.separator.join(parts)
        if path:
            return self._join(value[path[0]], path[1:]) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    def select(self, indices: Sequence[int]) -> "Rows":
        return dataclasses.replace(self, table=self.table.select(indices), numbers=self._numbers[indices])

    def cut(self, fraction: float) -> tuple["Rows", "Rows"]:
        """The only document as two, the first with about ``fraction`` of its characters."""
        text = "".join(next(iter(self)))
        place = _cut_place(text, int(len(text) * fraction))
        head, tail = (datasets.Dataset.from_dict({"text": [part]}) for part in (text[:place], text[place:]))
        return Rows(head, "text", ended=False), Rows(tail, "text")


@dataclass(frozen=True)
class TextFiles:
    """Text files, one document each: (path, first character, end character or None)."""

    files: tuple[tuple[str, int, int | None], ...]
    ended: bool = True

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        stats = [(path, start, end, Path(path).stat()) for path, start, end in self.files]
        return str([(*file, stat.st_size, stat.st_mtime_ns) for *file, stat in stats]) + str(self.ended)

    def __iter__(self) -> Iterator[Iterator[str]]:
        return (self._read(*file) for file in self.files)

    @staticmethod
    def _read(path: str, start: int = 0, end: int | None = None) -> Iterator[str]:
        opened = gzip.open if path.endswith(".gz") else open
        position = 0
        try:
            with opened(path, "rt", encoding="utf-8", newline="") as file:  # newline="": every \r\n stays as it is
                while piece := file.read(WINDOW_CHARACTERS):
                    nul = piece.find("\0")
                    require(nul < 0, f"{path}: character {position + nul + 1} is a NUL; take it out, or give text")
                    text = piece[max(0, start - position) : None if end is None else max(0, end - position)]
                    position += len(piece)
                    if text:
                        yield text
                    if end is not None and position >= end:
                        return
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason}); convert it, for example with iconv") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({error}); give a readable file") from error

    def select(self, indices: Sequence[int]) -> "TextFiles":
        return TextFiles(tuple(self.files[i] for i in indices))

    def cut(self, fraction: float) -> tuple["TextFiles", "TextFiles"]:
        """The only document as two, the first with about ``fraction`` of its characters."""
        ((path, *_),) = self.files
        length = sum(map(len, self._read(path)))
        target = int(length * fraction)
        before = max(0, target - WINDOW_CHARACTERS)
        place = before + _cut_place("".join(self._read(path, before, target)), target - before)
        return TextFiles(((path, 0, place),), ended=False), TextFiles(((path, place, None),))


Documents = Rows | TextFiles


def _cut_place(text: str, target: int) -> int:
    """The last line end (or else space) before ``target`` that follows a word, so that no token is cut in two."""
    for mark in ("\n", " "):
        place = text.rfind(mark, 1, target)
        while place > 0 and not text[place - 1].isalnum():
            place = text.rfind(mark, 1, place)
        if place > 0:
            return place
    return target


def load_documents(config: DataConfig, seed: int) -> tuple[Documents, Documents]:
    """Returns the training and the evaluation documents. Raises UserError where they cannot be read."""
    documents = read_documents(config, "--train_files", config.train_files)
    if (config.eval_files or config.dataset_eval_split) and config.eval_fraction != DataConfig.eval_fraction:
        warn(f"--eval_fraction {config.eval_fraction} is not used: there is evaluation text of its own")
    if config.eval_files:
        return documents, _read_files("--eval_files", config.eval_files, config)
    if config.dataset_eval_split:
        return documents, _read_dataset(config, config.dataset_eval_split)
    if len(documents) == 1:
        return documents.cut(1 - config.eval_fraction)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = min(max(1, round(len(order) * config.eval_fraction)), len(order) - 1)
    return documents.select(np.sort(order[held_out:])), documents.select(np.sort(order[:held_out]))


def read_documents(config: TextConfig, flag_name: str, files: list[str]) -> Documents:
    """Returns the first ``max_documents`` documents of ``files`` or, without files, of the configured dataset."""
    documents = _read_files(flag_name, files, config) if files else _read_dataset(config, config.dataset_split)
    return documents.select(range(min(config.max_documents, len(documents)))) if config.max_documents else documents


def _read_dataset(config: TextConfig, split: str) -> Rows:
    name, path = config.dataset, Path(config.dataset)
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            table = datasets.load_from_disk(path)
            unused = config.dataset_config is None and config.dataset_revision is None
            require(unused, f"--dataset {name}: a directory has neither --dataset_config nor --dataset_revision")
            splits = table if isinstance(table, datasets.DatasetDict) else {"train": table}
            require(split in splits, f"--dataset {name}: no split {split} there, but {', '.join(splits)}; name one")
            table = splits[split]
        else:
            if not path.exists():
                find_hub()
            table = datasets.load_dataset(name, config.dataset_config, split=split, revision=config.dataset_revision)
    except UserError:
        raise
    except (ConnectionError, OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        fix = "check id, split, revision, login and network, or give local files with --train_files"
        if "scripts are no longer supported" in str(error):
            fix = "look for a copy in Parquet on the Hub (for ELI5: dany0407/eli5_category), or use --train_files"
        raise UserError(f"--dataset {name}: cannot be loaded ({one_line(error)}); {fix}") from error
    return _rows(table, config)


def _read_files(name: str, patterns: list[str], config: TextConfig) -> Documents:
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        require(bool(found), f"{name} {pattern}: no file matches; check the pattern and the directory")
        for path in found:
            require(os.path.exists(path), f"{name} {path}: no such file; check the path")
            require(not os.path.isdir(path), f"{name} {path}: a directory; give files, such as {path}/*")
            require(os.path.isfile(path), f"{name} {path}: not a regular file; give one")  # a pipe would wait for ever
            try:
                with open(path, "rb") as file:
                    require(file.read(1) != b"", f"{name} {path}: is empty; give text")
            except OSError as error:
                raise UserError(f"{name} {path}: cannot be read ({error.strerror}); give a readable file") from error
        paths += found
    kinds = {path: FORMATS.get(Path(path.removesuffix(".gz")).suffix.lower()) for path in paths}
    for path, kind in kinds.items():
        require(kind is not None, f"{name} {path}: unknown format; known are {' '.join(FORMATS)} and these with .gz")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{name}: files of several formats ({', '.join(sorted(set(kinds.values())))}); give one format")
    (kind,) = set(kinds.values())
    if kind == "text":
        if config.text_column != TextConfig.text_column:
            warn(f"--text_column {config.text_column} is not used: .txt files have no columns")
        return TextFiles(tuple((str(Path(path).resolve()), 0, None) for path in paths))
    return _rows(_read_table(name, paths, kind), config)


def _read_table(name: str, paths: list[str], kind: str) -> datasets.Dataset:
    try:
        # verification_mode: a changed file is a new data set here, not a corrupted old one.
        files = [str(Path(path).resolve()) for path in paths]
        return datasets.load_dataset(kind, data_files=files, split="train", verification_mode="no_checks")
    except (OSError, EOFError, ValueError, zlib.error, DatasetGenerationError) as error:
        for path in paths if len(paths) > 1 else []:  # which one it is, the library does not say
            _read_table(name, [path], kind)
        reason = (kind == "json" and len(paths) == 1 and _json_fault(paths[0])) or one_line(error)
        shown = " ".join(paths)[:200]
        raise UserError(f"{name} {shown}: not readable as {kind} ({reason}); mend the file") from error


def _json_fault(path: str) -> str | None:
    """The line on which a JSON file breaks, or None: the library counts records, and from the start of its buffer."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            is_list = file.read(1) == "["
            file.seek(0)
            for before, text in enumerate([file.read()] if is_list else file):
                try:
                    json.loads(text.strip() or "{}")
                except json.JSONDecodeError as error:
                    return f"line {before + error.lineno}: {error.msg}"
    except (OSError, EOFError, ValueError, zlib.error):
        pass  # what the library said is as good
    return None


def _rows(table: datasets.Dataset, config: TextConfig) -> Rows:
    require(len(table) > 0, "the data has no records; give text")
    columns = table.flatten().column_names
    value: Any = table.features
    for key in config.text_column.split("."):
        while not isinstance(value, dict) and hasattr(value, "feature"):  # a list: look at what it holds
            value = value.feature
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"--text_column {config.text_column}: no such column; there are {', '.join(columns)}")
        value = value[key]
    return Rows(table, config.text_column, config.text_separator)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class TokenStream:
    """The tokens of some documents, one after another; a read-only, memory-mapped sequence of int32.

    ``num_documents`` and ``num_bytes`` (UTF-8, without end-of-text) describe the text, ``sha256`` its tokens.
    """

    def __init__(self, table: datasets.Dataset):
        self._table = table
        rows = [row for chunk in table.data.column("input_ids").chunks for row in chunk]
        self._rows = [np.frombuffer(row.as_buffer(), np.int32) for row in rows]  # no copies
        self._starts = np.cumsum([0] + [len(row) for row in self._rows])
        self.num_documents = sum(table.data.column("num_documents").to_pylist())
        self.num_bytes = sum(table.data.column("num_bytes").to_pylist())
        self.sha256 = hashlib.sha256("".join(table.data.column("sha256").to_pylist()).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return TokenStream, (self._table,)  # a worker process maps the same file; the tokens are not copied

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """Returns the tokens [start, stop) as a new int64 array."""
        start, stop, _ = place.indices(len(self))
        first = np.searchsorted(self._starts, start, side="right") - 1
        parts = []
        for row in range(first, len(self._rows)):
            if self._starts[row] >= stop:
                break
            parts.append(self._rows[row][max(0, start - self._starts[row]) : stop - self._starts[row]])
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)


# The ids are int32, one after the other; of a list of them `datasets` would make Python numbers.
TOKEN_ROW = datasets.Features(
    {"input_ids": datasets.Value("binary"), "sha256": datasets.Value("string")}
    | {count: datasets.Value("int64") for count in ("num_documents", "num_bytes")}
)


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Tokenizes without special tokens; each document is followed by the end-of-text token. Cached by `datasets`."""
    end = end_of_text_id(tokenizer)
    tokenizer([""])  # switches off the truncation and padding that its file may ask for
    key = f"{documents.fingerprint}\n{tokenizer_fingerprint(tokenizer)}\n{end}\n{TOKEN_ROW}"
    try:
        table = datasets.Dataset.from_generator(
            _token_rows,
            features=TOKEN_ROW,
            gen_kwargs={"documents": documents, "tokenizer": tokenizer, "end": end},
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            writer_batch_size=1,  # rows are large: buffering a thousand of them would hold the corpus in memory
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
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
    """A stretch of a document, from character ``start``; ``fresh`` characters at its end are in no window before."""

    text: str
    start: int
    last: bool
    fresh: int
    ids: np.ndarray | None = None
    starts: np.ndarray | None = None  # the character of the document at which each token starts
    owned: int = 0  # tokens before this index belong to the window before


def _windows(documents: Documents, size: int) -> Iterator[_Window]:
    for pieces in documents:
        text, start, fresh_from = "", 0, 0
        for piece in pieces:
            for offset in range(0, len(piece), size):
                text += piece[offset : offset + size]
                while len(text) > size:
                    yield _Window(text[:size], start, False, size - fresh_from)
                    step, fresh_from = size - OVERLAP_CHARACTERS, OVERLAP_CHARACTERS
                    text, start = text[step:], start + step
        yield _Window(text, start, True, len(text) - fresh_from)


def _token_rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[dict[str, Any]]:
    # A slow (pure Python) tokenizer cannot say where its tokens start: its documents stay whole.
    windows = _windows(documents, WINDOW_CHARACTERS if tokenizer.is_fast else sys.maxsize)
    end_of_text = np.array([end] if documents.ended else [], np.int32)
    before: _Window | None = None  # a window whose document goes on
    for batch in _batches(windows):
        _encode(batch, tokenizer)
        parts: list[Any] = []
        for window in batch:
            if before is not None:
                window = _join(before, window, parts, tokenizer)
            before = None if window.last else window
            if window.last:
                parts += [window.ids[window.owned :], end_of_text]
        ids = np.concatenate([np.empty(0, np.int32), *parts]).tobytes()
        yield {
            "input_ids": ids,
            "num_documents": sum(window.last for window in batch),
            "num_bytes": sum(len(window.text[len(window.text) - window.fresh :].encode()) for window in batch),
            "sha256": hashlib.sha256(ids).hexdigest(),
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
    in_parts = any(window.start or not window.last for window in windows)
    texts = [window.text for window in windows]
    if not tokenizer.is_fast:
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
            offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            window.starts = window.start + offsets[:, 0]


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
    whole = _Window(left.text[: right.start - left.start] + right.text, left.start, right.last, 0)
    _encode([whole], tokenizer)
    whole.owned = np.searchsorted(whole.starts, left.starts[left.owned]) if left.owned else 0
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and batches


class Blocks(Dataset):
    """Item i is tokens [i * stride, i * stride + block_size) of a stream; only the last one may be shorter.

    With stride = block_size these are consecutive blocks. With a smaller stride they overlap, and only tokens that no
    item before holds carry labels: each token but the first is predicted once, with at least block_size - stride tokens
    before it (the evaluation of the guide "Perplexity of fixed-length models" of transformers).
    """

    def __init__(self, stream: TokenStream, block_size: int, stride: int):
        self.stream, self.block_size, self.stride = stream, block_size, stride

    def __len__(self) -> int:
        beyond_first = max(0, len(self.stream) - self.block_size)
        return min(1, len(self.stream)) + math.ceil(beyond_first / self.stride)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Returns input_ids and labels, both (block_size,) int64."""
        start = i * self.stride
        ids = torch.from_numpy(self.stream[start : start + self.block_size])
        labels = ids.clone()
        if i > 0:
            labels[: self.block_size - self.stride] = IGNORED_LABEL
        return {"input_ids": ids, "labels": labels}


def group_texts(stream: TokenStream, block_size: int, stride: int | None = None) -> Blocks:
    """Groups all tokens into blocks: none is dropped, and the remainder is the last, short block."""
    return Blocks(stream, block_size, stride or block_size)


def collate(items: list[dict[str, torch.Tensor]], rows: int = 0, length: int = 0) -> dict[str, torch.Tensor]:
    """Stacks blocks to (batch, longest), at least (rows, length); the rest is token 0 with the ignored label.

    No mask is needed: what follows a token cannot change its logits (`model.check_causal` has seen to that), and
    filled places are never scored.
    """
    fill = {"input_ids": 0, "labels": IGNORED_LABEL}
    batch = {}
    for key, value in fill.items():
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


def make_loader(
    blocks: Blocks,
    batch_size: int,
    indices: Sequence[int] | None = None,
    num_workers: int = 0,
    same_shape: bool = False,
) -> DataLoader:
    """Batches of ``blocks`` in the order of ``indices``, or in their own order.

    With ``same_shape`` the last ones are filled up to (batch_size, block_size), so that compiled code fits them all.
    """
    indices = range(len(blocks)) if indices is None else indices
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    # Without a generator of its own, a DataLoader draws from the global one whenever iteration starts, and dropout
    # would depend on how often that happened.
    return DataLoader(
        blocks,
        batch_sampler=batches,
        collate_fn=partial(collate, rows=batch_size, length=blocks.block_size) if same_shape else collate,
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
    grad_accum_steps: int,
    seed: int,
    position: Position,
    num_workers: int = 0,
    worker_timeout: int = 300,
    same_shape: bool = False,
) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position]]:
    """Yields, without end, the micro-batches of one update and the position after it.

    An epoch ends with what is left, be it fewer micro-batches: every block is seen once in each epoch. Raises
    WorkerError where a worker has died, or nothing comes for ``worker_timeout`` seconds.
    """
    while True:
        order = epoch_order(len(blocks), seed, position.epoch)[position.blocks :]
        batches = iter(make_loader(blocks, batch_size, order, num_workers, same_shape))
        if num_workers:
            batches = _guarded(batches, num_workers, worker_timeout)
        while update := list(islice(batches, grad_accum_steps)):
            position = Position(position.epoch, position.blocks + batch_size * len(update))
            if position.blocks >= len(blocks):
                position = Position(position.epoch + 1)
            yield update, position


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
