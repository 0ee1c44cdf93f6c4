"""Tokenize documents of any length, and mark the tokens that carry loss."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError, require, warn
from corpus.chat import CHAT_TEMPLATE, end_of_turn
from corpus.cuts import Cutter
from corpus.flags import TextConfig
from corpus.records import Document, Documents
from corpus.tokens import TokenPart, TokenStream, cached_stream, token_ids

RULES = 2  # version of the rules here and in chat.py and cuts.py; a new number makes cached tokens invalid
PART_CHARACTERS = 1 << 16  # a longer document is tokenized in parts, so that memory stays flat
# Characters to tokenize at once: enough for the tokenizer's threads, and small in memory.
BATCH_CHARACTERS = 1 << 20
PLAIN_TEMPLATE = "the tokenizer has no chat template; a plain one is used and saved with the model"
SPACES = np.array([i for i in range(0x3001) if chr(i).isspace()], np.uint32)


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Return the tokens of the documents. Use the cache if it holds them."""
    lacks_template = prepare_tokenizer(documents, tokenizer)
    template = tokenizer.chat_template if documents.has_messages else None
    key = f"{documents.fingerprint}\n{tokenizer_fingerprint(tokenizer)}\n{template}\n{RULES}"
    parts = token_parts(documents.read(tokenizer), tokenizer)
    stream = cached_stream(hashlib.sha256(key.encode()).hexdigest()[:32], parts)
    if lacks_template:
        warn(PLAIN_TEMPLATE)
    return stream


def prepare_tokenizer(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check that there is an end-of-text token. Set a chat template if there is none; return whether one was needed."""
    end_of_text_id(tokenizer)
    tokenizer([""])  # switches off truncation and padding, which the tokenizer's file may ask for
    lacks_template = documents.has_messages and not tokenizer.chat_template
    if lacks_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return lacks_template


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a document: the eos token, or the sep token for BERT's family."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise UserError(
        f"--tokenizer {tokenizer.name_or_path}: has no eos or sep token to end documents with. "
        f"Set eos_token in its tokenizer_config.json."
    )


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a generated text: the end of a document, and the end of a turn in the chat template."""
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return list(dict.fromkeys(id for id in (end, *end_of_turn(tokenizer)[0]) if id is not None))


def set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, is_new: bool, kept: Collection[str] = ()
) -> None:
    """Add the ids that end texts to the model's generation config, which is saved with it.

    If the tokenizer ``is_new`` to the model, its special tokens replace the ids of both configs, except for settings
    named in ``kept``. The padding id of the model's config stays, because some architectures count positions from it.
    """
    generation, ends = model.generation_config, end_ids(tokenizer)
    for name in {"bos_token_id", "eos_token_id", "pad_token_id"} - {*kept} if is_new else ():
        for config in (generation, model.config) if name != "pad_token_id" else (generation,):
            with suppress(StrictDataclassFieldValidationError):  # some configs must have an id
                setattr(config, name, getattr(tokenizer, name))
    own = generation.eos_token_id
    ends = [*dict.fromkeys([*([own] if isinstance(own, int) else own or []), *ends])]
    generation.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    try:
        generation.validate(strict=True)
    except ValueError:  # published with a temperature but no do_sample, it cannot be saved after a change
        generation.do_sample = True


def begin_of_text_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, such as <s>; most add none or one."""
    plain, ids = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    count = next((i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain), 0)
    return ids[:count]


def num_text_bytes(tokenizer: PreTrainedTokenizerBase, token: int, previous: int | None = None) -> int:
    """Return how many UTF-8 bytes of text a token stands for after ``previous``. An end of turn stands for its name.

    The number is exact for byte-level tokens and for byte fallback. For other tokens it counts the characters that the
    token adds to a decoded text, with a space before it.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    if tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return len(name.encode() if name in tokenizer.get_added_vocab() else name)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return 1
    before = [] if previous in (None, *tokenizer.all_special_ids) else [previous]
    shorter, longer = (tokenizer.decode(ids) for ids in (before, [*before, token]))
    return max(0, len(longer.encode()) - len(shorter.encode()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that decides the ids.

    That is a whole fast tokenizer, or the class, settings and vocabulary of a slow one.
    """
    if tokenizer.is_fast:
        description = tokenizer.backend_tokenizer.to_str()
    else:
        settings = sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items())
        description = f"{type(tokenizer).__name__}{settings}{sorted(tokenizer.get_vocab().items())}"
    special = f"{sorted(tokenizer.special_tokens_map.items())} {begin_of_text_ids(tokenizer)}"
    return hashlib.sha256(f"{description}{special}".encode()).hexdigest()


@dataclass
class _Part:
    """A part of a document, from character ``start`` on."""

    text: str
    start: int
    is_first: bool
    is_last: bool
    num_bytes: int  # UTF-8 bytes with loss that no earlier part has counted
    bounds: list[int]  # places in the document, in characters, at which text without loss begins, ends, begins, ...
    document: Document


def _parts(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Part]:
    cutter = Cutter(tokenizer)
    for document in documents:
        length, num_bytes, bounds = 0, 0, []

        def texts(document: Document = document, bounds: list[int] = bounds) -> Iterator[str]:
            nonlocal length, num_bytes
            for text, has_loss in document.pieces:
                if has_loss == len(bounds) % 2:
                    bounds.append(length)
                length += len(text)
                try:
                    num_bytes += len(text.encode()) if has_loss else 0
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{document.name} has half a surrogate pair ({error.reason}). Remove it."
                    ) from error
                yield text

        start, previous = 0, None
        for text in cutter.cut(texts(), PART_CHARACTERS):
            if previous is not None:
                yield previous
            previous = _Part(text, start, start == 0, False, num_bytes, bounds, document)
            start, num_bytes = start + len(text), 0
        previous = previous or _Part("", 0, True, False, 0, bounds, document)
        previous.is_last = True
        yield previous


def token_parts(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenPart]:
    """Yield the tokens of the documents: special tokens before the text, the text, and the end-of-text token."""
    end, begin = end_of_text_id(tokenizer), ~np.array(begin_of_text_ids(tokenizer), np.int32)
    for batch in _batches(_parts(documents, tokenizer)):
        for part, ids in zip(batch, _encode(batch, tokenizer), strict=True):
            ends = [end if len(part.bounds) % 2 == 0 else ~end] if part.is_last else []
            if part.is_first:
                has_begin = len(begin) and np.array_equal(token_ids(ids[: len(begin)]), ~begin)
                ids = np.append(begin, ids[len(begin) :] if has_begin else ids)  # a chat template may have written it
            ids = np.append(ids, np.array(ends, np.int32))
            yield TokenPart(ids, part.num_bytes, part.is_last, part.document.place)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(parts: list[_Part], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Yield the ids of each part, with ~id for a token without loss."""
    has_loss_mask = any(part.bounds for part in parts)
    texts = [part.text for part in parts]
    if not tokenizer.is_fast:
        slow = f"--loss_on completion: {type(tokenizer).__name__} is a slow tokenizer without character offsets"
        require(not has_loss_mask, f"{slow}. Use --loss_on all, or --tokenizer with a fast one.")
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)  # no warning about long texts
        yield from (np.asarray(ids, np.int32) for ids in encoded["input_ids"])
        return
    # Call the backend directly: transformers would make Python lists of every field of the encoding.
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if has_loss_mask else backend.encode_batch_fast  # the fast one has no offsets
    for part, encoding in zip(parts, encode(texts, add_special_tokens=False), strict=True):
        ids = np.asarray(encoding.ids, np.int32)
        yield np.where(_has_loss(part, encoding.offsets), ids, ~ids) if part.bounds else ids


def _has_loss(part: _Part, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return whether each token carries loss. Its last character that is no white space decides.

    Many tokens begin with the space before the text that carries loss. A special token such as Phi-3's <|end|> also
    takes the line break after it.
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    last = np.maximum(ends - 1, 0)
    if part.text:
        codes = np.frombuffer(part.text.encode("utf-32-le"), np.uint32)
        words = np.maximum.accumulate(np.where(np.isin(codes, SPACES), -1, np.arange(len(codes))))[last]
        last = np.where(words >= starts, words, last)
    return np.searchsorted(part.bounds, part.start + last, side="right") % 2 == 0


def drop_long(config: TextConfig, stream: TokenStream, name: str) -> TokenStream:
    """Return the stream without its long documents if they are to be dropped. Print their number, labeled ``name``."""
    if config.long_documents == "split":
        return stream
    is_long = stream.documents["tokens"] > config.block_size
    count = f"all {len(is_long):,} documents of the {name} text are longer than --block_size {config.block_size}"
    require(not is_long.all(), f"--long_documents drop: {count}. Use a larger block, or --long_documents split.")
    longer = f"documents are longer than {config.block_size} tokens: dropped"
    print(f"{name:<10}{is_long.sum():,} of {len(is_long):,} {longer}")
    return stream.select(np.flatnonzero(~is_long))
