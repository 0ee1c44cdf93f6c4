"""Read files, tables, Hub datasets and mixtures as documents, and hold out a part of them."""

import glob
import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from cli.errors import UserError, require, root_cause, warn, without_credentials
from cli.hub import find_hub, split_revision
from corpus.documents import ConcatenatedDocuments, Documents, text_files
from corpus.flags import DataConfig, TextConfig
from corpus.formats import FORMATS, find_format
from corpus.records import Rows, read_rows
from corpus.templates import parse_source


def load_documents(config: DataConfig, seed: int) -> tuple[Documents, Documents]:
    """Return the training and the evaluation documents. Raise UserError if they cannot be read.

    The documents of a mixture are a `ConcatenatedDocuments` of its sources, not mixed yet.
    """
    if config.mix:
        sources = [limit_documents(config, _read_source(parse_source(item)[0], config)) for item in config.mix]
    else:
        sources = [read_documents(config, "--train_files", config.train_files)]
    if (config.eval_files or config.dataset_eval_split) and config.eval_fraction != DataConfig.eval_fraction:
        warn(f"--eval_fraction {config.eval_fraction} is ignored: there is separate evaluation text")
    if config.eval_files:
        evaluation = [read_files("--eval_files", config.eval_files, config)]
    elif config.dataset_eval_split:
        evaluation = [_read_dataset("--dataset", config.dataset, config, config.dataset_eval_split)]
    else:  # hold out a part of each source before a mixture repeats it
        sources, evaluation = zip(*(_hold_out(source, config.eval_fraction, seed) for source in sources), strict=True)
    training, evaluation = (
        ConcatenatedDocuments(tuple(parts)) if config.mix else parts[0] for parts in (sources, evaluation)
    )
    return training, evaluation


def _hold_out(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    if len(documents) == 1:
        return documents.split(1 - fraction)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = min(max(1, round(len(order) * fraction)), len(order) - 1)
    return documents.select(np.sort(order[held_out:])), documents.select(np.sort(order[:held_out]))


def read_documents(config: TextConfig, flag_name: str, files: list[str]) -> Documents:
    """Return the first ``max_documents`` documents of ``files``, or of the configured dataset if there are no files."""
    if files:
        return limit_documents(config, read_files(flag_name, files, config))
    return limit_documents(config, _read_dataset("--dataset", config.dataset, config, config.dataset_split))


def limit_documents(config: TextConfig, documents: Documents) -> Documents:
    """Return the first ``max_documents`` documents, or all if there is no limit."""
    return documents.select(range(min(config.max_documents, len(documents)))) if config.max_documents else documents


def _read_source(name: str, config: DataConfig) -> Documents:
    """Return one source of a mixture: files if the name is a file or has the suffix of one, else a dataset."""
    is_file = glob.has_magic(name) or os.path.isfile(name) or find_format(name) is not None
    try:
        return read_files("--mix", [name], config) if is_file else _read_dataset("--mix", name, config, "train")
    except UserError as error:
        raise error if name in str(error) else UserError(f"--mix {name}: {error}") from error


def _read_dataset(flag_name: str, name: str, config: TextConfig, split: str) -> Rows:
    return read_rows(load_table(flag_name, name, config, split), config)


def load_table(
    flag_name: str, name: str, config: TextConfig, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Return a Hub dataset, ``ID`` or ``ID@REVISION``, or one made by save_to_disk. Raise UserError if it fails."""
    path = Path(name)
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            table = datasets.load_from_disk(path)
            unused = f"--dataset_config {config.dataset_config}: {name} is a local directory without configurations"
            require(config.dataset_config is None, f"{unused}. Remove it.")
            splits = table if isinstance(table, datasets.DatasetDict) else {"train": table}
            missing = f"{flag_name} {name}: split {split} does not exist. Use one of {', '.join(splits)}."
            require(split in splits, missing)
            return splits[split].to_iterable_dataset() if streaming else splits[split]
        dataset_id, revision = split_revision(name, flag_name)
        if not path.exists():
            find_hub()
        return datasets.load_dataset(
            dataset_id, config.dataset_config, split=split, revision=revision, streaming=streaming
        )
    except UserError:
        raise
    except (ConnectionError, OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        fix = "Use another id, split or revision, check login and network, or pass local files."
        if "scripts are no longer supported" in str(error):
            fix = "Use a copy in Parquet (for ELI5: dany0407/eli5_category) or --train_files."
        raise UserError(f"{flag_name} {name}: cannot be loaded ({root_cause(error)}). {fix}") from error


def read_files(flag_name: str, patterns: list[str], config: TextConfig) -> Documents:
    """Return the documents of the files that match ``patterns``."""
    paths, builder, options = find_files(flag_name, patterns, config)
    if builder == "text":
        return text_files(paths, flag_name)
    return read_rows(_read_table(flag_name, paths, builder, options), config)


def find_files(
    flag_name: str, patterns: list[str], config: TextConfig, allow_urls: bool = False
) -> tuple[list[str], str, dict[str, Any]]:
    """Return (paths, builder, options) of the files that match ``patterns``. Raise UserError if formats differ.

    With ``allow_urls``, URLs are returned unchecked.
    """
    paths = []
    for pattern in patterns:
        if allow_urls and "://" in pattern:
            paths.append(pattern)
            continue
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        require(bool(found), f"{flag_name} {pattern}: no file matches. Use another pattern or directory.")
        for path in found:
            _check_file(flag_name, path)
        paths += found
    formats = {path: find_format(path) for path in paths}
    for path, file_format in formats.items():
        known = f"Use one of {' '.join(FORMATS)}, also with .gz"
        require(file_format is not None, f"{flag_name} {path}: unknown format. {known}.")
    first, *others = formats.values()
    if any(other != first for other in others):
        names = ", ".join(sorted({builder for builder, _ in formats.values()}))
        shown = without_credentials(" ".join(paths))[:200]
        raise UserError(f"{flag_name} {shown}: files of several formats ({names}). Use one format.")
    builder, options = first
    if builder == "text":
        unused = config.changed_columns() + [f"--filter {rule}" for rule in config.filter]
        if unused and flag_name != "--mix":  # in a mixture, other sources may have columns
            warn(f"{' '.join(unused)} is ignored: text files have no columns")
    return paths, builder, options


def _check_file(flag_name: str, path: str) -> None:
    """Raise UserError if ``path`` is not a readable regular file with content."""
    name = f"{flag_name} {path}"
    require(os.path.exists(path), f"{name}: no such file. Pass an existing one.")
    require(not os.path.isdir(path), f"{name}: is a directory. Pass files, such as {path}/*.")
    require(os.path.isfile(path), f"{name}: not a regular file. Pass a regular file.")  # a pipe would block forever
    try:
        with open(path, "rb") as file:
            require(file.read(1) != b"", f"{name}: is empty. Pass a file with text.")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}). Pass a readable file.") from error


def _read_table(flag_name: str, paths: list[str], builder: str, options: dict[str, Any]) -> datasets.Dataset:
    try:
        # verification_mode: a changed file is a new dataset here, not a corrupted old one.
        files = [str(Path(path).resolve()) for path in paths]
        return datasets.load_dataset(builder, data_files=files, split="train", verification_mode="no_checks", **options)
    except (OSError, EOFError, ValueError, zlib.error, DatasetGenerationError) as error:
        for path in paths if len(paths) > 1 else []:  # find the file at fault: the library does not name it
            _read_table(flag_name, [path], builder, options)
        reason = (builder == "json" and len(paths) == 1 and _json_fault(paths[0])) or root_cause(error)
        shown = " ".join(paths)[:200]
        fix = f"Pass valid {builder} files."
        raise UserError(f"{flag_name} {shown}: not readable as {builder} ({reason}). {fix}") from error


def _json_fault(path: str) -> str | None:
    """Return the line at which a JSON file is invalid, or None. The library counts from the start of its buffer."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            is_list = file.read(1) == "["
            file.seek(0)
            for lines_before, text in enumerate([file.read()] if is_list else file):
                try:
                    json.loads(text.strip() or "{}")
                except json.JSONDecodeError as error:
                    return f"line {lines_before + error.lineno}: {error.msg}"
    except (OSError, EOFError, ValueError, zlib.error):
        pass  # the library's own message is as good
    return None
