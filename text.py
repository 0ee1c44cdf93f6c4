r"""Where text comes from: files, tables, Hub datasets and mixtures of them, as documents; and what of it is held out.

    train_documents, eval_documents = load_documents(config, seed=42)
    for pieces in train_documents: ...                      # a document's text, in pieces
    for pieces in train_documents.marked(tokenizer): ...    # (piece, is it scored): an answer is, its question is not

A .txt file is a document, and so is a row of a table: text, a prompt with its completion, or a conversation.
"""

import dataclasses
import glob
import gzip
import json
import math
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import datasets
import fsspec
import numpy as np
from datasets.exceptions import DatasetGenerationError
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from config import Count, Range, UserError, find_hub, flag, one_line, require, warn

PIECE_CHARACTERS = 1 << 16  # of a file that are read at once

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}

# For tokenizers that have none; it needs no new tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content + (eos_token or sep_token) }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
MARK = re.compile("\ue000(\\d+)\ue000")  # where a message's content goes; the letter is no script's

Template = tuple[tuple[str, str], ...]  # pairs of text and the dotted column that follows it, "" at the end
Piece = tuple[str, bool]  # of a document's text, and whether it is scored


@dataclass
class TextConfig:
    """Where text comes from and how long a block is; shared by train.py and perplexity.py."""

    dataset: str | None = flag(None, "a Hub dataset id, or a directory made by save_to_disk")
    dataset_config: str | None = flag(None, "the dataset's configuration, where it has several")
    dataset_split: str = flag("train", "the split to read; slices such as train[:5000] are understood")
    dataset_revision: str | None = flag(None, "a branch, tag or commit of the Hub dataset")
    text_column: str = flag("text", "column of the text or of messages; dotted, as answers.text, and lists are joined")
    text_separator: str = flag(" ", "what stands between the joined items of a list")
    text_template: str | None = flag(None, r"text from several columns instead: '{title}\n{answers.text}'")
    prompt_column: str | None = flag(None, r"instead of text: column of the prompts, or a template such as '{title}\n'")
    completion_column: str | None = flag(None, "the same for the completions, which stand right behind the prompts")
    loss_on: Literal["completion", "all"] = flag(
        "completion", "of messages and prompts: the answers alone, or all; other text is learnt as a whole"
    )
    filter: list[str] = flag([], "keep the records for which all of these hold: column=value, column!=value")
    long_documents: Literal["split", "drop"] = flag("split", "what becomes of those longer than a block")
    max_documents: Count | None = flag(None, "take the first N documents only")
    block_size: Annotated[int, Range(least=2)] = flag(128, "tokens a block")
    pack: Literal["stream", "documents"] = flag(
        "stream", "documents: none sees the one before it in its block, and its first token is not predicted"
    )

    def rules(self) -> list[tuple[bool, str]]:
        unused = self.dataset_config is None and self.dataset_revision is None and self.dataset_split == "train"
        columns = self.columns()
        pair = bool(self.prompt_column) == bool(self.completion_column)
        names = ("text_column", "text_template", "prompt_column", "completion_column")
        given = ((name, getattr(self, name)) for name in names)
        wrong = [f"--{name} {value}" for name, value in given if value and not _parse_template(value)]
        no_rule = next((rule for rule in self.filter if not parse_filter(rule)), None)
        return [
            (bool(self.dataset) or unused, "--dataset_config, _split and _revision need --dataset; leave them out"),
            (len(columns) < 2, f"{' and '.join(columns)} exclude each other; give one of them"),
            (pair, "--prompt_column and --completion_column need each other; give both"),
            (not wrong, f"{' '.join(wrong)}: a template must name columns in braces, such as '{{title}}: {{text}}'"),
            (no_rule is None, f"--filter {no_rule}: must be column=value or column!=value"),
        ]

    def columns(self) -> list[str]:
        """The flags that say where in a record its text is, so far as they were given."""
        names = ("text_column", "text_template", "prompt_column")
        return [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) != getattr(TextConfig, name)]


@dataclass
class DataConfig(TextConfig):
    train_files: list[str] = flag([], "paths or globs: .txt .jsonl .json .csv .parquet .arrow, also .gz")
    mix: list[str] = flag([], "several sources as name:weight, weights of documents; names are paths, globs, datasets")
    eval_files: list[str] = flag([], "the same for evaluation text; without it a part is held out")
    dataset_eval_split: str | None = flag(None, "the dataset's split to evaluate on; without it a part is held out")
    eval_fraction: Annotated[float, Range(above=0, below=1)] = flag(
        0.1, "held out by document when no evaluation text is given, chosen by the seed"
    )
    deduplicate: bool = flag(False, "drop training documents that stand twice, and evaluation text that is trained on")
    streaming: bool = flag(False, "read the training text as it is needed, also from URLs, and keep none of it on disk")
    shuffle_buffer: Count = flag(1000, "blocks to choose the next one from, where the text is streamed")

    def rules(self) -> list[tuple[bool, str]]:
        names = [name for name in ("dataset", "train_files", "mix") if getattr(self, name)]
        given = " and ".join(f"--{name} {' '.join(np.atleast_1d(getattr(self, name)))}" for name in names)
        weights = all(name and 0 < weight < math.inf for name, weight in map(parse_source, self.mix))
        split = f"--dataset_eval_split {self.dataset_eval_split}"
        buffer = f"--shuffle_buffer {self.shuffle_buffer}: needs --streaming; leave it out"
        return [
            *super().rules(),
            *(self._streaming_rules() if self.streaming else []),
            (self.streaming or self.shuffle_buffer == DataConfig.shuffle_buffer, buffer),
            (len(names) < 2, f"{given} exclude each other; give one of them"),
            (bool(names), "no training text: give --dataset, --train_files or --mix"),
            (weights, f"--mix {' '.join(self.mix)}: each must be name:weight, the weight above 0"),
            (not self.dataset_eval_split or bool(self.dataset), f"{split}: needs --dataset; use --eval_files instead"),
            (not (self.dataset_eval_split and self.eval_files), f"{split} and --eval_files exclude each other"),
            (self.dataset_eval_split != self.dataset_split, f"{split}: is the split that is trained on; give another"),
        ]

    def _streaming_rules(self) -> list[tuple[bool, str]]:
        held_out = "nothing can be held out of text that is streamed; give --eval_files or --dataset_eval_split"
        mix = f"--streaming reads one source, not --mix {' '.join(self.mix)}; leave one of them out"
        slices = (
            f"--dataset_eval_split {self.dataset_eval_split}: --streaming reads whole splits; give --eval_files instead"
        )
        part = f"--dataset_split {self.dataset_split}: --streaming reads whole splits; give --max_documents instead"
        return [
            (bool(self.eval_files or self.dataset_eval_split), f"--streaming: {held_out}"),
            (not self.mix, mix),
            (not self.deduplicate, "--streaming and --deduplicate, which needs the whole text, exclude each other"),
            (not {"[", "+"} & set(self.dataset_split), part),
            (not {"[", "+"} & set(self.dataset_eval_split or ""), slices),
        ]


def _parse_template(template: str) -> Template | None:
    """The parts of a template, or of a column alone; None where it is none. A shell's backslash and n are a newline."""
    if not {"{", "}"} & set(template):
        return (("", template),)
    try:
        parts = list(Formatter().parse(template.replace("\\n", "\n")))
    except ValueError:
        return None
    is_one = any(column for _, column, *_ in parts) and all(column != "" for _, column, *_ in parts)
    is_plain = not any(form or conversion for *_, form, conversion in parts)
    return tuple((text, column or "") for text, column, *_ in parts) if is_one and is_plain else None


def parse_filter(rule: str) -> tuple[str, bool, str] | None:
    """A filter's column, whether it is to equal, and the value; None where it is no filter."""
    match = re.fullmatch(r"([^=!]+)(!?)=(.*)", rule, re.DOTALL)
    return (match[1], not match[2], match[3]) if match else None


def parse_source(item: str) -> tuple[str, float]:
    """Name and weight of a part of a mixture; the weight is no number where there is none."""
    name, _, weight = item.rpartition(":")
    try:
        return name, float(weight)
    except ValueError:
        return name, math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Documents: what is read. Iterating gives each document as an iterator of pieces of text, so that one document may be
# larger than memory.


class Documents(ABC):
    ended = True  # False where the last document was cut and goes on elsewhere: no end-of-text follows it
    has_messages = False  # whether a chat template is needed

    def __iter__(self) -> Iterator[Iterator[str]]:
        return ((piece for piece, _ in pieces) for pieces in self.marked())

    @abstractmethod
    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        """The documents with what of them is scored. Without a tokenizer a conversation is its bare contents."""


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

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
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
        return ((text, scored or self.loss_on == "all") for text, scored in pieces)

    def _fill(self, where: str, template: Template, record: dict[str, Any]) -> str:
        filled = []
        for text, column in template:
            value = _joined(_value_at(record, column.split(".")), self.separator) if column else ""
            if value is None or "\0" in value:
                held = "a NUL character" if value else f"{str(record.get(column.split('.')[0]))[:40]}, not text"
                raise UserError(
                    f"{where} holds {held}; take it out, or pass it over with --filter (messages need role and content)"
                )
            filled += [text, value]
        return "".join(filled)

    def _conversation(self, where: str, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
        messages = _value_at(record, self.parts[0][0][1].split("."))
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
            raise UserError(f"{where} is refused by the chat template ({one_line(error)}); mend it") from error
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
        place = _cut_place(text, int(len(text) * fraction))
        head, tail = (datasets.Dataset.from_dict({"text": [part]}) for part in (text[:place], text[place:]))
        rows = Rows(tail, self.source, self.numbers, ((("", "text"),),))
        return dataclasses.replace(rows, table=head, ended=False), rows


def _value_at(value: Any, path: list[str]) -> Any:
    """What is at ``path`` below ``value``, and in each item of lists; None where something else is there."""
    if not path:
        return value
    if isinstance(value, list):
        return [_value_at(item, path) for item in value]
    return _value_at(value.get(path[0]), path[1:]) if isinstance(value, dict) else None


def _joined(value: Any, separator: str, kinds: type = str) -> str | None:
    """A value of ``kinds`` as text, lists of them joined; None for anything else."""
    if isinstance(value, list):
        parts = [_joined(item, separator, kinds) for item in value]
        return None if None in parts else separator.join(parts)
    return str(value) if isinstance(value, kinds) else None


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, loss_on: str = "completion"
) -> list[Piece] | None:
    """The conversation by the tokenizer's chat template, scored where the assistant speaks; None: that is not found.

    Marks go through the template in place of the contents, and show where it puts them. An answer begins behind the
    prompt for it and ends with the special token that follows it, if one does.
    """
    apply = partial(tokenizer.apply_chat_template, tokenize=False)
    end = tokenizer.eos_token or tokenizer.sep_token

    def unended(text: str) -> str:  # what ends a document is added later, and must not be there twice
        return text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text

    whole = unended(apply(messages))
    if loss_on == "all":
        return [(whole, True)]
    marked = [{**message, "content": f"\ue000{i}\ue000"} for i, message in enumerate(messages)]
    form = apply(marked)
    prompt = apply(marked, add_generation_prompt=True).removeprefix(form)
    form = unended(form)
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    after = re.compile(rf"\s*(?:{'|'.join(special)})|")
    places = [0]
    for mark in MARK.finditer(form):
        if messages[int(mark[1])]["role"] == "assistant":
            start = form.rfind(prompt, places[-1], mark.start())
            start = mark.start() if start < 0 else start + len(prompt)
            end_of_turn = after.match(form, mark.end()).end()
            # Where no special token ends the last answer, what ends the document does, and is learnt with it.
            last = end_of_turn == mark.end() and int(mark[1]) == len(messages) - 1
            places += [start, len(form) if last else end_of_turn]
    places.append(len(form))

    def filled(trim: Callable[[str], str]) -> list[str]:
        contents = [trim(message["content"]) for message in messages]
        return [MARK.sub(lambda mark: contents[int(mark[1])], form[start:end]) for start, end in pairwise(places)]

    for trim in (str, str.strip):  # many templates strip what is said
        if "".join(texts := filled(trim)) == whole:
            return [(text, i % 2 == 1) for i, text in enumerate(texts if texts[-1] else texts[:-1])]
    return None


@dataclass(frozen=True)
class TextFiles(Documents):
    """Text files, one document each: (path, first character, end character or None)."""

    files: tuple[tuple[str, int, int | None], ...]
    ended: bool = True

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        stats = [(path, start, end, Path(path).stat()) for path, start, end in self.files]
        return str([(*file, stat.st_size, stat.st_mtime_ns) for *file, stat in stats]) + str(self.ended)

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        return (((piece, True) for piece in self._read(*file)) for file in self.files)

    @staticmethod
    def _read(path: str, start: int = 0, end: int | None = None) -> Iterator[str]:
        opened = gzip.open if path.endswith(".gz") else open
        if "://" in path:
            opened = partial(fsspec.open, compression="infer")
        position = 0
        try:
            with opened(path, "rt", encoding="utf-8", newline="") as file:  # newline="": every \r\n stays as it is
                while piece := file.read(PIECE_CHARACTERS):
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
        except UserError:
            raise
        except Exception as error:  # which ones, depends on the library that reads a URL
            raise UserError(f"{path}: cannot be read ({one_line(error)}); give a readable file") from error

    def select(self, indices: Sequence[int]) -> "TextFiles":
        return dataclasses.replace(self, files=tuple(self.files[i] for i in indices))

    def cut(self, fraction: float) -> tuple["TextFiles", "TextFiles"]:
        """The only document as two, the first with about ``fraction`` of its characters."""
        ((path, *_),) = self.files
        length = sum(map(len, self._read(path)))
        target = int(length * fraction)
        before = max(0, target - PIECE_CHARACTERS)
        place = before + _cut_place("".join(self._read(path, before, target)), target - before)
        return TextFiles(((path, 0, place),), ended=False), TextFiles(((path, place, None),))


@dataclass(frozen=True)
class Chain(Documents):
    """The documents of several sources, one source after the other."""

    sources: tuple[Documents, ...]

    @property
    def has_messages(self) -> bool:
        return any(source.has_messages for source in self.sources)

    @property
    def fingerprint(self) -> str:
        return str([source.fingerprint for source in self.sources])

    def marked(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        return chain.from_iterable(source.marked(tokenizer) for source in self.sources)


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
    """Returns the training and the evaluation documents. Raises UserError where they cannot be read.

    Those of a mixture are a `Chain` of its sources, not mixed yet.
    """
    if config.mix:
        sources = [_first(config, _read_source(parse_source(item)[0], config)) for item in config.mix]
    else:
        sources = [read_documents(config, "--train_files", config.train_files)]
    if (config.eval_files or config.dataset_eval_split) and config.eval_fraction != DataConfig.eval_fraction:
        warn(f"--eval_fraction {config.eval_fraction} is not used: there is evaluation text of its own")
    if config.eval_files:
        evaluation = [_read_files("--eval_files", config.eval_files, config)]
    elif config.dataset_eval_split:
        evaluation = [_read_dataset("--dataset", config.dataset, config, config.dataset_eval_split)]
    else:  # of each source, so that no pass over it holds what is held out
        sources, evaluation = zip(*(_hold_out(source, config.eval_fraction, seed) for source in sources), strict=True)
    training, evaluation = (Chain(tuple(parts)) if config.mix else parts[0] for parts in (sources, evaluation))
    return training, evaluation


def _hold_out(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    if len(documents) == 1:
        return documents.cut(1 - fraction)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = min(max(1, round(len(order) * fraction)), len(order) - 1)
    return documents.select(np.sort(order[held_out:])), documents.select(np.sort(order[:held_out]))


def read_documents(config: TextConfig, flag_name: str, files: list[str]) -> Documents:
    """Returns the first ``max_documents`` documents of ``files`` or, without files, of the configured dataset."""
    if files:
        return _first(config, _read_files(flag_name, files, config))
    return _first(config, _read_dataset("--dataset", config.dataset, config, config.dataset_split))


def _first(config: TextConfig, documents: Documents) -> Documents:
    return documents.select(range(min(config.max_documents, len(documents)))) if config.max_documents else documents


def _read_source(name: str, config: DataConfig) -> Documents:
    """A part of a mixture: files where the name is one or looks like one, else a dataset."""
    is_file = glob.has_magic(name) or os.path.isfile(name) or _format(name) is not None
    try:
        return _read_files("--mix", [name], config) if is_file else _read_dataset("--mix", name, config, "train")
    except UserError as error:
        raise error if name in str(error) else UserError(f"--mix {name}: {error}") from error


def _format(path: str) -> str | None:
    path = path.partition("?")[0] if "://" in path else path
    return FORMATS.get(Path(path.removesuffix(".gz")).suffix.lower())


def _read_dataset(flag_name: str, name: str, config: TextConfig, split: str) -> Rows:
    return read_rows(load_table(flag_name, name, config, split), config)


def load_table(
    flag_name: str, name: str, config: TextConfig, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """A Hub dataset, or one that save_to_disk has made. Raises UserError where it cannot be had."""
    path = Path(name)
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            table = datasets.load_from_disk(path)
            unused = config.dataset_config is None and config.dataset_revision is None
            require(unused, f"{flag_name} {name}: a directory has neither --dataset_config nor --dataset_revision")
            splits = table if isinstance(table, datasets.DatasetDict) else {"train": table}
            require(split in splits, f"{flag_name} {name}: no split {split} there, but {', '.join(splits)}; name one")
            return splits[split].to_iterable_dataset() if streaming else splits[split]
        else:
            if not path.exists():
                find_hub()
            revision = config.dataset_revision
            return datasets.load_dataset(
                name, config.dataset_config, split=split, revision=revision, streaming=streaming
            )
    except UserError:
        raise
    except (ConnectionError, OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        fix = "check id, split, revision, login and network, or give local files with --train_files"
        if "scripts are no longer supported" in str(error):
            fix = "look for a copy in Parquet on the Hub (for ELI5: dany0407/eli5_category), or use --train_files"
        raise UserError(f"{flag_name} {name}: cannot be loaded ({one_line(error)}); {fix}") from error


def _read_files(name: str, patterns: list[str], config: TextConfig) -> Documents:
    paths, kind = find_files(name, patterns, config)
    return read_texts(paths) if kind == "text" else read_rows(_read_table(name, paths, kind), config)


def read_texts(paths: list[str]) -> "TextFiles":
    return TextFiles(tuple((path if "://" in path else str(Path(path).resolve()), 0, None) for path in paths))


def find_files(name: str, patterns: list[str], config: TextConfig, remote: bool = False) -> tuple[list[str], str]:
    """The files that ``patterns`` name, and their one format. Where ``remote``, URLs are taken as they are."""
    paths = []
    for pattern in patterns:
        if remote and "://" in pattern:
            paths.append(pattern)
            continue
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
    kinds = {path: _format(path) for path in paths}
    for path, kind in kinds.items():
        require(kind is not None, f"{name} {path}: unknown format; known are {' '.join(FORMATS)} and these with .gz")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{name}: files of several formats ({', '.join(sorted(set(kinds.values())))}); give one format")
    (kind,) = set(kinds.values())
    if kind == "text":
        unused = config.columns() + [f"--filter {rule}" for rule in config.filter]
        if unused and name != "--mix":  # where other sources may have columns
            warn(f"{' '.join(unused)} is not used: .txt files have no columns")
    return paths, kind


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


def read_rows(table: datasets.Dataset, config: TextConfig) -> Rows:
    """The records of ``table`` that pass the filter. Raises UserError where it has not the columns asked for."""
    require(len(table) > 0, "the data has no records; give text")
    numbers = np.arange(len(table))
    for rule in config.filter:
        passes = read_filter(table, rule, config.text_separator)
        head = parse_filter(rule)[0].split(".")[0]
        values = (value for batch in table.select_columns([head]).iter(batch_size=1000) for value in batch[head])
        kept = np.flatnonzero([passes({head: value}) for value in values])
        first = _joined(_value_at(table[0], parse_filter(rule)[0].split(".")), config.text_separator, object)
        none = f"--filter {rule}: none of {len(table):,} records is left, the first of which holds {str(first)[:40]}"
        require(len(kept) > 0, f"{none}; give another")
        print(f"filter    {rule}: {len(kept):,} of {len(table):,} records kept")
        table, numbers = table.select(kept), numbers[kept]
    names = ("text_template",) if config.text_template else ("text_column",)
    if config.prompt_column:
        names = ("prompt_column", "completion_column")
    source = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    parts = tuple(_parse_template(getattr(config, name)) for name in names)
    features = [_feature(table, column, source) for part in parts for _, column in part if column]
    item = getattr(features[0], "feature", None)
    has_messages = names == ("text_column",) and isinstance(item, dict) and {"role", "content"} <= item.keys()
    return Rows(table, source, numbers, parts, config.text_separator, has_messages, config.loss_on)


def read_filter(table: datasets.Dataset, rule: str, separator: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a record passes the filter ``rule``. Raises UserError where ``table`` has not the column."""
    column, equal, wanted = parse_filter(rule)
    _feature(table, column, f"--filter {rule}")
    path = column.split(".")
    return lambda record: (_joined(_value_at(record, path), separator, object) == wanted) == equal


def _feature(table: datasets.Dataset, column: str, source: str) -> Any:
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
