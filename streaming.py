"""Text that is larger than the disk: read as it is needed, shuffled in a buffer, resumed exactly where it was.

    training, evaluation = load_documents(config, seed=42)      # stands in for text.load_documents
    training_data, eval_blocks = load_blocks(config, training, evaluation, tokenizer, seed=42)     # data.load_blocks
    for micro_batches, position, numbers in training_data.batches(8, 1, Position()):
        state, tensors = training_data.state()       # after this update; `restore` goes on from it in another process

Records become documents and tokens as everywhere. Consecutive blocks of them go into the buffer, and from there, in a
random order, into updates. An epoch ends with what is left there; the next one begins at the start of the text.

A run that starts on several ranks splits the text into as many shards, each with a place, a buffer and epochs of its
own, and draws about as many blocks of an update from each. They stay as many on whatever ranks the run goes on.
"""

import copy
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

import data
import text
from config import UserError, find_hub, one_line, require, warn
from data import Position

FIRST_RECORDS = 100  # of a table; they say which columns there are and what these hold

Block = np.ndarray  # (2, length) int32: ids, ~id where not scored; how far each is from its document's start
Given = tuple[dict[str, Any], Block, list[tuple[int, Block]]]  # a shard's state, tokens left over, and buffer
NO_TOKENS = np.empty((2, 0), np.int32)


def check_flags(config: text.DataConfig, tokenizer: str | None, max_steps: int | None, num_workers: int) -> None:
    """Raises UserError where flags of other parts do not go with --streaming."""
    rules = [
        (max_steps is not None, "--streaming: the length of the text is not known; give --max_steps"),
        (not (tokenizer or "").startswith("train:"), f"--tokenizer {tokenizer}: needs text that does not stream"),
        (num_workers == 0, f"--num_workers {num_workers}: text that streams is read in this process; leave it out"),
    ]
    broken = [message for holds, message in rules if config.streaming and not holds]
    require(not broken, "\n".join(broken))


# ---------------------------------------------------------------------------------------------------------------------
# Documents. `place`, which JSON can hold, says where reading begins, and moves on with each document that is given.


class StreamedFiles(text.Documents):
    def __init__(self, name: str, paths: list[str], config: text.DataConfig):
        self.name, self.version = name, f"{len(paths)} files"
        self._files = text.read_texts(paths[: config.max_documents])
        self.start = self.place = {"documents": 0}
        self.most_shards = len(self._files)

    def shard(self, number: int, count: int) -> "StreamedFiles":
        """Every ``count``-th file."""
        part = copy.copy(self)
        part._files = self._files.select(range(number, len(self._files), count))
        return part

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[text.Piece]]:
        for i in range(self.place["documents"], len(self._files)):
            self.before, self.place = self.place, {"documents": i + 1}
            yield from self._files.select([i]).marked(tokenizer)


class StreamedRows(text.Documents):
    """The documents of a table's records. Their columns are those of the first ones."""

    def __init__(self, name: str, table: datasets.IterableDataset, config: text.DataConfig, version: str):
        self.name, self.version, self._limit = name, version, config.max_documents
        with _reading(f"{name}: the first records"):
            head = datasets.Dataset.from_list(list(table.take(FIRST_RECORDS)), features=table.features)
        self._form = text.read_rows(head, dataclasses.replace(config, filter=[]))
        self.has_messages = self._form.has_messages
        self._filters = [text.read_filter(head, rule, config.text_separator) for rule in config.filter]
        filtered = {text.parse_filter(rule)[0].split(".")[0] for rule in config.filter}
        if table.features is None:  # CSV: else each piece of a file would have types of its own
            empty, some = datasets.Value("null"), datasets.Value("string")  # a column may be filled later on
            table = table.cast(datasets.Features({k: some if v == empty else v for k, v in head.features.items()}))
        self._table = table.select_columns(sorted({*self._form.columns, *filtered}))
        self.start = self.place = {"documents": 0, "records": 0, "table": self._table.state_dict()}
        self.most_shards = config.max_documents or sys.maxsize

    def shard(self, number: int, count: int) -> "StreamedRows":
        """Whole files where they divide evenly, or nearly so as they are many; else every ``count``-th record."""
        part, files = copy.copy(self), self._table.num_shards
        table = self._table.shard(1, 0)  # all of it, of its own: tables that share a reader move each other's place
        part._table = split_dataset_by_node(table, number, count, "shards" if files >= 10 * count else "auto")
        part._limit = self._limit and len(range(number, self._limit, count))
        part.start = part.place = self.start | {"table": part._table.state_dict()}
        return part

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[text.Piece]]:
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
                self.before = self.place
                self.place = {"documents": documents, "records": number, "table": self._table.state_dict()}
                yield pieces


Streamed = StreamedFiles | StreamedRows


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # which ones, depends on the format and on the library that reads a URL
        fix = "mend it, or go on with --resume when it is there again"
        raise UserError(f"{what} cannot be read ({one_line(error)}); {fix}") from error


def load_documents(config: text.DataConfig, seed: int) -> tuple[Streamed, text.Documents]:
    """Returns the training and the evaluation documents, of which the latter are read as a whole."""
    training = _stream_files(config) if config.train_files else _stream_dataset(config)
    if config.eval_files:
        config = dataclasses.replace(config, max_documents=None)
        return training, text.read_documents(config, "--eval_files", config.eval_files)
    # Read as it comes as well: `datasets` would fetch the other splits too.
    config = dataclasses.replace(config, dataset_revision=training.version or None)
    table = text.load_table("--dataset", config.dataset, config, config.dataset_eval_split, streaming=True)
    with _reading(f"--dataset_eval_split {config.dataset_eval_split}"):
        return training, text.read_rows(datasets.Dataset.from_list(list(table), features=table.features), config)


def _stream_files(config: text.DataConfig) -> Streamed:
    paths, kind = text.find_files("--train_files", config.train_files, config, remote=True)
    name = f"--train_files {' '.join(paths)[:200]}"
    has_client = find_spec("aiohttp") or not any(path.startswith(("http:", "https:")) for path in paths)
    require(has_client, f"{name}: needs aiohttp; install it (pip install aiohttp), or download the files")
    if kind == "text":
        return StreamedFiles(name, paths, config)
    files = [path if "://" in path else str(Path(path).resolve()) for path in paths]
    with _reading(name):
        table = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    return StreamedRows(name, table, config, f"{len(paths)} files")


def _stream_dataset(config: text.DataConfig) -> StreamedRows:
    """A Hub dataset as it is at one commit, also where it changes while it is read."""
    if not Path(config.dataset).exists():
        find_hub()
        try:
            commit = HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha
        except Exception as error:  # which ones, depends on the HTTP library of the Hub's client
            known = f"--dataset {config.dataset}: cannot be loaded ({one_line(error)})"
            raise UserError(f"{known}; check name, revision and network") from error
        config = dataclasses.replace(config, dataset_revision=commit)
    table = text.load_table("--dataset", config.dataset, config, config.dataset_split, streaming=True)
    return StreamedRows(f"--dataset {config.dataset}", table, config, config.dataset_revision or "")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and batches


class Shard:
    """One of the shards of the text, or all of it: its blocks in a random order, epoch after epoch."""

    def __init__(
        self, config: text.DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int | list[int]
    ):
        self._config, self._documents, self._tokenizer = config, documents, tokenizer
        self._random = np.random.default_rng(seed)
        self.buffer: list[tuple[int, Block]] = []  # empty where an epoch begins
        self.sha256, self.scored = "", 0.0  # of the first tokens
        self._begin_epoch()

    def draw(self, count: int) -> list[tuple[int, Block]]:
        """The next blocks, each with its number in the text of the epoch; fewer where that ends."""
        self._unread = self._unread or self.blocks()
        self._fill()
        drawn: list[tuple[int, Block]] = []
        while self.buffer and len(drawn) < count:
            chosen = self._random.integers(len(self.buffer))
            self.buffer[chosen], self.buffer[-1] = self.buffer[-1], self.buffer[chosen]
            drawn.append(self.buffer.pop())
            self._fill()
        if not self.buffer:
            self._begin_epoch()
        return drawn

    def state(self) -> Given:
        state = {"at": self._at, "made": self._made, "random": self._random.bit_generator.state}
        return state, self._carry, list(self.buffer)

    def restore(self, given: Given) -> None:
        state, self._carry, buffer = given
        self._at, self._made, self.buffer = state["at"], state["made"], list(buffer)
        self._random.bit_generator.state = state["random"]

    def _begin_epoch(self) -> None:
        # Reading can go on between two documents alone, so a state is such a place, with the number of blocks made
        # before and the tokens left over there; and how many blocks were made in all, some of them behind it.
        self._at, self._carry, self._made = {"place": self._documents.start, "blocks": 0}, NO_TOKENS, 0
        self._unread: Iterator[tuple[int, Block]] | None = None

    def _fill(self) -> None:
        self.buffer += islice(self._unread, self._config.shuffle_buffer - len(self.buffer))

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The blocks of the epoch that were not made yet, with their numbers."""
        size, made, done = self._config.block_size, self._at["blocks"], self._made
        self._documents.place, tokens = self._at["place"], self._carry
        for piece, whole in self._pieces():  # whole: tokens to the end of the last document that ends in it
            end, before = tokens.shape[1] + whole, made
            tokens = np.concatenate([tokens, piece], axis=1)
            carry = tokens[:, end // size * size : end].copy()
            for start in range(0, tokens.shape[1] - size + 1, size):
                made += 1
                if made > done:
                    self._made = made
                    yield made - 1, tokens[:, start : start + size].copy()  # a view would keep the whole piece
            tokens = tokens[:, tokens.shape[1] // size * size :].copy()
            if place := self._ended:
                self._at, self._carry = {"place": place, "blocks": before + end // size}, carry
        few = f"{self._documents.name}: the training text has {tokens.shape[1]} tokens, and {size} or more are needed"
        require(made > 0, f"{few}; give more text, other rules or a smaller --block_size")
        if tokens.shape[1] and made >= done:
            self._made = made + 1
            yield made, tokens

    def _pieces(self) -> Iterator[tuple[Block, bool]]:
        """The text's tokens, a piece at a time, and whether the piece ends between two documents."""
        size, drops = self._config.block_size, self._config.long_documents == "drop"
        ended, begun = self._documents.place["documents"], 0  # documents, and tokens of the one that goes on
        held = NO_TOKENS  # the start of a document that may be too long
        for row in data.token_rows(self._documents, self._tokenizer, data.end_of_text_id(self._tokenizer)):
            ids = np.frombuffer(row["input_ids"], np.int32)
            lengths = np.frombuffer(row["documents"], data.DOCUMENT)["tokens"]
            if len(ids) and not self.sha256:
                self.sha256, self.scored = row["sha256"], float(np.mean(ids >= 0))
            ends = np.cumsum(lengths) - begun
            starts = np.append(-begun, ends)  # of the documents; the last one goes on
            positions = np.arange(len(ids)) - np.repeat(starts, np.diff(ends, prepend=0, append=len(ids)))
            piece = np.stack([ids, np.minimum(positions, size)], dtype=np.int32)
            begun, ended = len(ids) - starts[-1], ended + len(lengths)
            if drops:
                *parts, held_next = np.split(piece, ends, axis=1)
                if parts:
                    parts[0], held = np.concatenate([held, parts[0]], axis=1), NO_TOKENS
                held = np.concatenate([held, held_next], axis=1)[:, : size + 1]
                kept = [part for part, length in zip(parts, lengths, strict=True) if length <= size]
                piece = np.concatenate([NO_TOKENS, *kept], axis=1)
                ends = [piece.shape[1]]
            begun_since = self._documents.place["documents"] - ended
            places = {0: self._documents.place, 1: self._documents.before}
            self._ended = places.get(begun_since) if len(lengths) else None  # where the next document begins
            yield piece, int(ends[-1]) if len(lengths) else 0


class StreamedData:
    """What the loop trains on, as `data.TrainingData`: all shards of the text, of which a rank reads its own.

    Rank r of N reads the shards s of S with s % N = r; where there are more ranks than shards, those with
    r % S = s read the same one, and share out what they draw from it. So an update is of the same blocks on any ranks.
    """

    def __init__(self, config: text.DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._config, self._documents, self._tokenizer, self._seed = config, documents, tokenizer, seed
        self._count, self._given = 0, {}  # of the shards, 0 until the first update; and what is known of each here
        whole = self._shard(0, 1)
        next(whole.blocks())  # what is wrong with the text is said before a run has begun
        self._sha256, self.scored = whole.sha256, whole.scored

    def __str__(self) -> str:
        size, buffer = self._config.block_size, self._config.shuffle_buffer
        return f"text that streams from {self._documents.name}, each block drawn from {buffer:,}, in blocks of {size}"

    @property
    def identity(self) -> str:
        """The dataset's commit or the number of files, and a hash of the settings and of the first tokens."""
        names = {field.name for field in dataclasses.fields(text.TextConfig)} - {"dataset", "dataset_revision"}
        form = str([getattr(self._config, name) for name in sorted(names)])
        return f"{self._documents.version} {hashlib.sha256((form + self._sha256).encode()).hexdigest()}".strip()

    def updates_per_epoch(self, blocks_per_update: int) -> None:
        return None

    def epochs(self, position: Position) -> int:
        return position.epoch

    def first(self, count: int) -> dict[str, torch.Tensor]:
        """The first blocks of the whole text as a batch."""
        return data.collate([self._item(block) for _, block in islice(self._shard(0, 1).blocks(), count)])

    def batches(
        self,
        batch_size: int,
        blocks_per_update: int,
        position: Position,
        rank: int = 0,
        ranks: int = 1,
        same_shape: bool = False,
        *workers: int,
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
        """As `data.TrainingData.batches`, of what this rank knows: its shards' blocks, the first shard's position.

        So rank 0 gives the position of shard 0. Number n is block n // S of shard n % S in its epoch. Raises UserError
        where the text cannot be read further.
        """
        count = self._count or min(ranks, blocks_per_update, self._documents.most_shards)
        draws = [len(range(s, blocks_per_update, count)) for s in range(count)]

        def share(r: int) -> dict[int, range]:
            """The shards that a rank reads, and which of the blocks drawn from each are its own."""
            readers = max(1, len(range(r % count, ranks, count)))
            return {s: range(draws[s])[r // count :: readers] for s in range(r % count, count, ranks)}

        most = max(sum(map(len, share(r).values())) for r in range(ranks))
        least = most if ranks > 1 else 0  # all ranks make as many batches, be it some without blocks
        mine, apart = share(rank), self._config.pack == "documents"
        shape = {"rows": batch_size, "length": self._config.block_size} if same_shape else {}
        shards = {s: self._shard(s, count, self._given.get(s)) for s in mine}
        while True:
            drawn = {s: shard.draw(draws[s]) for s, shard in shards.items()}
            self._count, self._given = count, {s: shard.state() for s, shard in shards.items()}
            position = Position(position.epoch, position.blocks + len(drawn[rank % count]))
            if not shards[rank % count].buffer:
                position = Position(position.epoch + 1)
            items = [self._item(block) for s, own in mine.items() for _, block in drawn[s][own.start :: own.step]]
            parts = [items[i : i + batch_size] for i in range(0, max(len(items), least), batch_size)]
            numbers = [number * count + s for s in mine for number, _ in drawn[s]]
            yield [data.collate(part, apart=apart, **shape) for part in parts], position, numbers

    def state(self, rank: int = 0, ranks: int = 1) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Of the shards whose first reader this rank is, as it was when `batches` gave its last update."""
        states = {}
        for s in range(rank, self._count, ranks):
            state, carry, buffer = self._given[s]
            blocks = [block for _, block in buffer]
            tensors = {
                "carry": torch.from_numpy(carry),
                "buffer": torch.from_numpy(np.concatenate([NO_TOKENS, *blocks], axis=1)),
                "lengths": torch.tensor([block.shape[1] for block in blocks], dtype=torch.int64),
            }
            states[s] = {**state, "buffer": [number for number, _ in buffer]}, tensors
        return states

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        shards = {s: shard for state in states for s, shard in state.items()}
        tensors = {f"{s}.{name}": tensor for s, (_, own) in shards.items() for name, tensor in own.items()}
        return {"shards": [shards[s][0] for s in range(len(shards))]}, {"stream": tensors}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if "at" in state:  # of a run from before there were shards
            state, tensors = {"shards": [state]}, {f"0.{name}": tensor for name, tensor in tensors.items()}
        self._count = len(state["shards"])
        for s, shard in enumerate(state["shards"]):
            carry, buffer, lengths = (tensors[f"{s}.{name}"].numpy() for name in ("carry", "buffer", "lengths"))
            blocks = np.split(buffer, np.cumsum(lengths), axis=1)[:-1]
            self._given[s] = shard, carry, list(zip(shard["buffer"], blocks, strict=True))

    def _shard(self, number: int, count: int, given: Given | None = None) -> Shard:
        documents, seed = self._documents, self._seed
        if count > 1:
            documents, seed = documents.shard(number, count), [seed, number]
            documents.name += f", shard {number} of {count}"
        shard = Shard(self._config, documents, self._tokenizer, seed)
        if given:
            shard.restore(given)
        return shard

    def _item(self, block: Block) -> dict[str, torch.Tensor]:
        ids, positions = block.astype(np.int64)
        # A document that began in the block before has its positions from the start of this one.
        positions = np.minimum(positions, np.arange(len(ids))) if self._config.pack == "documents" else None
        return data.block_item(ids, positions)


def load_blocks(
    config: text.DataConfig,
    training: Streamed,
    evaluation: text.Documents,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[StreamedData, data.Blocks]:
    """What to train on, of which nothing but its start is read yet, and the blocks to evaluate on."""
    stream = data.load_stream(config, evaluation, tokenizer, "held out")
    eval_blocks = data.group_texts(stream, config.block_size, apart=config.pack == "documents")
    data.need_text(eval_blocks)
    if training.has_messages and not tokenizer.chat_template:
        tokenizer.chat_template = text.CHAT_TEMPLATE
        warn("the tokenizer has no chat template; a plain one is used, and saved with the model")
    return StreamedData(config, training, tokenizer, seed), eval_blocks
