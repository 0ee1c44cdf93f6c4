"""Documents as iterators over pieces of text, so that one document may be larger than memory."""

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

PIECE_CHARACTERS = 1 << 16  # characters of a file to read at once
Piece = tuple[str, bool]  # (text, has_loss)


class Documents(ABC):
    """An iterable of documents. A document is an iterator over strings."""

    has_end_of_text = True  # False for the first half of a document: no end-of-text token follows it
    has_messages = False  # whether a chat template is needed

    def __iter__(self) -> Iterator[Iterator[str]]:
        return ((text for text, _ in pieces) for pieces in self.with_loss_mask())

    @abstractmethod
    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        """Yield each document as (text, has_loss) pieces. Without a tokenizer, a conversation is its bare contents."""


@dataclass(frozen=True)
class TextFiles(Documents):
    """Text files, one document each: (path, first character, end character or None)."""

    files: tuple[tuple[str, int, int | None], ...]
    has_end_of_text: bool = True
    flag_name: str = ""  # for error messages

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        stats = [(path, start, end, Path(path).stat()) for path, start, end in self.files]
        return str([(*file, stat.st_size, stat.st_mtime_ns) for *file, stat in stats]) + str(self.has_end_of_text)

    def with_loss_mask(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Iterator[Piece]]:
        return (((text, True) for text in self._read(*file)) for file in self.files)

    def _read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[str]:
        open_file = gzip.open if path.endswith(".gz") else open
        if "://" in path:
            open_file = partial(fsspec.open, compression="infer")
        name, position = f"{self.flag_name} {path}".strip(), 0
        try:
            with open_file(path, "rt", encoding="utf-8", newline="") as file:  # newline="": keep every \r\n as it is
                while piece := file.read(PIECE_CHARACTERS):
                    nul = piece.find("\0")
                    require(nul < 0, f"{name}: character {position + nul + 1} is a NUL. Remove it from the file.")
                    text = piece[max(0, start - position) : None if end is None else max(0, end - position)]
                    position += len(piece)
                    if text:
                        yield text
                    if end is not None and position >= end:
                        return
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 ({error.reason}). Use iconv to convert it.") from error
        except UserError:
            raise
        except Exception as error:  # the class depends on the library that reads a URL
            raise UserError(f"{name}: cannot be read ({root_cause(error)}). Pass a readable file.") from error

    def select(self, indices: Sequence[int]) -> "TextFiles":
        return dataclasses.replace(self, files=tuple(self.files[i] for i in indices))

    def split(self, fraction: float) -> tuple["TextFiles", "TextFiles"]:
        """Split the only document in two. The first part has about ``fraction`` of its characters."""
        ((path, *_),) = self.files
        length = sum(map(len, self._read(path)))
        target = int(length * fraction)
        window_start = max(0, target - PIECE_CHARACTERS)
        position = window_start + split_position("".join(self._read(path, window_start, target)), target - window_start)
        head = dataclasses.replace(self, files=((path, 0, position),), has_end_of_text=False)
        return head, dataclasses.replace(self, files=((path, position, None),))


@dataclass(frozen=True)
class ConcatenatedDocuments(Documents):
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


def split_position(text: str, target: int) -> int:
    """Return the position of the last newline before ``target``, else of the last space, else ``target``.

    The newline or space must follow a word, so that the split does not divide a token.
    """
    for separator in ("\n", " "):
        position = text.rfind(separator, 1, target)
        while position > 0 and not text[position - 1].isalnum():
            position = text.rfind(separator, 1, position)
        if position > 0:
            return position
    return target


def text_files(paths: list[str], flag_name: str = "") -> TextFiles:
    """Return the files at ``paths``, local paths or URLs, as one document each."""
    files = tuple((path if "://" in path else str(Path(path).resolve()), 0, None) for path in paths)
    return TextFiles(files, flag_name=flag_name)
