"""Read files, tables, Hub datasets and mixtures as documents, and hold out a part of them."""

import glob
import gzip
import json
import os
import zlib
from pathlib import Path

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from cli.errors import UserError, require, root_cause, warn
from cli.hub import find_hub
from corpus.documents import Chain, Documents, read_texts
from corpus.flags import DataConfig, TextConfig
from corpus.records import Rows, read_rows
from corpus.templates import parse_source

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load_documents(config: DataConfig, seed: int) -> tuple[Documents, Documents]:
    """Returns the training and the evaluation documents. Raises UserError where they cannot be read.

    Those of a mixture are a `Chain` of its sources, not mixed yet.
    """
    if config.mix:
        sources = [first(config, _read_source(parse_source(item)[0], config)) for item in config.mix]
    else:
        sources = [read_documents(config, "--train_files", config.train_files)]
    if (config.eval_files or config.dataset_eval_split) and config.eval_fraction != DataConfig.eval_fraction:
        warn(f"--eval_fraction {config.eval_fraction} is not used: there is evaluation text of its own")
    if config.eval_files:
        evaluation = [read_files("--eval_files", config.eval_files, config)]
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
        return first(config, read_files(flag_name, files, config))
    return first(config, _read_dataset("--dataset", config.dataset, config, config.dataset_split))


def first(config: TextConfig, documents: Documents) -> Documents:
    return documents.select(range(min(config.max_documents, len(documents)))) if config.max_documents else documents


def _read_source(name: str, config: DataConfig) -> Documents:
    """A part of a mixture: files where the name is one or looks like one, else a dataset."""
    is_file = glob.has_magic(name) or os.path.isfile(name) or format(name) is not None
    try:
        return read_files("--mix", [name], config) if is_file else _read_dataset("--mix", name, config, "train")
    except UserError as error:
        raise error if name in str(error) else UserError(f"--mix {name}: {error}") from error


def format(path: str) -> str | None:
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
        raise UserError(f"{flag_name} {name}: cannot be loaded ({root_cause(error)}); {fix}") from error


def read_files(name: str, patterns: list[str], config: TextConfig) -> Documents:
    paths, kind = find_files(name, patterns, config)
    return read_texts(paths) if kind == "text" else read_rows(_read_table(name, paths, kind), config)


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
    kinds = {path: format(path) for path in paths}
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
        reason = (kind == "json" and len(paths) == 1 and _json_fault(paths[0])) or root_cause(error)
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
