"""Documents -> tokens -> one flat token stream -> `group_texts` blocks -> `DataLoader`.

    blocks = group_texts(stream, block_size=128)       # every token is in exactly one block
    loader = make_loader(blocks, batch_size=8)         # {"input_ids", "labels"}: (batch, block_size) int64
    for micro_batches, position, numbers in train_data.batches(...): ...        # one item per step, without end

Memory stays flat: tokens live in a memory-mapped Arrow file, and blocks are views of it. The package corpus/ turns
text into the token stream. Here is the order in which blocks are trained on.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from cli.errors import require, warn
from corpus import sources, streaming
from corpus.chat import CHAT_TEMPLATE
from corpus.documents import Documents
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.selection import select_text
from corpus.shards import StreamedText
from corpus.tokenize import load_stream
from corpus.tokens import TokenStream, token_ids
from modeling.linear_cross_entropy import IGNORED_LABEL

Batch = dict[str, torch.Tensor]  # "input_ids", "labels" and, with isolated documents, "position_ids"


class Blocks(Dataset):
    """Block i is tokens [i * stride, i * stride + block_size) of a stream. Only the last one may be shorter.

    With stride = block_size the blocks follow each other. With a smaller stride they overlap, and only tokens that are
    in no block before carry labels. So each token but the first is predicted once, with at least block_size - stride
    tokens before it (as in the guide "Perplexity of fixed-length models" of transformers). ``kept`` selects blocks.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        stride: int | None = None,
        isolate_documents: bool = False,
        kept: Sequence[int] | None = None,
    ):
        self.stream, self.block_size, self.stride = stream, block_size, stride or block_size
        self.isolate_documents = isolate_documents
        count = min(1, len(stream)) + math.ceil(max(0, len(stream) - block_size) / self.stride)
        self.kept = range(count) if kept is None else kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: int) -> Batch:
        """Return input_ids and labels, and position_ids if documents are isolated; all (length,) int64."""
        start = int(self.kept[item]) * self.stride
        stop = start + self.block_size
        positions = self.stream.positions(start, stop) if self.isolate_documents else None
        block = block_item(self.stream[start:stop], positions)
        if start > 0:
            block["labels"][: self.block_size - self.stride] = IGNORED_LABEL
        return block


def group_texts(
    stream: TokenStream, block_size: int, stride: int | None = None, isolate_documents: bool = False
) -> Blocks:
    """Group all tokens into blocks. None is dropped: the remainder is the last, short block."""
    return Blocks(stream, block_size, stride, isolate_documents)


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
    """Raise UserError if no token has a loss: nothing predicts the first one of a block."""
    has_loss = any((blocks[i]["labels"][1:] != IGNORED_LABEL).any() for i in range(len(blocks)))
    require(has_loss, "the evaluation text: none of its tokens has a loss. Use more text.")


def collate(items: list[Batch], rows: int = 0, length: int = 0, isolate_documents: bool = False) -> Batch:
    """Stack blocks to (batch, longest), at least (rows, length). The filling is token 0 without a label.

    No mask is needed: later tokens cannot change a token's logits, as `check_causal` has proved, and the filling
    has no loss. Without any blocks everything is filling.
    """
    items = items or [block_item(np.array([~0, ~0]), np.arange(2) if isolate_documents else None)]
    batch = {}
    for key in items[0]:
        value = IGNORED_LABEL if key == "labels" else 0
        stacked = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        missing = (0, max(0, length - stacked.shape[1]), 0, max(0, rows - len(items)))
        batch[key] = torch.nn.functional.pad(stacked, missing, value=value)
    return batch


def rank_batches(indices: Sequence[int], batch_size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[int]]:
    """Split one rank's share of the indices into batches. All ranks get equally many; some may be empty."""
    count = math.ceil(math.ceil(len(indices) / ranks) / batch_size)
    return [indices[rank::ranks][i * batch_size : (i + 1) * batch_size] for i in range(count)]


def make_loader(
    blocks: Blocks, batch_size: int, batches: list[Sequence[int]] | None = None, same_shape: bool = False
) -> DataLoader:
    """Load ``batches`` of the blocks, or all blocks in order.

    With ``same_shape`` every batch is filled up to (batch_size, block_size), so that one compiled graph fits all.
    """
    shape = {"rows": batch_size, "length": blocks.block_size} if same_shape else {}
    return DataLoader(
        blocks,
        batch_sampler=rank_batches(range(len(blocks)), batch_size) if batches is None else batches,
        collate_fn=partial(collate, **shape, isolate_documents=blocks.isolate_documents),
        # Without a generator of its own a DataLoader draws from the global one, and dropout would change with it.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in an epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


class TrainingData:
    """Blocks of text that is on the disk, in an order of the ``seed``."""

    def __init__(self, blocks: Blocks, seed: int):
        self.blocks, self._seed = blocks, seed
        self.identity = blocks.stream.sha256
        self.loss_fraction = blocks.stream.num_loss_tokens / len(blocks.stream)  # of all tokens, those with loss

    def __str__(self) -> str:
        stream, size = self.blocks.stream, self.blocks.block_size
        return f"{stream.num_documents:,} documents, {len(stream):,} tokens, {len(self.blocks):,} blocks of {size}"

    def steps_per_epoch(self, batch_size: int) -> int | None:
        """Return the steps of an epoch, or None if unknown."""
        return math.ceil(len(self.blocks) / batch_size)

    def epochs(self, position: Position) -> float:
        """Return how many epochs a position is from the start."""
        return position.epoch + position.blocks / len(self.blocks)

    def first_batch(self, count: int) -> Batch:
        return collate([self.blocks[i] for i in range(min(count, len(self.blocks)))])

    def batches(
        self,
        micro_batch_size: int,
        batch_size: int,
        position: Position,
        rank: int = 0,
        ranks: int = 1,
        same_shape: bool = False,
    ) -> Iterator[tuple[list[Batch], Position, list[int]]]:
        """Yield, without end, a rank's micro-batches of a step, the position after it, and its blocks' numbers.

        The blocks of a step do not depend on the number of ranks. The last step of an epoch has the blocks that are
        left: each block is seen once per epoch, by one rank.
        """
        while True:
            order = epoch_order(len(self.blocks), self._seed, position.epoch)[position.blocks :]
            steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            shares = [rank_batches(step, micro_batch_size, rank, ranks) for step in steps]
            loaded = iter(make_loader(self.blocks, micro_batch_size, list(chain(*shares)), same_shape))
            for step, share in zip(steps, shares, strict=True):
                position = Position(position.epoch, position.blocks + len(step))
                if position.blocks == len(self.blocks):
                    position = Position(position.epoch + 1)
                yield list(islice(loaded, len(share))), position, step.tolist()

    # A checkpoint needs nothing but the position. Streamed text has more state: see `corpus.shards.StreamedText`.
    def state(self, rank: int = 0, ranks: int = 1) -> None:
        """Return a rank's part of the state."""

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """Join the parts of all ranks into JSON and tensors."""
        return {}, {}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Resume from the state that `joined` returned."""


class StreamedData(StreamedText):
    """Blocks of text that is read as it is needed, with the methods of `TrainingData`."""

    def steps_per_epoch(self, batch_size: int) -> None:
        return None

    def epochs(self, position: Position) -> int:
        return position.epoch

    def first_batch(self, count: int) -> Batch:
        return collate([self._item(block) for block in self.first_blocks(count)])

    def batches(
        self,
        micro_batch_size: int,
        batch_size: int,
        position: Position,
        rank: int = 0,
        ranks: int = 1,
        same_shape: bool = False,
    ) -> Iterator[tuple[list[Batch], Position, list[int]]]:
        options = {"isolate_documents": self._config.pack == "documents"}
        if same_shape:
            options |= {"rows": micro_batch_size, "length": self._config.block_size}
        for blocks, most, after, numbers in self.draw(batch_size, position, rank, ranks):
            items = [self._item(block) for block in blocks]
            count = max(len(items), most if ranks > 1 else 0)  # all ranks make the same number of batches
            parts = [items[i : i + micro_batch_size] for i in range(0, count, micro_batch_size)]
            yield [collate(part, **options) for part in parts], after, numbers

    def _item(self, block: np.ndarray) -> Batch:
        ids, positions = block.astype(np.int64)
        # A document that began in the block before has its positions from the start of this one.
        positions = np.minimum(positions, np.arange(len(ids))) if self._config.pack == "documents" else None
        return block_item(ids, positions)


def load_documents(config: DataConfig, seed: int) -> tuple[Documents, Documents]:
    """Return the training and the evaluation documents. Raise UserError if they cannot be read."""
    return (streaming if config.streaming else sources).load_documents(config, seed)


def load_data(
    config: DataConfig, training: Documents, evaluation: Documents, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TrainingData | StreamedData, Blocks]:
    """Return the text to train on, and the blocks to evaluate on. Raise UserError if there is too little text."""
    isolate = config.pack == "documents"
    if config.streaming:
        held_out, kept = load_stream(config, evaluation, tokenizer, "held out"), None
        if training.has_messages and not tokenizer.chat_template:
            tokenizer.chat_template = CHAT_TEMPLATE
            warn("the tokenizer has no chat template; a plain one is used, and saved with the model")
        train_data = StreamedData(config, training, tokenizer, seed)
    else:
        stream, held_out, kept = select_text(config, training, evaluation, tokenizer, seed)
        train_data = TrainingData(group_texts(stream, config.block_size, isolate_documents=isolate), seed)
    eval_blocks = Blocks(held_out, config.block_size, None, isolate, kept)
    if config.max_eval_blocks and config.max_eval_blocks < len(eval_blocks):  # always the same ones, evenly spread
        chosen = np.linspace(0, len(eval_blocks) - 1, config.max_eval_blocks).astype(int)
        eval_blocks.kept = np.asarray(eval_blocks.kept)[chosen]
    require_predictions(eval_blocks)
    return train_data, eval_blocks
