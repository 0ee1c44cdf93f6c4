"""Blocks of streamed text in random order, and the state from which reading resumes exactly."""

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

Block = np.ndarray  # (2, length) int32: ids, with ~id for a token without loss, and positions in the document
Buffer = list[tuple[int, Block]]  # blocks with their numbers in the epoch
ShardState = tuple[dict[str, Any], Block, Buffer]  # state in JSON's terms, tokens left over, shuffle buffer
NO_TOKENS = np.empty((2, 0), np.int32)


class Shard:
    """One shard of the text, or all of it. It yields its blocks in random order, epoch after epoch.

    Reading can resume only between two documents. So the state is such a place, with the number of blocks before it and
    the tokens left over there (the remainder). ``_num_blocks`` counts all blocks produced in this epoch, also those
    after the place; `blocks` produces them again and skips them.
    """

    def __init__(
        self, config: DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int | list[int]
    ):
        self._config, self._documents, self._tokenizer = config, documents, tokenizer
        self._random = np.random.default_rng(seed)
        self.buffer: Buffer = []  # empty at the start of an epoch
        self.sha256, self.loss_fraction = "", 0.0  # of the first row of tokens
        self._start_epoch()

    def draw(self, count: int) -> Buffer:
        """Return the next ``count`` blocks with their numbers in the epoch, or fewer at the end of the epoch."""
        self._unread = self._unread or self.blocks()
        self._fill_buffer()
        drawn: Buffer = []
        while self.buffer and len(drawn) < count:
            chosen = self._random.integers(len(self.buffer))
            self.buffer[chosen], self.buffer[-1] = self.buffer[-1], self.buffer[chosen]
            drawn.append(self.buffer.pop())
            self._fill_buffer()
        if not self.buffer:
            self._start_epoch()
        return drawn

    def state(self) -> ShardState:
        state = {
            "resume_at": self._resume_at,
            "num_blocks": self._num_blocks,
            "random": self._random.bit_generator.state,
        }
        return state, self._remainder, list(self.buffer)

    def restore(self, shard_state: ShardState) -> None:
        state, self._remainder, buffer = shard_state
        self._resume_at, self._num_blocks, self.buffer = state["resume_at"], state["num_blocks"], list(buffer)
        self._random.bit_generator.state = state["random"]

    def _start_epoch(self) -> None:
        self._resume_at = {"documents": self._documents.initial_state, "blocks": 0}
        self._remainder, self._num_blocks = NO_TOKENS, 0
        self._unread: Iterator[tuple[int, Block]] | None = None

    def _fill_buffer(self) -> None:
        self.buffer += islice(self._unread, self._config.shuffle_buffer - len(self.buffer))

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Yield the blocks of the epoch that were not produced yet, with their numbers."""
        size, count, num_skipped = self._config.block_size, self._resume_at["blocks"], self._num_blocks
        self._documents.state, tokens = self._resume_at["documents"], self._remainder
        for row, num_complete, state in self._rows():
            boundary, blocks_before = tokens.shape[1] + num_complete, count
            tokens = np.concatenate([tokens, row], axis=1)
            remainder = tokens[:, boundary // size * size : boundary].copy()
            for start in range(0, tokens.shape[1] - size + 1, size):
                count += 1
                if count > num_skipped:
                    self._num_blocks = count
                    yield count - 1, tokens[:, start : start + size].copy()  # a view would keep the whole row
            tokens = tokens[:, tokens.shape[1] // size * size :].copy()
            if state:
                self._resume_at = {"documents": state, "blocks": blocks_before + boundary // size}
                self._remainder = remainder
        few = f"{self._documents.name}: the training text has {tokens.shape[1]} tokens, and {size} or more are needed"
        require(count > 0, f"{few}. Use more text, other filters or a smaller --block_size.")
        if tokens.shape[1] and count >= num_skipped:
            self._num_blocks = count + 1
            yield count, tokens

    def _rows(self) -> Iterator[tuple[Block, int, dict[str, Any] | None]]:
        """Yield (tokens, num_complete, state) for each row of tokens.

        ``num_complete`` tokens belong to documents that end in the row. ``state`` is the place after the last of these
        documents, or None if it is not known.
        """
        size, drops = self._config.block_size, self._config.long_documents == "drop"
        num_ended, open_length = self._documents.state["documents"], 0  # tokens of the document that is not complete
        held_back = NO_TOKENS  # the start of a document that may be too long
        for row in token_rows(self._documents, self._tokenizer, end_of_text_id(self._tokenizer)):
            ids = np.frombuffer(row["input_ids"], np.int32)
            lengths = np.frombuffer(row["documents"], DOCUMENT)["tokens"]
            if len(ids) and not self.sha256:
                self.sha256, self.loss_fraction = row["sha256"], float(np.mean(ids >= 0))
            ends = np.cumsum(lengths) - open_length
            starts = np.append(-open_length, ends)  # of the documents; the last one is not complete
            positions = np.arange(len(ids)) - np.repeat(starts, np.diff(ends, prepend=0, append=len(ids)))
            tokens = np.stack([ids, np.minimum(positions, size)], dtype=np.int32)
            open_length, num_ended = len(ids) - starts[-1], num_ended + len(lengths)
            if drops:
                *parts, rest = np.split(tokens, ends, axis=1)
                if parts:
                    parts[0], held_back = np.concatenate([held_back, parts[0]], axis=1), NO_TOKENS
                held_back = np.concatenate([held_back, rest], axis=1)[:, : size + 1]
                kept = [part for part, length in zip(parts, lengths, strict=True) if length <= size]
                tokens = np.concatenate([NO_TOKENS, *kept], axis=1)
                ends = [tokens.shape[1]]
            if not len(lengths):
                yield tokens, 0, None
                continue
            # The place is known only if the reader is at most one document ahead.
            num_ahead = self._documents.state["documents"] - num_ended
            states = {0: self._documents.state, 1: self._documents.previous_state}
            yield tokens, int(ends[-1]), states.get(num_ahead)


class StreamedText:
    """All shards of the text, of which each rank reads its own.

    Rank r of N reads the shards s of S with s % N = r. If there are more ranks than shards, the ranks with r % S = s
    read the same shard s. Each of them takes a part of its blocks. So a step uses the same blocks on any number of
    ranks.
    """

    def __init__(self, config: DataConfig, documents: Streamed, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._config, self._documents, self._tokenizer, self._seed = config, documents, tokenizer, seed
        self._num_shards = 0  # 0 until the first step
        self._shard_states: dict[int, ShardState] = {}  # of the shards that this rank reads
        whole = self._shard(0, 1)
        next(whole.blocks())  # report errors in the text before a run begins
        self._sha256, self.loss_fraction = whole.sha256, whole.loss_fraction

    def __str__(self) -> str:
        size, buffer = self._config.block_size, self._config.shuffle_buffer
        return f"streamed text of {self._documents.name}, in blocks of {size}, shuffled in a buffer of {buffer:,}"

    @property
    def identity(self) -> str:
        """Return the dataset's commit or the number of files, and a hash of the settings and of the first tokens."""
        names = {field.name for field in dataclasses.fields(TextConfig)} - {"dataset"}
        settings = str([getattr(self._config, name) for name in sorted(names)])
        return f"{self._documents.version} {hashlib.sha256((settings + self._sha256).encode()).hexdigest()}".strip()

    def first_blocks(self, count: int) -> list[Block]:
        """Return the first blocks of the whole text."""
        return [block for _, block in islice(self._shard(0, 1).blocks(), count)]

    def draw(
        self, blocks_per_step: int, position: Position, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[list[Block], int, Position, list[int]]]:
        """Yield (blocks, most blocks of any rank, position, block numbers) of one rank, step after step, without end.

        The position is that of the rank's first shard, so rank 0 gives the position of shard 0. The numbers are those
        of all blocks drawn from the rank's shards; number n is block n // S of shard n % S in its epoch. Raise
        UserError if the text cannot be read.
        """
        num_shards = self._num_shards or min(world_size, blocks_per_step, self._documents.max_shards)
        blocks_per_shard = [len(range(s, blocks_per_step, num_shards)) for s in range(num_shards)]

        def assigned(r: int) -> dict[int, range]:
            """Return, for each shard that rank ``r`` reads, the indices of its own blocks among those drawn."""
            readers = max(1, len(range(r % num_shards, world_size, num_shards)))
            shards_of_rank = range(r % num_shards, num_shards, world_size)
            return {s: range(blocks_per_shard[s])[r // num_shards :: readers] for s in shards_of_rank}

        most = max(sum(map(len, assigned(r).values())) for r in range(world_size))
        own = assigned(rank)
        first_shard = rank % num_shards
        shards = {s: self._shard(s, num_shards, self._shard_states.get(s)) for s in own}
        while True:
            drawn = {s: shard.draw(blocks_per_shard[s]) for s, shard in shards.items()}
            self._num_shards = num_shards
            self._shard_states = {s: shard.state() for s, shard in shards.items()}
            position = Position(position.epoch, position.blocks + len(drawn[first_shard]))
            if not shards[first_shard].buffer:
                position = Position(position.epoch + 1)
            blocks = [block for s, part in own.items() for _, block in drawn[s][part.start :: part.step]]
            yield blocks, most, position, [number * num_shards + s for s in own for number, _ in drawn[s]]

    def state(self, rank: int = 0, world_size: int = 1) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Return the states, after the newest step, of the shards whose first reader this rank is."""
        states = {}
        for s in range(rank, self._num_shards, world_size):
            state, remainder, buffer = self._shard_states[s]
            blocks = [block for _, block in buffer]
            tensors = {
                "remainder": torch.from_numpy(remainder),
                "buffer": torch.from_numpy(np.concatenate([NO_TOKENS, *blocks], axis=1)),
                "lengths": torch.tensor([block.shape[1] for block in blocks], dtype=torch.int64),
            }
            states[s] = {**state, "buffer": [number for number, _ in buffer]}, tensors
        return states

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """Return what a checkpoint stores of all ranks' states: JSON, and tensors by group."""
        shards = {s: shard for state in states for s, shard in state.items()}
        tensors = {f"{s}.{name}": tensor for s, (_, own) in shards.items() for name, tensor in own.items()}
        return {"shards": [shards[s][0] for s in range(len(shards))]}, {"stream": tensors}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Continue from a checkpoint: the JSON of `joined`, and its tensors of the group "stream"."""
        self._num_shards = len(state["shards"])
        for s, shard in enumerate(state["shards"]):
            remainder, buffer, lengths = (tensors[f"{s}.{name}"].numpy() for name in ("remainder", "buffer", "lengths"))
            blocks = np.split(buffer, np.cumsum(lengths), axis=1)[:-1]
            self._shard_states[s] = shard, remainder, list(zip(shard["buffer"], blocks, strict=True))

    def _shard(self, index: int, count: int, state: ShardState | None = None) -> Shard:
        documents, seed = self._documents, self._seed
        if count > 1:
            documents, seed = documents.shard(index, count), [seed, index]
            documents.name += f", shard {index} of {count}"
        shard = Shard(self._config, documents, self._tokenizer, seed)
        if state:
            shard.restore(state)
        return shard
