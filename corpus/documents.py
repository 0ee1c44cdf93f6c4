"""Documents as iterators of pieces of text, so that one document may be larger than memory."""

import dataclasses
import gzip
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import fsspec
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, root_cause

PIECE_CHARACTERS = 1 << 16  # of a file that are read at once
Piece = tuple[str, bool]  # of a document's text, and whether it is scored


class Documents(ABC):
    ended = True  # False where the last document was cut and goes on elsewhere: no end-of-text follows it
    has_messages = False  # whether a chat template is needed

    def __iter__(self) -> Iterator[Iterator[str]]:
        return ((piece for piece, _ in pieces) for pieces in self.with_loss_mask())

    @abstractmethod
    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        """The documents with what of them is scored. Without a tokenizer a conversation is its bare contents."""


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

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
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
            raise UserError(f"{path}: cannot be read ({root_cause(error)}); give a readable file") from error

    def select(self, indices: Sequence[int]) -> "TextFiles":
        return dataclasses.replace(self, files=tuple(self.files[i] for i in indices))

    def cut(self, fraction: float) -> tuple["TextFiles", "TextFiles"]:
        """The only document as two, the first with about ``fraction`` of its characters."""
        ((path, *_),) = self.files
        length = sum(map(len, self._read(path)))
        target = int(length * fraction)
        before = max(0, target - PIECE_CHARACTERS)
        place = before + cut_place("".join(self._read(path, before, target)), target - before)
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

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        return chain.from_iterable(source.with_loss_mask(tokenizer) for source in self.sources)


def cut_place(text: str, target: int) -> int:
    """The last line end (or else space) before ``target`` that follows a word, so that no token is cut in two."""
    for mark in ("\n", " "):
        place = text.rfind(mark, 1, target)
        while place > 0 and not text[place - 1].isalnum():
            place = text.rfind(mark, 1, place)
        if place > 0:
            return place
    return target


def read_texts(paths: list[str]) -> "TextFiles":
    return TextFiles(tuple((path if "://" in path else str(Path(path).resolve()), 0, None) for path in paths))
