"""Select the training documents: the proportions of a mixture, and held-out text that is also training text."""

import math

import numpy as np
from transformers import PreTrainedTokenizerBase

from cli.errors import require
from corpus.documents import Documents
from corpus.flags import DataConfig
from corpus.templates import parse_source
from corpus.tokenize import load_stream
from corpus.tokens import TokenStream, token_ids

PIECE_TOKENS = 1 << 20  # tokens of a stream to search at once


def mixture(mix: list[str], sources: np.ndarray, seed: int) -> np.ndarray:
    """Return document indices in random order, with each source repeated in proportion to its weight.

    ``sources`` is the source of each document, (documents,) int. One source is used exactly once: the one with the
    most documents for its weight. The others repeat; each document of a source is used before any is used again.
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


def blocks_within(held_out: TokenStream, size: int, stream: TokenStream) -> np.ndarray:
    """Return, for each block of ``size`` tokens of ``held_out``, whether it occurs anywhere in ``stream``.

    The result is (blocks,) bool. A last block with fewer than ``size`` tokens is not searched for.
    """
    found = np.zeros(math.ceil(len(held_out) / size), bool)
    blocks = [token_ids(held_out[i * size : (i + 1) * size]) for i in range(len(held_out) // size)]
    blocks_by_hash: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        blocks_by_hash.setdefault(int(window_hashes(block, size)[0]), []).append(i)
    hashes = np.array(list(blocks_by_hash), np.uint64)
    for start in range(0, len(stream) - size + 1, PIECE_TOKENS):
        piece = token_ids(stream[start : start + PIECE_TOKENS + size - 1])
        windows = window_hashes(piece, size)
        for position in np.flatnonzero(np.isin(windows, hashes)):
            for i in blocks_by_hash[int(windows[position])]:
                found[i] = found[i] or np.array_equal(blocks[i], piece[position : position + size])
    return found


def window_hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of each window of ``size`` ids, (len(ids) - size + 1,) uint64.

    The hash is a polynomial modulo 2^64 with the mixed ids as coefficients. It is the difference of two prefix sums,
    divided by a power of the base.
    """
    base = 0x9E3779B97F4A7C15
    powers = np.cumprod(np.full(len(ids), base, np.uint64))
    inverses = np.cumprod(np.full(len(ids) - size + 1, pow(base, -1, 1 << 64), np.uint64))
    # Mix the bits of the ids first, so that regular sequences of ids do not collide.
    ids = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ids ^= ids >> np.uint64(32)
    sums = np.append(np.uint64(0), np.cumsum(ids * powers))
    return (sums[size:] - sums[:-size]) * inverses


def select_text(
    config: DataConfig, training: Documents, evaluation: Documents, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TokenStream, TokenStream, np.ndarray | None]:
    """Return the training and the evaluation tokens, and with --deduplicate the evaluation blocks to keep.

    Print what of the text occurs twice.
    """
    train = load_stream(config, training, tokenizer, "training")
    held_out = load_stream(config, evaluation, tokenizer, "held out")
    hashes = np.concatenate([train.documents["hash"], held_out.documents["hash"]])
    _, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = np.arange(len(hashes))
    is_twice, is_known = np.split(firsts[which] < np.minimum(numbers, train.num_documents), [train.num_documents])
    if config.deduplicate:
        train, held_out = train.select(np.flatnonzero(~is_twice)), held_out.select(np.flatnonzero(~is_known))
    if config.mix:
        sizes = [len(source) for source in training.sources]
        train = train.select(mixture(config.mix, np.repeat(np.arange(len(sizes)), sizes)[train.numbers], seed))
    needed = f"--block_size {config.block_size}: the training text has only {len(train)} tokens"
    require(len(train) >= config.block_size, f"{needed}. Use more text, or a smaller --block_size.")
    is_within = blocks_within(held_out, config.block_size, train)
    twice, known, within = (int(found.sum()) for found in (is_twice, is_known, is_within))
    if twice or known or within:
        print(
            f"twice     {twice:,} training documents; trained on are {known:,} held-out documents and {within:,} "
            f"held-out blocks{': dropped' if config.deduplicate else '; --deduplicate drops all these'}"
        )
    return train, held_out, np.flatnonzero(~is_within) if config.deduplicate else None
