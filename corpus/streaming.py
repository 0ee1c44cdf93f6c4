"""Documents that are read as they are needed, so that the text may be larger than the disk."""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import datasets
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, root_cause
from cli.hub import find_hub
from corpus.documents import Documents, Piece, read_texts
from corpus.flags import DataConfig
from corpus.records import read_filter, read_rows
from corpus.sources import find_files, load_table, read_documents
from corpus.templates import parse_filter

FIRST_RECORDS = 100  # of a table; they say which columns there are and what these hold


def check_flags(config: DataConfig, tokenizer: str | None, max_steps: int | None, num_workers: int) -> None:
    """Raises UserError where flags of other parts do not go with --streaming."""
    rules = [
        (max_steps is not None, "--streaming: the length of the text is not known; give --max_steps"),
        (not (tokenizer or "").startswith("train:"), f"--tokenizer {tokenizer}: needs text that does not stream"),
        (num_workers == 0, f"--num_workers {num_workers}: text that streams is read in this process; leave it out"),
    ]
    broken = [message for holds, message in rules if config.streaming and not holds]
    require(not broken, "\n".join(broken))


class StreamedFiles(Documents):
    def __init__(self, name: str, paths: list[str], config: DataConfig):
        self.name, self.version = name, f"{len(paths)} files"
        self._files = read_texts(paths[: config.max_documents])
        self.start = self.place = {"documents": 0}
        self.most_shards = len(self._files)

    def shard(self, number: int, count: int) -> "StreamedFiles":
        """Every ``count``-th file."""
        part = copy.copy(self)
        part._files = self._files.select(range(number, len(self._files), count))
        return part

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        for i in range(self.place["documents"], len(self._files)):
            self.before, self.place = self.place, {"documents": i + 1}
            yield from self._files.select([i]).with_loss_mask(tokenizer)


class StreamedRows(Documents):
    """The documents of a table's records. Their columns are those of the first ones."""

    def __init__(self, name: str, table: datasets.IterableDataset, config: DataConfig, version: str):
        self.name, self.version, self._limit = name, version, config.max_documents
        with reading(f"{name}: the first records"):
            head = datasets.Dataset.from_list(list(table.take(FIRST_RECORDS)), features=table.features)
        self._form = read_rows(head, dataclasses.replace(config, filter=[]))
        self.has_messages = self._form.has_messages
        self._filters = [read_filter(head, rule, config.text_separator) for rule in config.filter]
        filtered = {parse_filter(rule)[0].split(".")[0] for rule in config.filter}
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

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        documents, number = self.place["documents"], self.place["records"]
        self._table.load_state_dict(self.place["table"])
        records = iter(self._table)
        while documents != self._limit:
            with reading(f"{self.name}: record {number + 1} or one soon after it"):
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
def reading(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # which ones, depends on the format and on the library that reads a URL
        fix = "mend it, or go on with --resume when it is there again"
        raise UserError(f"{what} cannot be read ({root_cause(error)}); {fix}") from error


def load_documents(config: DataConfig, seed: int) -> tuple[Streamed, Documents]:
    """Returns the training and the evaluation documents, of which the latter are read as a whole."""
    training = _stream_files(config) if config.train_files else _stream_dataset(config)
    if config.eval_files:
        config = dataclasses.replace(config, max_documents=None)
        return training, read_documents(config, "--eval_files", config.eval_files)
    # Read as it comes as well: `datasets` would fetch the other splits too.
    config = dataclasses.replace(config, dataset_revision=training.version or None)
    table = load_table("--dataset", config.dataset, config, config.dataset_eval_split, streaming=True)
    with reading(f"--dataset_eval_split {config.dataset_eval_split}"):
        return training, read_rows(datasets.Dataset.from_list(list(table), features=table.features), config)


def _stream_files(config: DataConfig) -> Streamed:
    paths, kind = find_files("--train_files", config.train_files, config, remote=True)
    name = f"--train_files {' '.join(paths)[:200]}"
    has_client = find_spec("aiohttp") or not any(path.startswith(("http:", "https:")) for path in paths)
    require(has_client, f"{name}: needs aiohttp; install it (pip install aiohttp), or download the files")
    if kind == "text":
        return StreamedFiles(name, paths, config)
    files = [path if "://" in path else str(Path(path).resolve()) for path in paths]
    with reading(name):
        table = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    return StreamedRows(name, table, config, f"{len(paths)} files")


def _stream_dataset(config: DataConfig) -> StreamedRows:
    """A Hub dataset as it is at one commit, also where it changes while it is read."""
    if not Path(config.dataset).exists():
        find_hub()
        try:
            commit = HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha
        except Exception as error:  # which ones, depends on the HTTP library of the Hub's client
            known = f"--dataset {config.dataset}: cannot be loaded ({root_cause(error)})"
            raise UserError(f"{known}; check name, revision and network") from error
        config = dataclasses.replace(config, dataset_revision=commit)
    table = load_table("--dataset", config.dataset, config, config.dataset_split, streaming=True)
    return StreamedRows(f"--dataset {config.dataset}", table, config, config.dataset_revision or "")
