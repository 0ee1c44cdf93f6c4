"""Read documents as training needs them, so that the text may be larger than the disk."""

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

from cli.errors import UserError, require, root_cause, without_credentials
from cli.hub import find_hub, split_revision
from corpus.documents import Documents, Piece, text_files
from corpus.flags import DataConfig
from corpus.records import read_filter, read_rows
from corpus.sources import find_files, load_table, read_documents
from corpus.templates import parse_filter

FIRST_RECORDS = 100  # of a table; they show which columns there are and their types


class StreamedFiles(Documents):
    """Text files, one document each, which are opened one after the other.

    ``state`` is the place from which reading continues. ``previous_state`` is the one before the newest document.
    """

    def __init__(self, name: str, paths: list[str], config: DataConfig):
        self.name, self.version = name, f"{len(paths)} files"
        self._files = text_files(paths[: config.max_documents], "--train_files")
        self.initial_state = self.state = {"documents": 0}
        self.max_shards = len(self._files)

    def shard(self, index: int, count: int) -> "StreamedFiles":
        """Return every ``count``-th file, from file ``index`` on."""
        part = copy.copy(self)
        part._files = self._files.select(range(index, len(self._files), count))
        return part

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        for i in range(self.state["documents"], len(self._files)):
            self.previous_state, self.state = self.state, {"documents": i + 1}
            yield from self._files.select([i]).with_loss_mask(tokenizer)


class StreamedRows(Documents):
    """The documents of the records of a table. The first records decide the columns and their types.

    ``state`` is the place from which reading continues. ``previous_state`` is the one before the newest document.
    """

    def __init__(self, name: str, table: datasets.IterableDataset, config: DataConfig, version: str):
        self.name, self.version, self._limit = name, version, config.max_documents
        with reading(f"{name}: the first records"):
            head = datasets.Dataset.from_list(list(table.take(FIRST_RECORDS)), features=table.features)
        self._rows = read_rows(head, dataclasses.replace(config, filter=[]))
        self.has_messages = self._rows.has_messages
        self._filters = [read_filter(head, rule, config.text_separator) for rule in config.filter]
        filter_columns = {parse_filter(rule)[0].split(".")[0] for rule in config.filter}
        if table.features is None:  # CSV: without a cast, each piece of a file would have its own types
            null, string = datasets.Value("null"), datasets.Value("string")  # an empty column may be filled later on
            table = table.cast(datasets.Features({k: string if v == null else v for k, v in head.features.items()}))
        self._table = table.select_columns(sorted({*self._rows.columns, *filter_columns}))
        self.initial_state = self.state = {"documents": 0, "records": 0, "table": self._table.state_dict()}
        self.max_shards = config.max_documents or sys.maxsize

    def shard(self, index: int, count: int) -> "StreamedRows":
        """Return shard ``index`` of ``count``: whole files, or every ``count``-th record.

        Files stay whole if they divide evenly, or if there are at least ten per shard.
        """
        part, num_files = copy.copy(self), self._table.num_shards
        table = self._table.shard(1, 0)  # a reader of its own: tables that share one change each other's state
        part._table = split_dataset_by_node(table, index, count, "shards" if num_files >= 10 * count else "auto")
        part._limit = self._limit and len(range(index, self._limit, count))
        part.initial_state = part.state = self.initial_state | {"table": part._table.state_dict()}
        return part

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        num_documents, num_records = self.state["documents"], self.state["records"]
        self._table.load_state_dict(self.state["table"])
        records = iter(self._table)
        while num_documents != self._limit:
            with reading(f"{self.name}: record {num_records + 1} or one soon after it"):
                record = next(records, None)
            if record is None:
                return
            num_records += 1
            if all(passes(record) for passes in self._filters):
                num_documents += 1
                name = f"{self.name}, {self._rows.source}: record {num_records}"
                pieces = self._rows.document(name, record, tokenizer)
                self.previous_state = self.state
                table_state = self._table.state_dict()
                self.state = {"documents": num_documents, "records": num_records, "table": table_state}
                yield pieces


Streamed = StreamedFiles | StreamedRows


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any error inside the block into a UserError that says that ``name`` cannot be read."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the class depends on the format and on the library that reads a URL
        fix = "Use --resume when it is readable again"
        raise UserError(f"{name} cannot be read ({root_cause(error)}). {fix}.") from error


def load_documents(config: DataConfig, seed: int) -> tuple[Streamed, Documents]:
    """Return the training documents as a stream, and the evaluation documents as a whole."""
    training = _stream_files(config) if config.train_files else _stream_dataset(config)
    if config.eval_files:
        config = dataclasses.replace(config, max_documents=None)
        return training, read_documents(config, "--eval_files", config.eval_files)
    # Stream the evaluation split as well: without it, `datasets` would download all splits.
    name = _at_revision(config.dataset, training.version)
    table = load_table("--dataset", name, config, config.dataset_eval_split, streaming=True)
    with reading(f"--dataset_eval_split {config.dataset_eval_split}"):
        return training, read_rows(datasets.Dataset.from_list(list(table), features=table.features), config)


def _stream_files(config: DataConfig) -> Streamed:
    paths, builder, options = find_files("--train_files", config.train_files, config, allow_urls=True)
    name = f"--train_files {without_credentials(' '.join(paths))[:200]}"
    has_client = find_spec("aiohttp") or not any(path.startswith(("http:", "https:")) for path in paths)
    require(has_client, f"{name}: needs aiohttp. Run pip install aiohttp, or pass downloaded files.")
    if builder == "text":
        return StreamedFiles(name, paths, config)
    files = [path if "://" in path else str(Path(path).resolve()) for path in paths]
    with reading(name):
        table = datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
    return StreamedRows(name, table, config, f"{len(paths)} files")


def _stream_dataset(config: DataConfig) -> StreamedRows:
    """Return a Hub dataset as it is at one commit, even if it changes during training."""
    flag_text, commit = f"--dataset {config.dataset}", ""
    dataset_id, revision = split_revision(config.dataset, "--dataset")
    if not Path(dataset_id).exists():
        find_hub()
        try:
            commit = HfApi().dataset_info(dataset_id, revision=revision).sha
        except Exception as error:  # the class depends on the HTTP library of the Hub's client
            problem = f"{flag_text}: cannot be loaded ({root_cause(error)})"
            raise UserError(f"{problem}. Use another id or revision, or check the network.") from error
    name = _at_revision(config.dataset, commit)
    table = load_table("--dataset", name, config, config.dataset_split, streaming=True)
    return StreamedRows(flag_text, table, config, commit)


def _at_revision(name: str, commit: str) -> str:
    """Return the dataset ``name`` with ``commit`` as its revision; a local dataset has no commit."""
    return f"{split_revision(name, '--dataset')[0]}@{commit}" if commit else name
