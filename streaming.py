"""Text that is larger than the disk: read as it is needed, shuffled in a buffer, resumed exactly where it was.

    training, evaluation = load_documents(config, seed=42)      # stands in for text.load_documents
    data, eval_blocks = load_blocks(config, training, evaluation, tokenizer, seed=42)     # and for data.load_blocks
    for micro_batches, position, numbers in data.batches(8, 1, Position()):
        state, tensors = data.state()            # after this update; another process goes on from it with data.restore

Records become documents and tokens as everywhere. Consecutive blocks of them go into the buffer, and from there, in a
random order, into updates. An epoch ends with what is left; the next one begins at the start of the text.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

from config import UserError, find_hub, one_line, require, warn
from data import (
    DOCUMENT,
    Blocks,
    Position,
    block_item,
    collate,
    end_of_text_id,
    group_texts,
    load_stream,
    need_text,
    token_rows,
)
from text import (
    CHAT_TEMPLATE,
    DataConfig,
    Documents,
    Piece,
    TextConfig,
    find_files,
    load_table,
    parse_filter,
    read_documents,
    read_filter,
    read_rows,
    read_texts,
)

NAMES_RECORDS = 100  # at the start of a table that say which columns there are and what they hold


def check_flags(data_config: DataConfig, tokenizer: str | None, max_steps: int | None, num_workers: int) -> None:
    """Raises UserError where flags of other parts do not go with --streaming."""
    rules = [
        (max_steps is not None, "--streaming: the length of the text is not known; give --max_steps"),
        (not (tokenizer or "").startswith("train:"), f"--tokenizer {tokenizer}: needs text that does not stream"),
        (num_workers == 0, f"--num_workers {num_workers}: text that streams is read in this process; leave it out"),
    ]
    broken = [message for holds, message in rules if data_config.streaming and not holds]
    require(not broken, "\n".join(broken))


# ---------------------------------------------------------------------------------------------------------------------
# Documents. `place` is where reading begins, as JSON has it; it moves with each document that is given.


class StreamedFiles(Documents):
    def __init__(self, name: str, paths: list[str], config: DataConfig):
        self.name, self.version = name, ""
        self._files = read_texts(paths[: config.max_documents])
        self.start = self.place = {"documents": 0}

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        for i in range(self.place["documents"], len(self._files)):
            self.place = {"documents": i + 1}
            yield from self._files.select([i]).marked(tokenizer)


class StreamedRows(Documents):
    """Raises UserError where a record cannot be read or has not the form of the first ones."""

    def __init__(self, name: str, table: datasets.IterableDataset, config: DataConfig, version: str = ""):
        self.name, self.version, self._limit = name, version, config.max_documents
        with _reading(f"{name}: the first records"):
            head = datasets.Dataset.from_list(list(table.take(NAMES_RECORDS)), features=table.features)
        self._form = read_rows(head, dataclasses.replace(config, filter=[]))
        self._filters = [read_filter(head, rule, config.text_separator) for rule in config.filter]
        self.has_messages = self._form.has_messages
        if table.features is None:  # CSV: else each piece of a file would have types of its own
            table = table.cast(head.features)
        columns = {*self._form.columns, *(parse_filter(rule)[0].split(".")[0] for rule in config.filter)}
        self._table = table.select_columns(sorted(columns))
        self.start = self.place = {"documents": 0, "records": 0, "table": self._table.state_dict()}

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        documents, number = self.place["documents"], self.place["records"]
        self._table.load_state_dict(self.place["table"])
        records = iter(self._table)
        while documents != self._limit:
            with _reading(f"{self.name}: record {number + 1} or one soon after it"):
                record = next(records, None)
            if record is None:
                return
            number += 1
            if all(passes(record) for passes in self._filters):
                documents += 1
                pieces = self._form.document(f"{self.name}, {self._form.source}: record {number}", record, tokenizer)
                self.place = {"documents": documents, "records": number, "table": self._table.state_dict()}
                yield pieces


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # which ones, depends on the format and on the library that reads a URL
        raise UserError(f"{what} cannot be read ({one_line(error)}); go on with --resume where it can") from error


def load_documents(config: DataConfig, seed: int) -> tuple[StreamedFiles | StreamedRows, Documents]:
    """Returns the training and the evaluation documents; the latter are read as a whole."""
    name = f"--dataset {config.dataset}"
    if config.train_files:
        paths, kind = find_files("--train_files", config.train_files, config, remote=True)
        name = f"--train_files {' '.join(paths)[:200]}"
        has_http = find_spec("aiohttp") or not any(path.startswith(("http:", "https:")) for path in paths)
        require(has_http, f"{name}: needs aiohttp; install it (pip install aiohttp), or download the files")
        if kind == "text":
            training = StreamedFiles(name, paths, config)
        else:
            files = [path if "://" in path else str(Path(path).resolve()) for path in paths]
            with _reading(name):
                table = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
            training = StreamedRows(name, table, config)
    else:
        version = config.dataset_revision
        if not Path(config.dataset).exists():
            find_hub()
            with suppress(Exception):  # what is wrong with the dataset, load_table says
                version = HfApi().dataset_info(config.dataset, revision=version).sha
        pinned = dataclasses.replace(config, dataset_revision=version)
        table = load_table("--dataset", config.dataset, pinned, config.dataset_split, streaming=True)
        training = StreamedRows(name, table, config, version or "")
    if config.eval_files:
        unlimited = dataclasses.replace(config, max_documents=None)
        return training, read_documents(unlimited, "--eval_files", config.eval_files)
    # Read as it comes as well: `datasets` would fetch the other splits too.
    table = load_table("--dataset", config.dataset, pinned, config.dataset_eval_split, streaming=True)
    with _reading(f"{name}, --dataset_eval_split {config.dataset_eval_split}"):
        return training, read_rows(datasets.Dataset.from_list(list(table), features=table.features), config)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and batches


class StreamedData:
    """What the loop trains on, as `data.TrainingData` is for text on the disk.

    A block is (1, length) int32: the ids, ~id where not scored; or (2, length) where documents are apart, with the
    distance of each token from its document's start below. It goes by its number in the epoch.
    """

    def __init__(
        self, config: DataConfig, documents: StreamedFiles | StreamedRows, tokenizer: PreTrainedTokenizerBase, seed: int
    ):
        self._config, self._documents, self._tokenizer = config, documents, tokenizer
        self._end = end_of_text_id(tokenizer)
        self._apart = config.pack == "documents"
        self._random = np.random.default_rng(seed)
        self._sha256, self.scored, self.facts = "", 0.0, {}  # documents and tokens are not counted
        self._buffer: list[tuple[int, np.ndarray]] = []
        self.first(1)  # what is wrong with the text is said before a run has begun
        self._given = self._state()

    def __str__(self) -> str:
        drawn = f", the next one of {self._config.shuffle_buffer:,}" if self._config.shuffle_buffer > 1 else ""
        return f"streams from {self._documents.name}, in blocks of {self._config.block_size}{drawn}"

    @property
    def identity(self) -> str:
        """The dataset's commit, where it has one, and a hash of the settings and of the first tokens."""
        elsewhere = ("dataset", "dataset_revision", "block_size", "pack")
        names = [field.name for field in dataclasses.fields(TextConfig) if field.name not in elsewhere]
        form = str([getattr(self._config, name) for name in names])
        return f"{self._documents.version} {hashlib.sha256((form + self._sha256).encode()).hexdigest()}".strip()

    def updates_per_epoch(self, batch_size: int, grad_accum_steps: int) -> None:
        return None

    def epochs(self, position: Position) -> int:
        return position.epoch

    def first(self, count: int) -> dict[str, torch.Tensor]:
        """The first blocks as a batch; the next thing to be read is the start of the text."""
        self._begin_epoch()
        items = [self._item(block) for _, block in islice(self._blocks(), count)]
        self._begin_epoch()
        return collate(items)

    def batches(
        self, batch_size: int, grad_accum_steps: int, position: Position, same_shape: bool = False, *workers: int
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
        """Yields, without end, the micro-batches of one update, the position after it and the numbers of the blocks."""
        shape = (batch_size, self._config.block_size) if same_shape else (0, 0)
        while True:
            blocks = self._blocks()
            while drawn := list(islice(self._draw(blocks), batch_size * grad_accum_steps)):
                position = Position(position.epoch, position.blocks + len(drawn))
                self._given = self._state()
                items = [self._item(block) for _, block in drawn]
                batches = [collate(items[i : i + batch_size], *shape) for i in range(0, len(items), batch_size)]
                yield batches, position, [number for number, _ in drawn]
            position = Position(position.epoch + 1)
            self._begin_epoch()

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """What was given out last is behind this state, in JSON's terms and in tensors; what was read ahead is not."""
        state, carry, buffer = self._given
        blocks = [block for _, block in buffer]
        tensors = {
            "carry": torch.from_numpy(carry),
            "buffer": torch.from_numpy(np.concatenate([self._nothing(), *blocks], axis=1)),
            "lengths": torch.tensor([block.shape[1] for block in blocks], dtype=torch.int64),
        }
        return {**state, "buffer": [number for number, _ in buffer]}, {"stream": tensors}

    def restore(self, state: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        self._at, self._made = state["at"], state["made"]
        self._random.bit_generator.state = state["random"]
        stream = {name: tensor.numpy() for name, tensor in tensors["stream"].items()}
        self._carry = stream["carry"]
        blocks = np.split(stream["buffer"], np.cumsum(stream["lengths"]), axis=1)[:-1]
        self._buffer = list(zip(state["buffer"], blocks, strict=True))
        self._given = self._state()

    def _state(self) -> tuple[dict[str, Any], np.ndarray, list[tuple[int, np.ndarray]]]:
        state = {"at": self._at, "made": self._made, "random": self._random.bit_generator.state}
        return state, self._carry, list(self._buffer)

    def _begin_epoch(self) -> None:
        # Reading goes on from `_at`: a place between documents, with the number of blocks made before and the tokens
        # carried over. How many blocks were made since, `_made` knows.
        self._at, self._carry, self._made = {"place": self._documents.start, "blocks": 0}, self._nothing(), 0

    def _nothing(self) -> np.ndarray:
        return np.empty((1 + self._apart, 0), np.int32)

    def _item(self, block: np.ndarray) -> dict[str, torch.Tensor]:
        ids, *positions = block.astype(np.int64)
        # A document that began in the block before: positions are from the start of this one.
        return block_item(ids, np.minimum(positions[0], np.arange(len(ids))) if self._apart else None)

    def _draw(self, blocks: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        while True:
            self._buffer += islice(blocks, self._config.shuffle_buffer - len(self._buffer))
            if not self._buffer:
                return
            chosen = self._random.integers(len(self._buffer))
            self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
            yield self._buffer.pop()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks of the epoch that were not made yet, with their numbers."""
        size, made, done = self._config.block_size, self._at["blocks"], self._made
        self._documents.place, tokens = self._at["place"], self._carry
        for piece, between in self._pieces():
            tokens = np.concatenate([tokens, piece], axis=1)
            for start in range(0, tokens.shape[1] - size + 1, size):
                made += 1
                if made > done:
                    self._made = made
                    yield made - 1, tokens[:, start : start + size].copy()  # a view would keep all of them in memory
            tokens = tokens[:, tokens.shape[1] // size * size :].copy()
            if between:
                self._at, self._carry = {"place": self._documents.place, "blocks": made}, tokens
        few = f"{self._documents.name}: the training text has {tokens.shape[1]} tokens, and {size} or more are needed"
        require(made > 0, f"{few}; give more text, other rules or a smaller --block_size")
        if tokens.shape[1] and made >= done:
            self._made = made + 1
            yield made, tokens

    def _pieces(self) -> Iterator[tuple[np.ndarray, bool]]:
        """The tokens as blocks have them, a piece at a time, and whether the piece ends with a document."""
        size, drops = self._config.block_size, self._config.long_documents == "drop"
        ended, begun = self._documents.place["documents"], 0  # documents, and tokens of the one that goes on
        held = np.empty(0, np.int32)  # of a document that may be dropped yet
        for row in token_rows(self._documents, self._tokenizer, self._end):
            ids = np.frombuffer(row["input_ids"], np.int32)
            lengths = np.frombuffer(row["documents"], DOCUMENT)["tokens"]
            if not self._sha256:
                self._sha256, self.scored = row["sha256"], float(np.mean(ids >= 0))
            parts = np.split(ids, np.cumsum(lengths) - begun)  # the last one is of a document that goes on
            starts = [begun] + [0] * len(lengths)
            begun = len(parts[-1]) + starts[-1]
            if drops:
                starts[0], parts[0] = 0, np.concatenate([held, parts[0]])
                held = parts.pop()[: size + 1]
                parts = [part for part, length in zip(parts, lengths, strict=True) if length <= size]
            ended += len(lengths)
            rows = [np.concatenate([np.empty(0, np.int32), *parts])]
            if self._apart:
                distances = [np.minimum(np.arange(s, s + len(p)), size) for s, p in zip(starts, parts, strict=False)]
                rows.append(np.concatenate([np.empty(0, np.int64), *distances]).astype(np.int32))
            yield np.stack(rows), self._documents.place["documents"] == ended


def load_blocks(
    config: DataConfig, training: StreamedFiles | StreamedRows, evaluation: Documents,
    tokenizer: PreTrainedTokenizerBase, seed: int,
) -> tuple[StreamedData, Blocks]:  # fmt: skip
    """What to train on, of which nothing but its start is read yet, and the blocks to evaluate on."""
    stream = load_stream(config, evaluation, tokenizer, "held out")
    if training.has_messages and not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        warn("the tokenizer has no chat template; a plain one is used, and saved with the model")
    eval_blocks = group_texts(stream, config.block_size, apart=config.pack == "documents")
    need_text(eval_blocks)
    return StreamedData(config, training, tokenizer, seed), eval_blocks
