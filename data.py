"""Documents -> tokens -> one flat token stream -> `group_texts` blocks -> `DataLoader`.

    blocks = group_texts(stream, block_size=128)       # every token is in exactly one block
    loader = make_loader(blocks, batch_size=8)         # {"input_ids", "labels"}: (batch, block_size) int64
    for micro_batches, position, numbers in train_data.batches(...): ...        # one item per step, without end

Memory stays flat: tokens live in a memory-mapped file, and blocks are views of it. The package corpus/ turns text into
the token stream. This file decides the order of the blocks in training.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from cli.errors import require
from corpus import sources
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.records import Documents
from corpus.selection import TrainingDocuments, select_text
from corpus.streaming import StreamedBlocks
from corpus.tokenize import drop_long, num_text_bytes, tokenize
from corpus.tokens import TokenStream, token_ids, with_prefix
from modeling.linear_cross_entropy import IGNORED_LABEL
from modeling.packing import with_document_bounds

Batch = dict[str, torch.Tensor]  # "input_ids", "labels"; with isolated documents "position_ids" and "cu_seq_lens"
Step = tuple[list[Batch], Position, list[int]]  # micro-batches, the position after them, numbers of their blocks


class Blocks(Dataset):
    """Block i is tokens [i * stride, i * stride + block_size) of a stream. Only the last one may be shorter.

    With stride = block_size the blocks follow each other. With a smaller stride they overlap, and a token has a label
    only in its first block. So each token but the first is predicted once, with at least block_size - stride tokens
    before it. See the guide "Perplexity of fixed-length models" of transformers. Each overlapping block begins with
    the tokens ``begin``, such as <s>, without labels. ``kept`` selects blocks.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        stride: int | None = None,
        isolate_documents: bool = False,
        begin: Sequence[int] = (),
    ):
        self.stream, self.block_size, self.isolate_documents = stream, block_size, isolate_documents
        self._begin = ~np.array(begin if (stride or block_size) < block_size else (), np.int64)
        self._window = block_size - len(self._begin)  # tokens of the stream in a block
        self.stride = min(stride or block_size, self._window)
        self.total = min(1, len(stream)) + math.ceil(max(0, len(stream) - self._window) / self.stride)
        self.kept: Sequence[int] = range(self.total)

    def __len__(self) -> int:
        return len(self.kept)

    def __str__(self) -> str:
        learnt = f"learnt: {self.stream.num_loss_tokens:,} of {len(self.stream):,} tokens"
        return f"{self.stream.counted_documents}, {len(self):,} blocks of {self.block_size}, {learnt}"

    def first(self, count: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
        return [self.tokens(i) for i in range(min(count, len(self)))]

    def __getitem__(self, item: int) -> Batch:
        """Return input_ids and labels, and position_ids if documents are isolated; all (length,) int64."""
        return block_item(*self.tokens(int(self.kept[item])))

    def tokens(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the ids of a block, ~id for a token without loss, and the positions if documents are isolated."""
        start = number * self.stride
        ids = self.stream[start : start + self._window]
        positions = self.stream.positions(start, start + self._window) if self.isolate_documents else None
        if number:
            ids[: self._window - self.stride] = ~token_ids(ids[: self._window - self.stride])
        return with_prefix(self._begin, ids, positions)

    def num_predicted_bytes(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of UTF-8 bytes of the text with loss.

        Nothing predicts the first token of a block, and the end-of-text token after a document is no text.
        """
        num_bytes, previous = self.stream.num_bytes, None
        for number in range(self.total):
            ids, positions = self.tokens(number)
            for place in [0] if positions is None else (positions == 0).nonzero()[0]:
                start = number * self.stride + place
                if ids[place] >= 0 and self.stream.positions(start, start + 2)[-1]:  # not the last of its document
                    num_bytes -= num_text_bytes(tokenizer, int(ids[place]), None if place else previous)
            previous = int(token_ids(ids[-1]))
        return num_bytes


def group_texts(stream: TokenStream, block_size: int, *options: Any, **named: Any) -> Blocks:
    """Group all tokens into blocks. None is dropped: the remainder is the last, short block. Options: see `Blocks`."""
    return Blocks(stream, block_size, *options, **named)


def block_item(ids: np.ndarray, positions: np.ndarray | None = None) -> Batch:
    """Return the tensors of a block. ``ids`` are ~id for tokens without loss; ``positions`` restart with each document.

    The first token of an isolated document has no label, as nothing predicts it.
    """
    labels = np.where(ids < 0, IGNORED_LABEL, ids)
    item = {"input_ids": token_ids(ids), "labels": labels}
    if positions is not None:
        item["position_ids"] = positions
        labels[positions == 0] = IGNORED_LABEL
    return {key: torch.from_numpy(value) for key, value in item.items()}


def require_predictions(blocks: Blocks) -> None:
    """Raise UserError if no token has a loss. Nothing predicts the first token of a block."""
    has_loss = any((blocks[i]["labels"][1:] != IGNORED_LABEL).any() for i in range(len(blocks)))
    require(has_loss, "the evaluation text: none of its tokens has a loss. Use more text, or remove --deduplicate.")


def collate(items: list[Batch], rows: int = 0, length: int = 0, isolate_documents: bool = False) -> Batch:
    """Stack blocks to (batch, longest), at least (rows, length). The filling is token 0 without a label.

    No mask is needed: the filling has no loss and comes last in a causal model. Without blocks, all is filling.
    """
    items = items or [block_item(np.array([~0, ~0]), np.arange(2) if isolate_documents else None)]
    batch = {}
    for key in items[0]:
        value = IGNORED_LABEL if key == "labels" else 0
        stacked = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        missing = (0, max(0, length - stacked.shape[1]), 0, max(0, rows - len(items)))
        batch[key] = torch.nn.functional.pad(stacked, missing, value=value)
    return with_document_bounds(batch)


def rank_batches(indices: Sequence[int], batch_size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[int]]:
    """Split one rank's share of the indices into batches. All ranks get the same number; some may be empty."""
    count = math.ceil(math.ceil(len(indices) / ranks) / batch_size)
    return [indices[rank::ranks][i * batch_size : (i + 1) * batch_size] for i in range(count)]


def make_loader(
    blocks: Blocks, batch_size: int, rank: int = 0, ranks: int = 1, same_shape: bool = False, most: int | None = None
) -> DataLoader:
    """Load one rank's share of the first ``most`` blocks, or of all blocks, in order.

    With ``same_shape`` every batch is filled up to (batch_size, block_size), so that one compiled graph fits all.
    """
    shape = {"rows": batch_size, "length": blocks.block_size} if same_shape else {}
    return DataLoader(
        blocks,
        batch_sampler=rank_batches(range(len(blocks))[:most], batch_size, rank, ranks),
        collate_fn=partial(collate, **shape, isolate_documents=blocks.isolate_documents),
        # Without its own generator, a DataLoader draws from the global one, and dropout would change with it.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in an epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


class Steps(IterableDataset):
    """Wrap an iterator of steps, so that the DataLoader pins their memory."""

    def __init__(self, make: Callable[[], Iterator]):
        self._make = make

    def __iter__(self) -> Iterator:
        return self._make()


class TrainingData:
    """The blocks to train on, stored or streamed, in an order that depends on ``seed``."""

    def __init__(self, blocks: Blocks | StreamedBlocks, seed: int):
        self.blocks, self._seed = blocks, seed
        self._num_blocks = len(blocks) if isinstance(blocks, Blocks) else None  # of an epoch, if known
        stream = blocks.stream if self._num_blocks else blocks
        self.identity = {"training text": stream.sha256} if self._num_blocks else blocks.identity
        self.loss_fraction = stream.num_loss_tokens / stream.num_tokens  # the part of all tokens with loss

    def steps_per_epoch(self, batch_size: int) -> int | None:
        """Return the steps of an epoch, or None if unknown."""
        return self._num_blocks and math.ceil(self._num_blocks / batch_size)

    def epochs(self, position: Position) -> float:
        """Return the epochs from the start to a position. Streamed text counts whole epochs only."""
        return position.epoch + (position.blocks / self._num_blocks if self._num_blocks else 0)

    def first_batch(self, count: int) -> Batch:
        """Return the first blocks of the text."""
        return collate([block_item(*block) for block in self.blocks.first(count)])

    def batches(
        self,
        micro_batch_size: int,
        batch_size: int,
        position: Position,
        rank: int = 0,
        ranks: int = 1,
        same_shape: bool = False,
    ) -> Iterator[Step]:
        """Yield, for each step without end, a rank's micro-batches, the position after it, and its blocks' numbers.

        With ``same_shape`` every batch is filled up, so that one compiled graph fits all. All ranks make the same
        number of micro-batches; some may be empty. A step has the same blocks on any number of ranks.
        """
        shape = {"rows": micro_batch_size, "length": self.blocks.block_size} if same_shape else {}
        shape["isolate_documents"] = self.blocks.isolate_documents

        def make() -> Iterator[Step]:
            steps = self.blocks.steps if self._num_blocks is None else self._stored_steps
            for blocks, most, after, numbers in steps(batch_size, position, rank, ranks):
                items = [block_item(*block) for block in blocks]
                parts = [items[i : i + micro_batch_size] for i in range(0, most, micro_batch_size)]
                yield [collate(part, **shape) for part in parts], after, numbers

        settings = {"batch_size": None, "collate_fn": lambda step: step, "pin_memory": torch.cuda.is_available()}
        return iter(DataLoader(Steps(make), generator=torch.Generator(), **settings))

    def _stored_steps(
        self, batch_size: int, position: Position, rank: int, ranks: int
    ) -> Iterator[tuple[list, int, Position, list[int]]]:
        """Yield the steps of a rank, without end: (its blocks, most blocks of any rank, position, block numbers).

        The last step of an epoch has the remaining blocks. Each block is seen once per epoch, by one rank.
        """
        while True:
            order = epoch_order(len(self.blocks), self._seed, position.epoch)
            for start in range(position.blocks, len(order), batch_size):
                step = order[start : start + batch_size].tolist()
                end = start + len(step)
                position = Position(position.epoch, end) if end < len(order) else Position(position.epoch + 1)
                own = [self.blocks.tokens(number) for number in step[rank::ranks]]
                yield own, math.ceil(len(step) / ranks), position, step
            del order  # before the next one is made

    def state(self, rank: int = 0, ranks: int = 1) -> dict[int, dict[str, Any]]:
        """Return a rank's part of the state of streamed text. Stored text has no state but the position."""
        return {} if self._num_blocks else self.blocks.state(rank, ranks)

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of all shards, in their order."""
        if states:
            self.blocks.restore(states)


def load_documents(config: DataConfig, seed: int) -> tuple[TrainingDocuments, Documents | None]:
    """Return the training documents, and the evaluation documents if they have their own text."""
    training, evaluation = sources.load_documents(config)
    return TrainingDocuments(training, 0 if evaluation else config.eval_fraction, seed), evaluation


def load_data(
    config: DataConfig,
    training: TrainingDocuments,
    evaluation: Documents | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[TrainingData, Blocks]:
    """Return the text to train on, and the blocks to evaluate on. Raise UserError if there is too little text."""
    isolate = config.pack == "documents"
    if config.streaming:
        blocks = StreamedBlocks(config, training.sources[0], tokenizer, seed)
        held_out = drop_long(config, tokenize(evaluation, tokenizer), "held out")
    else:
        stream, held_out = select_text(config, training, evaluation, tokenizer, seed)
        blocks = group_texts(stream, config.block_size, isolate_documents=isolate)
    eval_blocks = group_texts(held_out, config.block_size, isolate_documents=isolate)
    if 0 < config.max_eval_blocks < eval_blocks.total:  # the same ones at each evaluation
        order = np.random.default_rng(seed).permutation(eval_blocks.total)
        eval_blocks.kept = np.sort(order[: config.max_eval_blocks])
    require_predictions(eval_blocks)
    return TrainingData(blocks, seed), eval_blocks
