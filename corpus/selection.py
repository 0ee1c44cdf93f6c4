"""Which documents are trained on: the proportions of a mixture, and text that occurs twice."""

import math

import numpy as np

from cli.errors import require
from corpus.templates import parse_source
from corpus.tokens import TokenStream, token_ids

PIECE_TOKENS = 1 << 20  # of a stream that are looked at together


def mixture(mix: list[str], sources: np.ndarray, seed: int) -> np.ndarray:
    """The documents, whose ``sources`` are given, in a random order in which their numbers are as ``mix`` weights them.

    Of the source that its weight favours least each is there once; others are gone through again, each time whole.
    """
    names, weights = zip(*map(parse_source, mix), strict=True)
    sizes, shares = np.bincount(sources, minlength=len(mix)), np.array(weights) / sum(weights)
    require(sizes.all(), f"--mix {names[sizes.argmin()]}: none of its documents is left; leave it out")
    total = (sizes / shares).max()
    many = f"--mix {' '.join(mix)}: to see all, {total:.0e} documents would be drawn"
    require(total < 1e9, f"{many}; give the largest source more weight")
    random, drawn = np.random.default_rng(seed), []
    for i, (name, size, count) in enumerate(zip(names, sizes, np.rint(total * shares).astype(int), strict=True)):
        passes = [random.permutation(np.flatnonzero(sources == i)) for _ in range(math.ceil(count / size))]
        drawn.append(np.concatenate(passes)[:count])
        print(f"mix       {name}: {size:,} documents, each {count / size:.2f} times an epoch")
    return random.permutation(np.concatenate(drawn))


def blocks_within(held_out: TokenStream, size: int, stream: TokenStream) -> np.ndarray:
    """Return, for each block of ``size`` tokens of ``held_out``, whether it occurs anywhere in ``stream``.

    The last, short block is not searched for.
    """
    found = np.zeros(math.ceil(len(held_out) / size), bool)
    blocks = [token_ids(held_out[i * size : (i + 1) * size]) for i in range(len(held_out) // size)]
    sought: dict[int, list[int]] = {}  # the blocks of each hash
    for i, block in enumerate(blocks):
        sought.setdefault(int(window_hashes(block, size)[0]), []).append(i)
    hashes = np.array(list(sought), np.uint64)
    for start in range(0, len(stream) - size + 1, PIECE_TOKENS):
        piece = token_ids(stream[start : start + PIECE_TOKENS + size - 1])
        windows = window_hashes(piece, size)
        for place in np.flatnonzero(np.isin(windows, hashes)):
            for i in sought[int(windows[place])]:
                found[i] = found[i] or np.array_equal(blocks[i], piece[place : place + size])
    return found


def window_hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """Hash i is of the ``size`` ids from i on; (len(ids) - size + 1,) uint64.

    It is the polynomial with the ids as coefficients, modulo 2^64: a difference of two prefix sums, divided by a power
    of the base.
    """
    base = 0x9E3779B97F4A7C15
    powers = np.cumprod(np.full(len(ids), base, np.uint64))
    inverses = np.cumprod(np.full(len(ids) - size + 1, pow(base, -1, 1 << 64), np.uint64))
    ids = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ids ^= ids >> np.uint64(32)  # else the ids' own patterns would be the polynomial's
    sums = np.append(np.uint64(0), np.cumsum(ids * powers))
    return (sums[size:] - sums[:-size]) * inverses
