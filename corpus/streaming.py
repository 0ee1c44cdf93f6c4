"""Read blocks of text during training, in random order, and keep the state from which reading resumes exactly.

The blocks of a shard form chunks of --shuffle_buffer blocks. The order of each chunk depends on seed, shard, epoch and
chunk alone. So the state of a shard is a place in the text and a few numbers.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cli.errors import require, warn
from corpus.flags import DataConfig, TextConfig
from corpus.position import Position
from corpus.records import Documents
from corpus.tokenize import PLAIN_TEMPLATE, prepare_tokenizer, token_parts, tokenizer_fingerprint

Block = np.ndarray  # (2, length) int32: ids, with ~id for a token without loss, and positions in the document
START = {"epoch": 0, "chunk": 0, "used": 0, "place": None, "skip": 0}


class Shard:
    """One shard of the text, or all of it. It yields its blocks in random order, epoch after epoch.

    ``state`` is JSON and belongs to the newest step: ``used`` blocks of a chunk of an epoch are used. The chunk begins
    ``skip`` tokens after the start of the document at ``place``.
    """

    def __init__(
        self,
        config: DataConfig,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        index: int = 0,
        count: int = 1,
    ):
        self._config, self._documents, self._tokenizer = config, documents, tokenizer
        self._seed, self._index, self._count = seed, index, count
        self.state = dict(START)
        self._chunks: Iterator[tuple[list[Block], dict[str, Any]]] | None = None
        self._chunk: list[Block] = []
        self._order: list[int] = []  # of the blocks of the chunk

    def draw(self, count: int) -> list[tuple[int, Block]]:
        """Return the next blocks as (number in the epoch, block). At the end of the epoch there may be fewer."""
        if self._chunks is None:
            used, self._chunks = self.state["used"], self.chunks()
            self._next_chunk()
            self.state["used"] = used
        drawn, epoch = [], self.state["epoch"]
        while len(drawn) < count and self.state["epoch"] == epoch:
            first, used = self.state["chunk"] * self._config.shuffle_buffer, self.state["used"]
            chosen = self._order[used : used + count - len(drawn)]
            drawn += [(first + i, self._chunk[i]) for i in chosen]
            self.state = self.state | {"used": used + len(chosen)}
            if self.state["used"] == len(self._chunk):
                self._next_chunk()
        return drawn

    def _next_chunk(self) -> None:
        self._chunk, state = next(self._chunks, ([], None))
        if state is None:
            self._chunks, state = None, START | {"epoch": self.state["epoch"] + 1}
        self.state, key = state, [self._seed, self._index, state["epoch"], state["chunk"]]
        self._order = np.random.default_rng(key).permutation(len(self._chunk)).tolist()

    def chunks(self) -> Iterator[tuple[list[Block], dict[str, Any]]]:
        """Yield the chunks of the epoch from the state's chunk on, each with the state before its first block."""
        size, state = self._config.block_size, self.state
        chunk_size = size * self._config.shuffle_buffer
        begin, skip = state["chunk"] * chunk_size, state["skip"]  # the first token of the chunk, in the epoch
        length, parts = begin - skip, []
        starts: deque[tuple[int, Any]] = deque()  # the first token of each document, and the place before it

        def taken(tokens: Block) -> tuple[list[Block], dict[str, Any]]:
            while len(starts) > 1 and starts[1][0] <= begin:
                starts.popleft()
            at = {"chunk": begin // chunk_size, "used": 0, "place": starts[0][1], "skip": begin - starts[0][0]}
            return [tokens[:, i : i + size] for i in range(0, tokens.shape[1], size)], state | at

        for part, is_first, place in self._parts(state["place"]):
            if is_first:
                starts.append((length, place))
            length += part.shape[1]
            parts.append(part[:, skip:])
            skip -= min(skip, part.shape[1])
            if length - begin >= chunk_size:
                tokens = np.concatenate(parts, axis=1)
                whole = tokens.shape[1] // chunk_size * chunk_size
                for start in range(0, whole, chunk_size):
                    yield taken(tokens[:, start : start + chunk_size])
                    begin += chunk_size
                parts = [tokens[:, whole:].copy()]  # a view would keep all tokens
        name = f"{self._documents.records}{f', shard {self._index} of {self._count}' if self._count > 1 else ''}"
        few = f"{name}: the training text has {length} tokens, and {size} or more are needed"
        require(length >= size, f"{few}. Use more text, other filters or a smaller --block_size.")
        if length > begin:
            yield taken(np.concatenate(parts, axis=1))

    def _parts(self, place: Any) -> Iterator[tuple[Block, bool, Any]]:
        """Yield (tokens, whether a document begins with them, the place before the document)."""
        size, held, position = self._config.block_size, [], 0
        documents = self._documents.read(self._tokenizer, place, self._index, self._count)
        for part in token_parts(documents, self._tokenizer):
            positions = np.minimum(np.arange(position, position + len(part.ids)), size)
            tokens, is_first = np.stack([part.ids, positions]).astype(np.int32), position == 0
            position += len(part.ids)
            if self._config.long_documents == "split":
                yield tokens, is_first, place
            elif position <= size:
                held.append(tokens)
                if part.is_last:
                    yield np.concatenate(held, axis=1), True, place
            if part.is_last:
                held, position, place = [], 0, part.place


class StreamedBlocks:
    """The blocks of all shards of the text. Each rank reads its own shards.

    Rank r of N reads the shards s of S with s % N = r. If there are more ranks than shards, the ranks with r % S = s
    read the same shard s. Each takes a part of its blocks. So a step uses the same blocks on any number of ranks.
    """

    def __init__(self, config: DataConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._config, self._documents, self._tokenizer, self._seed = config, documents, tokenizer, seed
        self.isolate_documents, self.block_size = config.pack == "documents", config.block_size
        self._states: list[dict[str, Any]] | None = None  # of all shards; None until the first step
        self._own: dict[int, dict[str, Any]] = {}  # of the shards that this rank reads
        lacks_template = prepare_tokenizer(documents, tokenizer)
        first, _ = next(self._shard(0, 1).chunks())  # report errors in the text before a run begins
        ids = np.concatenate(first, axis=1)[0]
        if lacks_template:
            warn(PLAIN_TEMPLATE)
        self.num_tokens, self.num_loss_tokens = len(ids), int(np.count_nonzero(ids >= 0))

    def __str__(self) -> str:
        buffer = self._config.shuffle_buffer
        return (
            f"streamed text of {self._documents.records}, in blocks of {self.block_size}, shuffled {buffer:,} at once; "
            f"learnt: {self.num_loss_tokens:,} of the first {self.num_tokens:,} tokens"
        )

    @property
    def identity(self) -> dict[str, str]:
        """Return the dataset's commit, or a hash of samples of the files, and a hash of the settings."""
        names = {field.name for field in dataclasses.fields(TextConfig)} - {"dataset"}
        settings = [str(getattr(self._config, name)) for name in sorted(names)]
        template = self._tokenizer.chat_template if self._documents.has_messages else None
        text = f"{settings} {template} {tokenizer_fingerprint(self._tokenizer)}"
        settings = hashlib.sha256(text.encode()).hexdigest()
        return {"training text": self._documents.records.identity, "text settings": settings}

    def first_documents(self, count: int, most: int) -> list[np.ndarray]:
        """Return about the first ``most`` tokens of each of the first documents."""
        documents: list[np.ndarray] = []
        for part, is_first, _ in self._shard(0, 1)._parts(None):
            if is_first and len(documents) == count:
                break
            known = np.empty(0, np.int32) if is_first else documents.pop()
            documents.append(np.append(known, part[0])[:most])
        return documents

    def first(self, count: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the first blocks of the whole text as (ids, positions)."""
        blocks = chain.from_iterable(blocks for blocks, _ in self._shard(0, 1).chunks())
        return [self._item(block) for block in islice(blocks, count)]

    def steps(
        self, batch_size: int, position: Position, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[list[tuple[np.ndarray, np.ndarray | None]], int, Position, list[int]]]:
        """Yield the steps of a rank, without end: (its blocks, most blocks of any rank, position, block numbers).

        The position belongs to the rank's first shard, so rank 0 gives the position of shard 0. The numbers name all
        blocks drawn from the rank's shards. Number n is block n // S of shard n % S in its epoch. Raise UserError if
        the text cannot be read.
        """
        num_shards = len(self._states or ()) or min(ranks, batch_size, self._documents.max_shards)
        blocks_per_shard = [len(range(s, batch_size, num_shards)) for s in range(num_shards)]

        def assigned(r: int) -> dict[int, range]:
            """Return, for each shard that rank ``r`` reads, the indices of the rank's blocks among all drawn blocks."""
            readers = max(1, len(range(r % num_shards, ranks, num_shards)))
            shards_of_rank = range(r % num_shards, num_shards, ranks)
            return {s: range(blocks_per_shard[s])[r // num_shards :: readers] for s in shards_of_rank}

        most = max(sum(map(len, assigned(r).values())) for r in range(ranks))
        own, first_shard = assigned(rank), rank % num_shards
        shards = {s: self._shard(s, num_shards) for s in own}
        for s, shard in shards.items():
            shard.state = self._states[s] if self._states else START | {"epoch": position.epoch}
        while True:
            drawn = {s: shard.draw(blocks_per_shard[s]) for s, shard in shards.items()}
            self._own = {s: shard.state for s, shard in shards.items()}
            is_over = self._own[first_shard]["epoch"] > position.epoch
            blocks = position.blocks + len(drawn[first_shard])
            position = Position(position.epoch + 1) if is_over else Position(position.epoch, blocks)
            items = [self._item(block) for s, part in own.items() for _, block in drawn[s][part.start :: part.step]]
            yield (
                items,
                most if ranks > 1 else len(items),
                position,
                [number * num_shards + s for s in own for number, _ in drawn[s]],
            )

    def state(self, rank: int = 0, ranks: int = 1) -> dict[int, dict[str, Any]]:
        """Return the states after the newest step, of the shards that this rank is the first to read."""
        states = dict(enumerate(self._states or ())) | self._own
        return {s: state for s, state in states.items() if s % ranks == rank}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of all shards, in their order."""
        self._states = states

    def _shard(self, index: int, count: int) -> Shard:
        return Shard(self._config, self._documents, self._tokenizer, self._seed, index, count)

    def _item(self, block: Block) -> tuple[np.ndarray, np.ndarray | None]:
        ids, positions = block.astype(np.int64)
        # If a document began in an earlier block, its positions count from the start of this block.
        return ids, np.minimum(positions, np.arange(len(ids))) if self.isolate_documents else None
