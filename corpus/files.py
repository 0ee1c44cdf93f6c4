"""Find files, local ones or URLs, and read their records, on any shard and from any place."""

import glob
import hashlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cli.errors import UserError, require, root_cause, warn, without_credentials
from corpus.readers import PIECE, READERS, ContentError, open_file, read_text, reading

Place = dict[str, Any]  # JSON: the place at which reading continues
RETRIES = 5  # to open a URL after a lost connection, after 2, 4, ... seconds


def suffix(path: str) -> str:
    """Return the suffix that decides the format of a path or URL, without .gz."""
    path = path.partition("?")[0] if "://" in path else path
    return Path(path.removesuffix(".gz")).suffix.lower()


@dataclass(frozen=True)
class Files:
    """The records of files, one file after the other. The record of a text file is an iterator over its text."""

    flag_name: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return without_credentials(f"{self.flag_name} {' '.join(self.paths)}")[:200]

    @property
    def is_text(self) -> bool:
        return READERS[suffix(self.paths[0])] is None

    @property
    def max_shards(self) -> int:
        return len(self.paths) if self.is_text else sys.maxsize

    def name(self, place: Place) -> str:
        return without_credentials(f"{self.flag_name} {self.paths[place['file']]}")

    @property
    def fingerprint(self) -> str:
        """Return size, times and inode of each file, for the key of the cache. A rewrite may keep the times."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        return str([(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats])

    @property
    def identity(self) -> str:
        """Return a hash of the content alone: 64 MB of each local file, size and version of each remote one."""
        digest = hashlib.sha256()
        for number, path in enumerate(self.paths):
            with reading(self.name({"file": number})):
                system, name = fsspec.core.url_to_fs(path) if "://" in path else (LocalFileSystem(), path)
                facts = system.info(name)
                digest.update(f"{facts['size']} {facts.get('ETag') or facts.get('blob_id')}".encode())
                count = min(1024, math.ceil(facts["size"] / PIECE)) if isinstance(system, LocalFileSystem) else 0
                with system.open(name) if count else nullcontext() as file:
                    for i in range(count):
                        file.seek((facts["size"] - PIECE) * i // (count - 1) if count > 1 else 0)
                        digest.update(file.read(PIECE))
        return digest.hexdigest()

    def read(
        self, place: Place | None = None, columns: set[str] | None = None, index: int = 0, count: int = 1
    ) -> Iterator[tuple[Any, Place]]:
        """Yield (record, place) of shard ``index`` of ``count``, from ``place`` on.

        A shard is whole files if they divide evenly, or if there are at least ten per shard. Otherwise it is every
        ``count``-th record. Only ``columns`` of Parquet and Arrow files are read; None reads all.
        """
        are_whole = len(self.paths) % count == 0 or len(self.paths) >= 10 * count
        start = place or {"file": 0, "record": 0, "at": None}
        for number in range(start["file"], len(self.paths)):
            path, place = self.paths[number], start if number == start["file"] else {"record": 0, "at": None}
            if are_whole and number % count != index:
                continue
            if self.is_text:
                text = (piece for piece, _ in self._read_file(number, read_text, None))
                records = [(text, None)] if place["record"] == 0 else []
            else:
                is_table = suffix(path) in (".parquet", ".arrow")
                read = partial(READERS[suffix(path)], columns=columns) if is_table else READERS[suffix(path)]
                records = self._read_file(number, read, place["at"])
            for record_number, (record, at) in enumerate(records, place["record"]):
                if are_whole or (number + record_number) % count == index:
                    yield record, {"file": number, "record": record_number + 1, "at": at}

    def _read_file(self, number: int, read: Callable, place: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (record, place in the file). After a lost connection, continue at the same record."""
        path, failures, has_read = self.paths[number], 0, place is not None
        with reading(self.name({"file": number})):
            while True:
                try:
                    with open_file(path, has_ranges=failures == 0) as file:
                        for record, place in read(file, place):  # noqa: B020
                            yield record, place
                            failures, has_read = min(failures, 1), True
                    return
                except (ContentError, UnicodeError, FileNotFoundError):
                    raise
                except Exception as error:  # the class depends on the library that reads a URL
                    failures += 1
                    if "://" not in path or failures > RETRIES or not has_read:
                        raise
                    warn(f"{self.name({'file': number})}: {root_cause(error)}. Reading goes on in {2**failures} s.")
                    time.sleep(2**failures)


def find_files(flag_name: str, patterns: list[str], allow_urls: bool = False) -> Files:
    """Return the files of paths, directories, globs and, if allowed, URLs. Raise UserError if they do not fit."""
    paths: list[str] = []
    for pattern in patterns:
        if "://" in pattern and allow_urls:
            _check_format(flag_name, pattern)
            paths.append(pattern)
        elif os.path.isdir(pattern):
            paths += _files_below(flag_name, pattern)
        else:
            found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
            require(bool(found), f"{flag_name} {pattern}: no file matches. Use another pattern or directory.")
            for path in found:
                _check_file(flag_name, path)
            paths += found
    kinds = {"text" if READERS[suffix(path)] is None else suffix(path)[1:].removesuffix("l") for path in paths}
    shown = without_credentials(" ".join(paths))[:200]
    one = f"{flag_name} {shown}: files of several formats ({', '.join(sorted(kinds))}). Use one format."
    require(len(kinds) == 1, one)
    return Files(flag_name, tuple(paths))


def _files_below(flag_name: str, directory: str) -> list[str]:
    """Return the files of known formats below a directory. Print how many other files are skipped."""
    found, skipped = [], Counter()
    for path in sorted(Path(directory).rglob("*")):
        if path.is_symlink() and path.is_dir():
            skipped["links to directories"] += 1
        if not path.is_file():
            continue
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            skipped["hidden"] += 1
        elif suffix(str(path)) not in READERS:
            skipped[f"*{path.suffix}"] += 1
        elif path.stat().st_size == 0:
            skipped["empty"] += 1
        else:
            found.append(str(path))
    counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items()))
    if skipped:
        print(f"skipped   {skipped.total():,} files of {directory}: {counts}")
    require(bool(found), f"{flag_name} {directory}: no file with text in this directory. Use {' '.join(READERS)}.")
    return found


def _check_file(flag_name: str, path: str) -> None:
    """Raise UserError if ``path`` is not a readable regular file of a known format with content."""
    name = f"{flag_name} {path}"
    require(os.path.exists(path), f"{name}: no such file. Pass an existing one.")
    require(os.path.isfile(path), f"{name}: not a regular file. Pass a regular file.")  # a pipe would block forever
    _check_format(flag_name, path)
    try:
        with open(path, "rb") as file:
            require(file.read(1) != b"", f"{name}: is empty. Pass a file with text.")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}). Pass a readable file.") from error


def _check_format(flag_name: str, path: str) -> None:
    known = f"unknown format. Use one of {' '.join(READERS)}, also with .gz."
    require(suffix(path) in READERS, without_credentials(f"{flag_name} {path}: {known}"))
