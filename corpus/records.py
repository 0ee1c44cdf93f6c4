"""Documents from the rows of a table: text, a prompt with its completion, or a conversation."""

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
from corpus.documents import Documents, Piece, cut_place
from corpus.flags import TextConfig
from corpus.templates import Template, joined, parse_filter, parse_template, value_at


@dataclass(frozen=True)
class Rows(Documents):
    """The documents of a table, one a row: text, a prompt and its completion, or a conversation."""

    table: datasets.Dataset
    source: str  # the flag and its value, for messages
    numbers: np.ndarray  # of the records in all that was read
    parts: tuple[Template, ...]  # of the text; or of the prompt and of the completion; or the column of the messages
    separator: str = " "
    has_messages: bool = False
    loss_on: str = "completion"
    ended: bool = True

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        form = (self.parts, self.separator, self.has_messages, self.loss_on, self.ended)
        return f"{self.table._fingerprint}:{form}"

    @property
    def columns(self) -> list[str]:
        return sorted({column.split(".")[0] for part in self.parts for _, column in part if column})

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        batches = self.table.select_columns(self.columns).iter(batch_size=100)
        records = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        number = -1
        try:
            for number, record in zip(self.numbers, records, strict=True):
                yield self.document(f"{self.source}: record {number + 1}", record, tokenizer)
        except UnicodeDecodeError as error:
            where = f"{self.source}: record {number + 2}"
            raise UserError(f"{where} or a later one is not UTF-8 ({error.reason}); convert it") from error

    def document(self, where: str, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Piece]:
        """The document of a record, which messages call ``where``."""
        if self.has_messages:
            pieces = self._conversation(where, record, tokenizer)
        else:
            texts = [self._fill(where, part, record) for part in self.parts]
            pieces = [*((text, False) for text in texts[:-1]), (texts[-1], True)]
        return ((text, has_loss or self.loss_on == "all") for text, has_loss in pieces)

    def _fill(self, where: str, template: Template, record: dict[str, Any]) -> str:
        filled = []
        for text, column in template:
            value = joined(value_at(record, column.split(".")), self.separator) if column else ""
            if value is None or "\0" in value:
                held = "a NUL character" if value else f"{str(record.get(column.split('.')[0]))[:40]}, not text"
                raise UserError(
                    f"{where} holds {held}; take it out, or pass it over with --filter (messages need role and content)"
                )
            filled += [text, value]
        return "".join(filled)

    def _conversation(self, where: str, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
        messages = value_at(record, self.parts[0][0][1].split("."))
        is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        require(is_list and bool(messages), f"{where} holds no messages; take it out")
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for i, message in enumerate(messages, 1):
            texts = [message.get(key) for key in ("role", "content")]
            whole = all(isinstance(text, str) and "\0" not in text for text in texts)
            require(whole, f"{where}: message {i} lacks a role or content that is text; mend it or take it out")
        if tokenizer is None:
            return [(message["content"], True) for message in messages]
        answered = self.loss_on == "all" or any(message["role"] == "assistant" for message in messages)
        require(answered, f"{where} has no assistant's turn to learn from; take it out or give --loss_on all")
        try:
            pieces = render(messages, tokenizer, self.loss_on)
        except TemplateError as error:
            raise UserError(f"{where} is refused by the chat template ({root_cause(error)}); mend it") from error
        changed = f"{where}: the tokenizer's chat template changes what is said, so the answers are not found"
        require(pieces is not None, f"{changed}; give --loss_on all")
        return pieces

    def select(self, indices: Sequence[int]) -> "Rows":
        return dataclasses.replace(self, table=self.table.select(indices), numbers=self.numbers[indices])

    def cut(self, fraction: float) -> tuple["Rows", "Rows"]:
        """The only document as two, the first with about ``fraction`` of its characters."""
        is_text = len(self.parts) == 1 and not self.has_messages
        require(is_text, f"{self.source}: one record cannot be held out in part; give --eval_files")
        text = "".join(next(iter(self)))
        place = cut_place(text, int(len(text) * fraction))
        head, tail = (datasets.Dataset.from_dict({"text": [part]}) for part in (text[:place], text[place:]))
        rows = Rows(tail, self.source, self.numbers, ((("", "text"),),))
        return dataclasses.replace(rows, table=head, ended=False), rows


def read_rows(table: datasets.Dataset, config: TextConfig) -> Rows:
    """The records of ``table`` that pass the filter. Raises UserError where it has not the columns asked for."""
    require(len(table) > 0, "the data has no records; give text")
    numbers = np.arange(len(table))
    for rule in config.filter:
        passes = read_filter(table, rule, config.text_separator)
        head = parse_filter(rule)[0].split(".")[0]
        values = (value for batch in table.select_columns([head]).iter(batch_size=1000) for value in batch[head])
        kept = np.flatnonzero([passes({head: value}) for value in values])
        first = joined(value_at(table[0], parse_filter(rule)[0].split(".")), config.text_separator, object)
        none = f"--filter {rule}: none of {len(table):,} records is left, the first of which holds {str(first)[:40]}"
        require(len(kept) > 0, f"{none}; give another")
        print(f"filter    {rule}: {len(kept):,} of {len(table):,} records kept")
        table, numbers = table.select(kept), numbers[kept]
    names = ("text_template",) if config.text_template else ("text_column",)
    if config.prompt_column:
        names = ("prompt_column", "completion_column")
    source = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    parts = tuple(parse_template(getattr(config, name)) for name in names)
    features = [feature(table, column, source) for part in parts for _, column in part if column]
    item = getattr(features[0], "feature", None)
    has_messages = names == ("text_column",) and isinstance(item, dict) and {"role", "content"} <= item.keys()
    return Rows(table, source, numbers, parts, config.text_separator, has_messages, config.loss_on)


def read_filter(table: datasets.Dataset, rule: str, separator: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a record passes the filter ``rule``. Raises UserError where ``table`` has not the column."""
    column, equal, wanted = parse_filter(rule)
    feature(table, column, f"--filter {rule}")
    path = column.split(".")
    return lambda record: (joined(value_at(record, path), separator, object) == wanted) == equal


def feature(table: datasets.Dataset, column: str, source: str) -> Any:
    """What ``column`` holds. Raises UserError, which names ``source``, where there is no such column."""
    value: Any = table.features
    for key in column.split("."):
        while not isinstance(value, dict) and hasattr(value, "feature"):  # a list: look at what it holds
            value = value.feature
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(table.flatten().column_names)
            raise UserError(f"{source}: no such column as {column}; there are {there}")
        value = value[key]
    return value
