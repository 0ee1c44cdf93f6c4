"""Read the rows of a table as documents: text, a prompt with its completion, or a conversation."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, root_cause
from corpus.chat import render
from corpus.documents import Documents, Piece, split_position
from corpus.flags import TextConfig
from corpus.templates import Template, join_text, parse_filter, parse_template, value_at


@dataclass(frozen=True)
class Rows(Documents):
    """The documents of a table, one per row: text, a prompt and its completion, or a conversation."""

    table: datasets.Dataset
    source: str  # the flags with their values, for error messages
    record_numbers: np.ndarray  # index of each row among all records of the source, before filters
    templates: tuple[Template, ...]  # of the text; or of prompt and completion; or the column of the messages
    separator: str = " "
    has_messages: bool = False
    loss_on: str = "completion"
    has_end_of_text: bool = True

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        form = (self.templates, self.separator, self.has_messages, self.loss_on, self.has_end_of_text)
        return f"{self.table._fingerprint}:{form}"

    @property
    def columns(self) -> list[str]:
        return sorted({column.split(".")[0] for template in self.templates for _, column in template if column})

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        batches = self.table.select_columns(self.columns).iter(batch_size=100)
        records = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        number = -1
        try:
            for number, record in zip(self.record_numbers, records, strict=True):
                yield self.document(f"{self.source}: record {number + 1}", record, tokenizer)
        except UnicodeDecodeError as error:
            name = f"{self.source}: record {number + 2}"
            raise UserError(f"{name} or a later one is not UTF-8 ({error.reason}). Use iconv to convert it.") from error

    def document(self, name: str, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Piece]:
        """Return the document of one record as (text, has_loss) pieces. Error messages call the record ``name``."""
        if self.has_messages:
            pieces = self._conversation(name, record, tokenizer)
        else:
            texts = [self._fill(name, template, record) for template in self.templates]
            pieces = [*((text, False) for text in texts[:-1]), (texts[-1], True)]
        return ((text, has_loss or self.loss_on == "all") for text, has_loss in pieces)

    def _fill(self, name: str, template: Template, record: dict[str, Any]) -> str:
        filled = []
        for text, column in template:
            value = join_text(value_at(record, column.split(".")), self.separator) if column else ""
            if value is None or "\0" in value:
                problem = "a NUL character" if value else f"{str(record.get(column.split('.')[0]))[:40]}, not text"
                fix = "Remove the record or use --filter; messages need the keys role and content."
                raise UserError(f"{name} contains {problem}. {fix}")
            filled += [text, value]
        return "".join(filled)

    def _conversation(self, name: str, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
        messages = value_at(record, self.templates[0][0][1].split("."))
        is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        require(is_list and bool(messages), f"{name} has no messages. Remove it.")
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for i, message in enumerate(messages, 1):
            texts = [message.get(key) for key in ("role", "content")]
            is_text = all(isinstance(text, str) and "\0" not in text for text in texts)
            require(is_text, f"{name}: message {i} lacks a role or content that is text. Set both, or remove it.")
        if tokenizer is None:
            return [(message["content"], True) for message in messages]
        has_answer = self.loss_on == "all" or any(message["role"] == "assistant" for message in messages)
        require(has_answer, f"{name} has no message of the assistant. Remove it, or use --loss_on all.")
        try:
            pieces = render(messages, tokenizer, self.loss_on)
        except TemplateError as error:
            reason = root_cause(error).rstrip(".")
            raise UserError(f"{name} does not fit the chat template ({reason}). Remove or change it.") from error
        changed = f"{name}: the tokenizer's chat template changes the contents, so the answers cannot be found"
        require(pieces is not None, f"{changed}. Use --loss_on all.")
        return pieces

    def select(self, indices: Sequence[int]) -> "Rows":
        return dataclasses.replace(self, table=self.table.select(indices), record_numbers=self.record_numbers[indices])

    def split(self, fraction: float) -> tuple["Rows", "Rows"]:
        """Split the only document in two. The first part has about ``fraction`` of its characters."""
        is_text = len(self.templates) == 1 and not self.has_messages
        require(is_text, f"{self.source}: cannot hold out a part of a single record. Pass --eval_files.")
        text = "".join(next(iter(self)))
        position = split_position(text, int(len(text) * fraction))
        head, tail = (datasets.Dataset.from_dict({"text": [part]}) for part in (text[:position], text[position:]))
        rows = Rows(tail, self.source, self.record_numbers, ((("", "text"),),))
        return dataclasses.replace(rows, table=head, has_end_of_text=False), rows


def read_rows(table: datasets.Dataset, config: TextConfig) -> Rows:
    """Return the records of ``table`` that pass the filters. Raise UserError if a column is missing."""
    names = ("prompt_column", "completion_column") if config.prompt_column else ("text_column",)
    source = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    require(len(table) > 0, f"{source}: the table has no records. Pass a table with text.")
    table, record_numbers = _apply_filters(table, config)
    templates = tuple(parse_template(getattr(config, name)) for name in names)
    features = [feature(table, column, source) for template in templates for _, column in template if column]
    item = getattr(features[0], "feature", None)
    is_plain_column = names == ("text_column",) and len(templates[0]) == 1 and not templates[0][0][0]
    has_messages = is_plain_column and isinstance(item, dict) and {"role", "content"} <= item.keys()
    return Rows(table, source, record_numbers, templates, config.text_separator, has_messages, config.loss_on)


def _apply_filters(table: datasets.Dataset, config: TextConfig) -> tuple[datasets.Dataset, np.ndarray]:
    """Return the records that pass all filters, and the index of each in ``table``. Print how many each one keeps."""
    record_numbers = np.arange(len(table))
    for rule in config.filter:
        passes = read_filter(table, rule, config.text_separator)
        path = parse_filter(rule)[0].split(".")
        values = (value for batch in table.select_columns(path[:1]).iter(batch_size=1000) for value in batch[path[0]])
        kept = np.flatnonzero([passes({path[0]: value}) for value in values])
        first = join_text(value_at(table[0], path), config.text_separator, object)
        empty = f"--filter {rule}: none of {len(table):,} records passes; the value of the first is {str(first)[:40]}"
        require(len(kept) > 0, f"{empty}. Use another filter.")
        print(f"filter    {rule}: {len(kept):,} of {len(table):,} records kept")
        table, record_numbers = table.select(kept), record_numbers[kept]
    return table, record_numbers


def read_filter(table: datasets.Dataset, rule: str, separator: str) -> Callable[[dict[str, Any]], bool]:
    """Return whether a record passes the filter ``rule``, as a function. Raise UserError if the column is missing."""
    column, is_equal, wanted = parse_filter(rule)
    feature(table, column, f"--filter {rule}")
    path = column.split(".")
    return lambda record: (join_text(value_at(record, path), separator, object) == wanted) == is_equal


def feature(table: datasets.Dataset, column: str, source: str) -> Any:
    """Return the feature type of a dotted column. Raise UserError, which names ``source``, if it does not exist."""
    value: Any = table.features
    for key in column.split("."):
        while not isinstance(value, dict) and hasattr(value, "feature"):  # a list: go on with the type of its items
            value = value.feature
        if not isinstance(value, dict) or key not in value:
            columns = ", ".join(table.flatten().column_names)
            raise UserError(f"{source}: column {column} does not exist. Use one of {columns}.")
        value = value[key]
    return value
