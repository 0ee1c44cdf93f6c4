"""Turn records into documents: text, a prompt with its completion, or a conversation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, warn
from corpus.chat import Piece, RenderError, render
from corpus.files import Files, Place
from corpus.flags import TextConfig
from corpus.messages import is_messages, read_messages
from corpus.templates import join_text, matches, parse_filter, parse_template, value_at

FIRST_RECORDS = 100  # a column that none of them has does not exist
SHAPES = {  # common columns, and the flags that read them
    ("instruction", "input", "output"): r"--prompt_column '{instruction}\n{input}\n' --completion_column output",
    ("instruction", "output"): "--prompt_column instruction --completion_column output",
    ("prompt", "completion"): "--prompt_column prompt --completion_column completion",
    ("question", "answer"): "--prompt_column question --completion_column answer",
}


@dataclass(frozen=True)
class Document:
    """The text of a document as (text, has_loss) pieces, its name for messages, and the place after it."""

    pieces: Iterator[Piece]
    name: str
    place: Place


class Documents:
    """The documents of one source, one for each record that passes the filters.

    ``records`` yields (record, place) from its method ``read``. Raise UserError if a column does not exist.
    """

    def __init__(self, records: Any, config: TextConfig):
        self.records, self._config = records, config
        flags = ("prompt_column", "completion_column") if config.prompt_column else ("text_column",)
        self._source = " ".join(f"--{flag} {getattr(config, flag)}" for flag in flags)
        self._templates = [parse_template(getattr(config, flag)) for flag in flags]
        self._columns = [column for template in self._templates for _, column in template if column]
        self._filters = [parse_filter(rule) for rule in config.filter]
        self.has_messages, self._top_columns = False, None
        if isinstance(records, Files) and records.is_text:
            unused = config.changed_columns() + [f"--filter {rule}" for rule in config.filter]
            if unused and records.flag_name != "--mix":  # in a mixture, other sources may have columns
                warn(f"{' '.join(unused)} is ignored: text files have no columns")
            self._filters = []
        else:
            self._check_columns()

    def _check_columns(self) -> None:
        """Find the columns of the text in the first records. The first record that the filters keep sets the shape."""
        missing, first, shape = set(self._columns), None, None
        for record, place in islice(self.records.read(), FIRST_RECORDS):
            name = f"{self.records.name(place)}: record {place['record']}"
            require(isinstance(record, dict), f"{name} is no object. Pass objects such as {{'text': ...}}.")
            first = first or record
            missing = {column for column in missing if column not in record and value_at(record, column) is None}
            if self._is_kept(record) and any(self._values(record)):
                shape = shape or record
            if shape and not missing:
                break
        require(first is not None, f"{self.records.name({'file': 0})}: has no records. Pass a file with text.")
        for column in [column for column in self._columns if column in missing]:
            raise UserError(f"{self._source}: column {column} does not exist. {shape_advice(first)}")
        self.has_messages = all(is_messages(value) for value in self._values(shape or first))
        filtered = [column for column, *_ in self._filters]
        self._top_columns = {*self._columns, *filtered, *(c.split(".")[0] for c in self._columns + filtered), "tools"}

    def _is_kept(self, record: dict[str, Any]) -> bool:
        return all(matches(record, *rule, self._config.text_separator) for rule in self._filters)

    @property
    def fingerprint(self) -> str:
        config = self._config
        form = (self._source, config.text_separator, config.loss_on, config.filter, config.max_documents)
        return f"{self.records.fingerprint} {form}"

    @property
    def max_shards(self) -> int:
        return min(self.records.max_shards, self._config.max_documents or self.records.max_shards)

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield each document as an iterator over strings. A conversation gives its contents without a template."""
        return ((text for text, _ in document.pieces) for document in self.read())

    def read(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        place: Place | None = None,
        index: int = 0,
        count: int = 1,
    ) -> Iterator[Document]:
        """Yield the documents of one shard of ``count``, from ``place`` on."""
        place, limit = place or {"documents": 0, "records": None}, self._config.max_documents
        num_documents, shard = place["documents"], (index, count)
        if limit:  # counts all documents, so each shard reads them all
            shard, (index, count) = (0, 1), shard
        else:
            index, count = 0, 1
        num_records, first, unseen = 0, None, {column for column, *_ in self._filters}
        for record, after in self.records.read(place["records"], self._top_columns, *shard):
            if num_documents == limit:
                break
            num_records, first = num_records + 1, first or record
            unseen = {column for column in unseen if column not in record and value_at(record, column) is None}
            if self._is_kept(record):
                num_documents += 1
                name = f"{self.records.name(after)}, {self._source}: record {after['record']}"
                if (num_documents - 1) % count == index:
                    here = {"documents": num_documents, "records": after}
                    yield Document(self._pieces(record, name, tokenizer), name, here)
        if shard == (0, 1) and place["records"] is None:
            self._check_filters(num_records, num_documents, first, unseen)

    def _check_filters(self, num_records: int, num_documents: int, first: Any, unseen: set[str]) -> None:
        """Raise UserError if a filter names a column that no record has, or if no record passes."""
        rules = " ".join(f"--filter {rule}" for rule in self._config.filter)
        if num_records and unseen:
            raise UserError(
                f"{rules}: column {min(unseen)} does not exist. The record has {', '.join(first)}. Use one."
            )
        value = value_at(first, self._filters[-1][0]) if self._filters and num_records else None
        none = f"{rules}: none of {num_records:,} records passes; the value of the first is {str(value)[:40]}"
        require(bool(num_documents or not num_records or not self._filters), f"{none}. Use another filter.")

    def _pieces(self, record: Any, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Piece]:
        if isinstance(record, Iterator):  # a text file
            return ((text, True) for text in record)
        require(isinstance(record, dict), f"{name} is no object. Remove it.")
        if self.has_messages:
            pieces = self._conversation(record, name, tokenizer)
        else:
            texts = [self._fill(template, record, name) for template in self._templates]
            pieces = [*((text, False) for text in texts[:-1]), (texts[-1], True)]
        return ((text, has_loss or self._config.loss_on == "all") for text, has_loss in pieces)

    def _fill(self, template: Any, record: dict[str, Any], name: str) -> str:
        filled, kinds = [], str if len(template) == 1 and not template[0][0] else (str, int, float)
        for text, column in template:
            found = value_at(record, column) if column else ""
            value = join_text(found, self._config.text_separator, kinds)
            if value is None:
                use = f"Use --filter {column}!=None to leave it out." if found is None else shape_advice(record)
                raise UserError(f"{name} contains {str(found)[:40]}, not text, in column {column}. {use}")
            filled += [text, value]
        return "".join(filled)

    def _values(self, record: dict[str, Any]) -> list[Any]:
        """Return the value of each template that is a plain column, else None."""
        columns = (template[0][1] if len(template) == 1 and not template[0][0] else "" for template in self._templates)
        return [value_at(record, column) if column else None for column in columns]

    def _conversation(self, record: dict, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
        parts = [read_messages(value, name) for value in self._values(record)]
        messages, first = list(chain(*parts)), len(parts[0]) if len(parts) > 1 else 0
        if tokenizer is None:
            return [(message.get("content") or "", True) for message in messages]
        has_answer = self._config.loss_on == "all" or any(m["role"] == "assistant" for m in messages[first:])
        require(has_answer, f"{name} has no message of the assistant. Remove it, or use --loss_on all.")
        try:
            return render(messages, tokenizer, self._config.loss_on, record.get("tools"), first)
        except RenderError as error:
            raise UserError(f"{name}: {error}") from error


def shape_advice(record: dict[str, Any]) -> str:
    """Return the columns of a record, and the flags that would read it."""
    columns = dict(_columns(record))
    flags = [flags for keys, flags in SHAPES.items() if columns.keys() >= set(keys)][:1]
    readable = (c for c, value in columns.items() if is_messages(value) or join_text(value, "") is not None)
    flags += [f"--text_column {column}" for column in readable]
    use = f" Use {' or '.join(flags[:4])}." if flags else " Pass records with text."
    return f"The record has {', '.join(columns)}.{use}"


def _columns(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        nested = item[0] if isinstance(item, list) and item and not is_messages(item) else item
        if isinstance(nested, dict):
            yield from _columns(nested, f"{prefix}{key}.")
        else:
            yield prefix + key, item
