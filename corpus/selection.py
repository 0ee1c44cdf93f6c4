"""Select the training documents: the held-out part, the proportions of a mixture, and documents that occur twice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from cli.errors import require
from corpus.flags import DataConfig
from corpus.records import Documents
from corpus.templates import parse_source
from corpus.tokenize import drop_long, end_of_text_id, tokenize
from corpus.tokens import TokenPart, TokenStream, cached_stream, concatenate

PIECE_TOKENS = 1 << 20


@dataclass(frozen=True)
class TrainingDocuments:
    """The sources of the training text. An iteration leaves out the held-out part."""

    sources: list[Documents]
    held_out_fraction: float  # 0 if there is separate evaluation text
    seed: int

    @property
    def has_messages(self) -> bool:
        """Return whether all sources are conversations."""
        return all(source.has_messages for source in self.sources)

    @property
    def fingerprint(self) -> str:
        return f"{[source.fingerprint for source in self.sources]} {self.held_out_fraction} {self.seed}"

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield each document as an iterator over strings."""
        for source in self.sources:
            lengths = [sum(map(len, texts)) for texts in source] if self.held_out_fraction else []
            held_out = set(held_out_numbers(len(lengths), self.held_out_fraction, self.seed).tolist())
            if len(lengths) == 1:
                count = int(lengths[0] * (1 - self.held_out_fraction))
                yield iter(["".join(chain.from_iterable(source))[:count]])
            else:
                yield from (texts for number, texts in enumerate(source) if number not in held_out)


def held_out_numbers(num_documents: int, fraction: float, seed: int) -> np.ndarray:
    """Return the numbers of the documents to evaluate on, in order. A single document gives none."""
    order = np.random.default_rng(seed).permutation(num_documents)
    return np.sort(order[: min(max(1, round(num_documents * fraction)), num_documents - 1)])


def hold_out(stream: TokenStream, fraction: float, seed: int, end: list[int]) -> tuple[TokenStream, TokenStream]:
    """Return the documents to train on and the documents to evaluate on. A single document is divided.

    ``end`` are the tokens that end the first part of a divided document: none, or one if other documents follow it.
    """
    if stream.num_documents == 1:
        count = int(len(stream) * (1 - fraction))
        return _part(stream, 0, count, end), _part(stream, count, len(stream), [])
    held_out = held_out_numbers(stream.num_documents, fraction, seed)
    return stream.select(np.setdiff1d(np.arange(stream.num_documents), held_out)), stream.select(held_out)


def _part(stream: TokenStream, start: int, stop: int, end: list[int]) -> TokenStream:
    """Return the tokens [start, stop) of a stream, and ``end``, as a new document in the cache."""
    cuts = [*range(start, stop, PIECE_TOKENS), stop]
    parts = (TokenPart(stream[i:j].astype(np.int32), 0, False, None) for i, j in pairwise(cuts))
    last = TokenPart(np.array(end, np.int32), 0, True, None)
    return cached_stream(f"{stream.sha256[:32]}-{start}-{stop}-{end}", chain(parts, [last]))


def mixture(mix: list[str], sources: np.ndarray, seed: int) -> np.ndarray:
    """Return document indices in random order, with each source repeated in proportion to its weight.

    ``sources`` is the source of each document, (documents,) int. The source with the most documents for its weight is
    used exactly once. Other sources repeat; each document of a source is used before any is used again.
    """
    names, weights = zip(*map(parse_source, mix), strict=True)
    sizes, shares = np.bincount(sources, minlength=len(mix)), np.array(weights) / sum(weights)
    require(sizes.all(), f"--mix {names[sizes.argmin()]}: no document is left. Remove this source.")
    total = (sizes / shares).max()
    too_many = f"--mix {' '.join(mix)}: one epoch would have {total:.0e} documents"
    require(total < 1e9, f"{too_many}. Use a larger weight for the largest source.")
    random, selected = np.random.default_rng(seed), []
    for i, (name, size, count) in enumerate(zip(names, sizes, np.rint(total * shares).astype(int), strict=True)):
        passes = [random.permutation(np.flatnonzero(sources == i)) for _ in range(math.ceil(count / size))]
        selected.append(np.concatenate(passes)[:count])
        print(f"mix       {name}: {size:,} documents, each {count / size:.2f} times per epoch")
    return random.permutation(np.concatenate(selected))


def select_text(
    config: DataConfig,
    training: TrainingDocuments,
    evaluation: Documents | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[TokenStream, TokenStream]:
    """Return the training and the evaluation tokens. Print how many documents occur twice."""
    streams = [tokenize(source, tokenizer) for source in training.sources]
    if evaluation:
        held_out = [tokenize(evaluation, tokenizer)]
    else:
        end = [end_of_text_id(tokenizer)] if config.mix else []
        parts = [hold_out(stream, config.eval_fraction, seed, end) for stream in streams]
        streams, held_out = zip(*parts, strict=True)
    streams = [drop_long(config, stream, "training") for stream in streams]
    train, held_out = concatenate(streams), drop_long(config, concatenate(held_out), "held out")
    sources = np.repeat(np.arange(len(streams)), [stream.num_documents for stream in streams])
    # Equal documents have equal hashes. A document occurs twice if an earlier training document has its hash.
    hashes = np.concatenate([train.documents["hash"], held_out.documents["hash"]])
    _, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = np.arange(len(hashes))
    is_twice, is_known = np.split(firsts[which] < np.minimum(numbers, train.num_documents), [train.num_documents])
    if config.deduplicate:
        train, held_out = train.select(np.flatnonzero(~is_twice)), held_out.select(np.flatnonzero(~is_known))
        sources = sources[~is_twice]
    if config.mix:
        train = train.select(mixture(config.mix, sources, seed))
    needed = f"--block_size {config.block_size}: the training text has only {len(train)} tokens"
    require(len(train) >= config.block_size, f"{needed}. Use more text, or a smaller --block_size.")
    twice, known = int(is_twice.sum()), int(is_known.sum())
    if twice or known:
        done = "dropped" if config.deduplicate else "kept; --deduplicate drops them"
        print(f"twice     {twice:,} training documents, {known:,} held-out documents that are also trained on: {done}")
    return train, held_out
