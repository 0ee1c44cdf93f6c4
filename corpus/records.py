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
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))  # common names


@dataclass(frozen=True)
class Document:
    """The text of a document as (text, has_loss) pieces, its name for messages, and the place behind it."""

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
        sources = {parse_filter(rule)[0]: f"--filter {rule}" for rule in self._config.filter}
        sources |= dict.fromkeys(self._columns, self._source)
        missing, first = dict(sources), None
        for record, place in islice(self.records.read(), FIRST_RECORDS):
            is_object = isinstance(record, dict)
            require(
                is_object, f"{self.records.name(place)}: record 1 is no object. Pass objects such as {{'text': ...}}."
            )
            first = first or record
            missing = {c: s for c, s in missing.items() if c not in record and value_at(record, c) is None}
            if not missing:
                break
        require(first is not None, f"{self.records.name({'file': 0})}: has no records. Pass a file with text.")
        for column, source in missing.items():
            raise UserError(f"{source}: column {column} does not exist. {shape_advice(first)}")
        self.has_messages = all(is_messages(value) for value in self._values(first))
        self._top_columns = {column if column in first else column.split(".")[0] for column in sources} | {"tools"}

    @property
    def fingerprint(self) -> str:
        config = self._config
        form = (self._source, config.text_separator, config.loss_on, config.filter, config.max_documents)
        return f"{self.records.fingerprint} {form}"

    @property
    def max_shards(self) -> int:
        return min(self.records.max_shards, self._config.max_documents or self.records.max_shards)

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield each document as an iterator over strings. A conversation is its bare contents."""
        return ((text for text, _ in document.pieces) for document in self.read())

    def read(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        place: Place | None = None,
        index: int = 0,
        count: int = 1,
    ) -> Iterator[Document]:
        """Yield the documents of shard ``index`` of ``count`` that follow ``place``."""
        place = place or {"documents": 0, "records": None}
        num_documents, limit = place["documents"], self._config.max_documents
        limit = limit and len(range(index, limit, count))
        records, seen, first = self.records.read(place["records"], self._top_columns, index, count), 0, None
        while num_documents != limit and (item := next(records, None)):
            record, after = item
            seen, first = seen + 1, first or record
            if all(matches(record, *rule, self._config.text_separator) for rule in self._filters):
                num_documents += 1
                name = f"{self.records.name(after)}, {self._source}: record {after['record']}"
                yield Document(
                    self._pieces(record, name, tokenizer), name, {"documents": num_documents, "records": after}
                )
        if self._filters and seen and not num_documents:
            rules, value = (
                " ".join(f"--filter {rule}" for rule in self._config.filter),
                value_at(first, self._filters[-1][0]),
            )
            none = f"{rules}: none of {seen:,} records passes; the value of the first is {str(value)[:40]}"
            raise UserError(f"{none}. Use another filter.")

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
        filled = []
        for text, column in template:
            value = join_text(value_at(record, column), self._config.text_separator) if column else ""
            if value is None:
                problem = f"{name} contains {str(value_at(record, column))[:40]}, not text, in column {column}"
                raise UserError(f"{problem}. {shape_advice(record)} Or use --filter.")
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
    flags = [f"--prompt_column {p} --completion_column {c}" for p, c in PAIRS if {p, c} <= columns.keys()]
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
