"""Blocks of streamed text in a random order, and the state from which reading resumes exactly."""

import dataclasses
import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cli.errors import require
from corpus.flags import DataConfig, TextConfig
from corpus.position import Position
from corpus.streaming import Streamed
from corpus.tokenize import end_of_text_id, token_rows
from corpus.tokens import DOCUMENT

Block = np.ndarray  # (2, length) int32: ids, ~id where not scored; how far each is from its document's start
Given = tuple[dict[str, Any], Block, list[tuple[int, Block]]]  # a shard's state, tokens left over, and buffer
NO_TOKENS = np.empty((2, 0), np.int32)


class Shard:
    """One of the shards of the text, or all of it: its blocks in a random order, epoch after epoch."""

    def __init__(
        self, config: DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int | list[int]
    ):
        self._config, self._documents, self._tokenizer = config, documents, tokenizer
        self._random = np.random.default_rng(seed)
        self.buffer: list[tuple[int, Block]] = []  # empty where an epoch begins
        self.sha256, self.loss_fraction = "", 0.0  # of the first tokens
        self._begin_epoch()

    def draw(self, count: int) -> list[tuple[int, Block]]:
        """The next blocks, each with its number in the text of the epoch; fewer where that ends."""
        self._unread = self._unread or self.blocks()
        self._fill()
        drawn: list[tuple[int, Block]] = []
        while self.buffer and len(drawn) < count:
            chosen = self._random.integers(len(self.buffer))
            self.buffer[chosen], self.buffer[-1] = self.buffer[-1], self.buffer[chosen]
            drawn.append(self.buffer.pop())
            self._fill()
        if not self.buffer:
            self._begin_epoch()
        return drawn

    def state(self) -> Given:
        state = {"at": self._at, "made": self._made, "random": self._random.bit_generator.state}
        return state, self._carry, list(self.buffer)

    def restore(self, given: Given) -> None:
        state, self._carry, buffer = given
        self._at, self._made, self.buffer = state["at"], state["made"], list(buffer)
        self._random.bit_generator.state = state["random"]

    def _begin_epoch(self) -> None:
        # Reading can go on between two documents alone, so a state is such a place, with the number of blocks made
        # before and the tokens left over there; and how many blocks were made in all, some of them behind it.
        self._at, self._carry, self._made = {"place": self._documents.start, "blocks": 0}, NO_TOKENS, 0
        self._unread: Iterator[tuple[int, Block]] | None = None

    def _fill(self) -> None:
        self.buffer += islice(self._unread, self._config.shuffle_buffer - len(self.buffer))

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The blocks of the epoch that were not made yet, with their numbers."""
        size, made, done = self._config.block_size, self._at["blocks"], self._made
        self._documents.place, tokens = self._at["place"], self._carry
        for piece, whole in self._pieces():  # whole: tokens to the end of the last document that ends in it
            end, before = tokens.shape[1] + whole, made
            tokens = np.concatenate([tokens, piece], axis=1)
            carry = tokens[:, end // size * size : end].copy()
            for start in range(0, tokens.shape[1] - size + 1, size):
                made += 1
                if made > done:
                    self._made = made
                    yield made - 1, tokens[:, start : start + size].copy()  # a view would keep the whole piece
            tokens = tokens[:, tokens.shape[1] // size * size :].copy()
            if place := self._ended:
                self._at, self._carry = {"place": place, "blocks": before + end // size}, carry
        few = f"{self._documents.name}: the training text has {tokens.shape[1]} tokens, and {size} or more are needed"
        require(made > 0, f"{few}; give more text, other rules or a smaller --block_size")
        if tokens.shape[1] and made >= done:
            self._made = made + 1
            yield made, tokens

    def _pieces(self) -> Iterator[tuple[Block, bool]]:
        """The text's tokens, a piece at a time, and whether the piece ends between two documents."""
        size, drops = self._config.block_size, self._config.long_documents == "drop"
        ended, begun = self._documents.place["documents"], 0  # documents, and tokens of the one that goes on
        held = NO_TOKENS  # the start of a document that may be too long
        for row in token_rows(self._documents, self._tokenizer, end_of_text_id(self._tokenizer)):
            ids = np.frombuffer(row["input_ids"], np.int32)
            lengths = np.frombuffer(row["documents"], DOCUMENT)["tokens"]
            if len(ids) and not self.sha256:
                self.sha256, self.loss_fraction = row["sha256"], float(np.mean(ids >= 0))
            ends = np.cumsum(lengths) - begun
            starts = np.append(-begun, ends)  # of the documents; the last one goes on
            positions = np.arange(len(ids)) - np.repeat(starts, np.diff(ends, prepend=0, append=len(ids)))
            piece = np.stack([ids, np.minimum(positions, size)], dtype=np.int32)
            begun, ended = len(ids) - starts[-1], ended + len(lengths)
            if drops:
                *parts, held_next = np.split(piece, ends, axis=1)
                if parts:
                    parts[0], held = np.concatenate([held, parts[0]], axis=1), NO_TOKENS
                held = np.concatenate([held, held_next], axis=1)[:, : size + 1]
                kept = [part for part, length in zip(parts, lengths, strict=True) if length <= size]
                piece = np.concatenate([NO_TOKENS, *kept], axis=1)
                ends = [piece.shape[1]]
            begun_since = self._documents.place["documents"] - ended
            places = {0: self._documents.place, 1: self._documents.before}
            self._ended = places.get(begun_since) if len(lengths) else None  # where the next document begins
            yield piece, int(ends[-1]) if len(lengths) else 0


class StreamedText:
    """All shards of the text, of which a rank reads its own.

    Rank r of N reads the shards s of S with s % N = r; where there are more ranks than shards, those with
    r % S = s read the same one, and share out what they draw from it. So an update is of the same blocks on any ranks.
    """

    def __init__(self, config: DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._config, self._documents, self._tokenizer, self._seed = config, documents, tokenizer, seed
        self._count, self._given = 0, {}  # of the shards, 0 until the first update; and what is known of each here
        whole = self._shard(0, 1)
        next(whole.blocks())  # what is wrong with the text is said before a run has begun
        self._sha256, self.loss_fraction = whole.sha256, whole.loss_fraction

    def __str__(self) -> str:
        size, buffer = self._config.block_size, self._config.shuffle_buffer
        return f"text that streams from {self._documents.name}, each block drawn from {buffer:,}, in blocks of {size}"

    @property
    def identity(self) -> str:
        """The dataset's commit or the number of files, and a hash of the settings and of the first tokens."""
        names = {field.name for field in dataclasses.fields(TextConfig)} - {"dataset", "dataset_revision"}
        form = str([getattr(self._config, name) for name in sorted(names)])
        return f"{self._documents.version} {hashlib.sha256((form + self._sha256).encode()).hexdigest()}".strip()

    def first_blocks(self, count: int) -> list[Block]:
        """The first blocks of the whole text."""
        return [block for _, block in islice(self._shard(0, 1).blocks(), count)]

    def draw(
        self, blocks_per_update: int, position: Position, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[list[Block], int, Position, list[int]]]:
        """Yields a rank's blocks of an update, the most that any rank has, the position, and the blocks' numbers.

        They are of what this rank knows: its shards' blocks, the first shard's position. So rank 0 gives the position
        of shard 0. Number n is block n // S of shard n % S in its epoch. Raises UserError where the text cannot be
        read further.
        """
        count = self._count or min(ranks, blocks_per_update, self._documents.most_shards)
        draws = [len(range(s, blocks_per_update, count)) for s in range(count)]

        def share(r: int) -> dict[int, range]:
            """The shards that a rank reads, and which of the blocks drawn from each are its own."""
            readers = max(1, len(range(r % count, ranks, count)))
            return {s: range(draws[s])[r // count :: readers] for s in range(r % count, count, ranks)}

        most = max(sum(map(len, share(r).values())) for r in range(ranks))
        mine = share(rank)
        shards = {s: self._shard(s, count, self._given.get(s)) for s in mine}
        while True:
            drawn = {s: shard.draw(draws[s]) for s, shard in shards.items()}
            self._count, self._given = count, {s: shard.state() for s, shard in shards.items()}
            position = Position(position.epoch, position.blocks + len(drawn[rank % count]))
            if not shards[rank % count].buffer:
                position = Position(position.epoch + 1)
            blocks = [block for s, own in mine.items() for _, block in drawn[s][own.start :: own.step]]
            yield blocks, most, position, [number * count + s for s in mine for number, _ in drawn[s]]

    def state(self, rank: int = 0, ranks: int = 1) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Of the shards whose first reader this rank is, as it was when `batches` gave its last update."""
        states = {}
        for s in range(rank, self._count, ranks):
            state, carry, buffer = self._given[s]
            blocks = [block for _, block in buffer]
            tensors = {
                "carry": torch.from_numpy(carry),
                "buffer": torch.from_numpy(np.concatenate([NO_TOKENS, *blocks], axis=1)),
                "lengths": torch.tensor([block.shape[1] for block in blocks], dtype=torch.int64),
            }
            states[s] = {**state, "buffer": [number for number, _ in buffer]}, tensors
        return states

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        shards = {s: shard for state in states for s, shard in state.items()}
        tensors = {f"{s}.{name}": tensor for s, (_, own) in shards.items() for name, tensor in own.items()}
        return {"shards": [shards[s][0] for s in range(len(shards))]}, {"stream": tensors}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if "at" in state:  # of a run from before there were shards
            state, tensors = {"shards": [state]}, {f"0.{name}": tensor for name, tensor in tensors.items()}
        self._count = len(state["shards"])
        for s, shard in enumerate(state["shards"]):
            carry, buffer, lengths = (tensors[f"{s}.{name}"].numpy() for name in ("carry", "buffer", "lengths"))
            blocks = np.split(buffer, np.cumsum(lengths), axis=1)[:-1]
            self._given[s] = shard, carry, list(zip(shard["buffer"], blocks, strict=True))

    def _shard(self, number: int, count: int, given: Given | None = None) -> Shard:
        documents, seed = self._documents, self._seed
        if count > 1:
            documents, seed = documents.shard(number, count), [seed, number]
            documents.name += f", shard {number} of {count}"
        shard = Shard(self._config, documents, self._tokenizer, seed)
        if given:
            shard.restore(given)
        return shard
