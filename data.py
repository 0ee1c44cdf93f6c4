"""Documents -> tokens -> one flat token stream -> `group_texts` blocks -> `DataLoader`."""

import ctypes
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, require, warn
from corpus.chat import CHAT_TEMPLATE
from corpus.documents import Documents
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.selection import blocks_within, mixture
from corpus.shards import StreamedText
from corpus.streaming import Streamed
from corpus.tokenize import load_stream
from corpus.tokens import TokenStream, token_ids
from modeling.linear_cross_entropy import IGNORED_LABEL

T = TypeVar("T")


class Blocks(Dataset):
    """Block i is tokens [i * stride, i * stride + block_size) of a stream; only the last one may be shorter.

    With stride = block_size these are consecutive blocks. With a smaller stride they overlap, and only tokens that no
    block before holds carry labels: each token but the first is predicted once, with at least block_size - stride
    tokens before it (the evaluation of the guide "Perplexity of fixed-length models" of transformers). The items are
    all blocks, or those that ``kept`` names. With ``isolate_documents`` a document's first token has no label.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        stride: int,
        isolate_documents: bool = False,
        kept: Sequence[int] | None = None,
    ):
        self.stream, self.block_size, self.stride, self.isolate_documents = (
            stream,
            block_size,
            stride,
            isolate_documents,
        )
        beyond_first = max(0, len(self.stream) - self.block_size)
        count = min(1, len(self.stream)) + math.ceil(beyond_first / self.stride)
        self.kept = range(count) if kept is None else kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """Returns input_ids and labels, and position_ids where documents are apart, all (block_size,) int64."""
        start = int(self.kept[item]) * self.stride
        ids = self.stream[start : start + self.block_size]
        item = block_item(
            ids, self.stream.positions(start, start + self.block_size) if self.isolate_documents else None
        )
        if start > 0:
            item["labels"][: self.block_size - self.stride] = IGNORED_LABEL
        return item


def block_item(ids: np.ndarray, positions: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """A block of ``ids``, ~id where not scored, and their ``positions`` where documents are apart, all (length,)."""
    labels = np.where(ids < 0, IGNORED_LABEL, ids)
    item = {"input_ids": token_ids(ids), "labels": labels}
    if positions is not None:
        item["position_ids"] = positions
        labels[positions == 0] = IGNORED_LABEL
    return {key: torch.from_numpy(value) for key, value in item.items()}


def group_texts(
    stream: TokenStream, block_size: int, stride: int | None = None, isolate_documents: bool = False
) -> Blocks:
    """Groups all tokens into blocks: none is dropped, and the remainder is the last, short block."""
    return Blocks(stream, block_size, stride or block_size, isolate_documents)


def load_blocks(
    config: DataConfig, training: Documents, evaluation: Documents, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple["TrainingData", Blocks]:
    """What to train on and the blocks to evaluate on. Says what of the text is there twice.

    Raises UserError where there is too little text.
    """
    train, held_out = (
        load_stream(config, documents, tokenizer, name)
        for documents, name in ((training, "training"), (evaluation, "held out"))
    )
    hashes = np.concatenate([train.documents["hash"], held_out.documents["hash"]])
    _, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = np.arange(len(hashes))
    is_twice, is_known = np.split(firsts[which] < np.minimum(numbers, train.num_documents), [train.num_documents])
    if config.deduplicate:
        train, held_out = train.select(np.flatnonzero(~is_twice)), held_out.select(np.flatnonzero(~is_known))
    if config.mix:
        sizes = [len(source) for source in training.sources]
        train = train.select(mixture(config.mix, np.repeat(np.arange(len(sizes)), sizes)[train.numbers], seed))
    rule = f"the training text has {len(train)} tokens, and {config.block_size} or more are needed"
    require(len(train) >= config.block_size, f"{rule}; give more text or a smaller --block_size")
    isolate_documents = config.pack == "documents"
    blocks, eval_blocks = (
        group_texts(stream, config.block_size, isolate_documents=isolate_documents) for stream in (train, held_out)
    )
    is_within = blocks_within(held_out, config.block_size, train)
    if config.deduplicate:
        eval_blocks = Blocks(
            held_out, config.block_size, config.block_size, isolate_documents, np.flatnonzero(~is_within)
        )
    twice, known, within = (int(found.sum()) for found in (is_twice, is_known, is_within))
    if twice or known or within:
        print(
            f"twice     {twice:,} training documents; trained on are {known:,} held-out documents and {within:,} "
            f"held-out blocks{': dropped' if config.deduplicate else '; --deduplicate drops all these'}"
        )
    need_text(eval_blocks)
    return TrainingData(blocks, seed), eval_blocks


def need_text(blocks: Blocks) -> None:
    """Raises UserError where there is no token to predict: the first one of a block has nothing to predict it."""
    predicts = any((blocks[i]["labels"][1:] != IGNORED_LABEL).any() for i in range(len(blocks)))
    require(predicts, "no token of the evaluation text is left to predict; give more text")


def collate(
    items: list[dict[str, torch.Tensor]], rows: int = 0, length: int = 0, isolate_documents: bool = False
) -> dict[str, torch.Tensor]:
    """Stacks blocks to (batch, longest), at least (rows, length); the rest is token 0 with the ignored label, alone.

    No mask is needed: what follows a token cannot change its logits (`model.check_causal` has seen to that), and
    filled places are never scored. Where there are no blocks at all, everything is filled.
    """
    items = items or [block_item(np.array([~0, ~0]), np.arange(2) if isolate_documents else None)]
    batch = {}
    for key in items[0]:
        value = IGNORED_LABEL if key == "labels" else 0
        stacked = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        missing = (0, max(0, length - stacked.shape[1]), 0, max(0, rows - len(items)))
        batch[key] = torch.nn.functional.pad(stacked, missing, value=value)
    return batch


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same blocks in batches of at most ``size``."""
    for start in range(0, len(batch["labels"]), size):
        yield {key: tensor[start : start + size] for key, tensor in batch.items()}


class WorkerError(UserError):
    """A DataLoader worker process died or hangs."""

    exit_code = 6


def _init_worker(worker_id: int) -> None:
    """Signals to the process group are the parent's to handle, and a worker does not outlive its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_batches(indices: Sequence[int], batch_size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[int]]:
    """Batches of the indices that fall to one of the ``ranks``. All ranks have as many, be it some without blocks."""
    count = math.ceil(math.ceil(len(indices) / ranks) / batch_size)
    return [indices[rank::ranks][i * batch_size : (i + 1) * batch_size] for i in range(count)]


def make_loader(
    blocks: Blocks,
    batch_size: int,
    batches: list[Sequence[int]] | None = None,
    num_workers: int = 0,
    same_shape: bool = False,
) -> DataLoader:
    """Loads ``batches`` of the blocks, or all blocks in their own order.

    With ``same_shape`` the last ones are filled up to (batch_size, block_size), so that compiled code fits them all.
    """
    shape = {"rows": batch_size, "length": blocks.block_size} if same_shape else {}
    # Without a generator of its own, a DataLoader draws from the global one whenever iteration starts, and dropout
    # would depend on how often that happened.
    return DataLoader(
        blocks,
        batch_sampler=in_batches(range(len(blocks)), batch_size) if batches is None else batches,
        collate_fn=partial(collate, **shape, isolate_documents=blocks.isolate_documents),
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        num_workers=num_workers,
        worker_init_fn=_init_worker,
    )


def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the blocks in an epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def training_batches(
    blocks: Blocks,
    batch_size: int,
    blocks_per_update: int,
    seed: int,
    position: Position,
    rank: int = 0,
    ranks: int = 1,
    same_shape: bool = False,
    num_workers: int = 0,
    worker_timeout: int = 300,
) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
    """Yields, without end, one rank's micro-batches of an update, the position after it, and all its blocks' numbers.

    Which blocks make an update does not depend on the number of ranks. An epoch ends with what is left, be it fewer
    blocks: each is seen once in an epoch, by one rank. Raises WorkerError where a worker has died, or nothing comes for
    ``worker_timeout`` seconds.
    """
    while True:
        order = epoch_order(len(blocks), seed, position.epoch)[position.blocks :]
        updates = [order[i : i + blocks_per_update] for i in range(0, len(order), blocks_per_update)]
        shares = [in_batches(update, batch_size, rank, ranks) for update in updates]
        batches = iter(make_loader(blocks, batch_size, list(chain(*shares)), num_workers, same_shape))
        if num_workers:
            batches = _guarded(batches, num_workers, worker_timeout)
        for update, share in zip(updates, shares, strict=True):
            position = Position(position.epoch, position.blocks + len(update))
            if position.blocks == len(blocks):
                position = Position(position.epoch + 1)
            yield list(islice(batches, len(share))), position, update.tolist()


class TrainingData:
    """What the loop trains on: blocks of text that is on the disk, in an order of the ``seed``."""

    def __init__(self, blocks: Blocks, seed: int):
        self.blocks, self._seed = blocks, seed
        stream = blocks.stream
        self.identity = stream.sha256
        self.loss_fraction = stream.num_loss_tokens / len(stream)  # the part of all tokens that counts as tokens seen

    def __str__(self) -> str:
        stream, size = self.blocks.stream, self.blocks.block_size
        return f"{stream.num_documents:,} documents, {len(stream):,} tokens, {len(self.blocks):,} blocks of {size}"

    def steps_per_epoch(self, blocks_per_update: int) -> int | None:
        """None where it is not known."""
        return math.ceil(len(self.blocks) / blocks_per_update)

    def epochs(self, position: Position) -> float:
        return position.epoch + position.blocks / len(self.blocks)

    def first(self, count: int) -> dict[str, torch.Tensor]:
        """The first blocks as a batch."""
        return collate([self.blocks[i] for i in range(min(count, len(self.blocks)))])

    def batches(
        self, batch_size: int, blocks_per_update: int, position: Position, *options: Any
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
        """What `training_batches` yields, whose ``options`` follow the position."""
        return training_batches(self.blocks, batch_size, blocks_per_update, self._seed, position, *options)

    def state(self, rank: int = 0, ranks: int = 1) -> None:
        """What a checkpoint must hold beside the position, of which each rank gives its part."""

    @staticmethod
    def joined(states: list) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """What all ranks' `state` have returned, as a checkpoint holds it: in JSON's terms, and as tensors by group."""
        return {}, {}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Goes on from what `joined` has returned, of the tensors those of the group "stream"."""


def _guarded(batches: Iterator[T], num_workers: int, timeout: int) -> Iterator[T]:
    """Raises WorkerError instead of waiting for ever, and only where a batch is due."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"no batch came for {timeout} seconds")

    # PyTorch raises from a handler of SIGCHLD, anywhere, and an update could be half done. Its own timeout does not
    # help where a worker stops in the middle of handing over a batch; an alarm interrupts any wait.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, expire)
    while True:
        signal.alarm(timeout)
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            fix = "go on with --resume, perhaps with --num_workers 0"
            raise WorkerError(f"--num_workers {num_workers}: a worker died or hangs ({error}); {fix}") from error
        finally:
            signal.alarm(0)
        if batch is None:
            return
        yield batch


class StreamedData(StreamedText):
    """What the loop trains on, as `TrainingData`, of text that is read as it is needed."""

    def steps_per_epoch(self, blocks_per_update: int) -> None:
        return None

    def epochs(self, position: Position) -> int:
        return position.epoch

    def first(self, count: int) -> dict[str, torch.Tensor]:
        return collate([self._item(block) for block in self.first_blocks(count)])

    def batches(
        self,
        batch_size: int,
        blocks_per_update: int,
        position: Position,
        rank: int = 0,
        ranks: int = 1,
        same_shape: bool = False,
        *workers: int,
    ) -> Iterator[tuple[list[dict[str, torch.Tensor]], Position, list[int]]]:
        shape = {"rows": batch_size, "length": self._config.block_size} if same_shape else {}
        isolate_documents = self._config.pack == "documents"
        for blocks, most, after, numbers in self.draw(blocks_per_update, position, rank, ranks):
            items = list(map(self._item, blocks))
            count = max(len(items), most if ranks > 1 else 0)  # all ranks make as many batches, some without blocks
            parts = [items[i : i + batch_size] for i in range(0, count, batch_size)]
            yield [collate(part, isolate_documents=isolate_documents, **shape) for part in parts], after, numbers

    def _item(self, block: np.ndarray) -> dict[str, torch.Tensor]:
        ids, positions = block.astype(np.int64)
        # A document that began in the block before has its positions from the start of this one.
        positions = np.minimum(positions, np.arange(len(ids))) if self._config.pack == "documents" else None
        return block_item(ids, positions)


def load_streamed_blocks(
    config: DataConfig, training: Streamed, evaluation: Documents, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[StreamedData, Blocks]:
    """What to train on, of which nothing but its start is read yet, and the blocks to evaluate on."""
    stream = load_stream(config, evaluation, tokenizer, "held out")
    eval_blocks = group_texts(stream, config.block_size, isolate_documents=config.pack == "documents")
    need_text(eval_blocks)
    if training.has_messages and not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        warn("the tokenizer has no chat template; a plain one is used, and saved with the model")
    return StreamedData(config, training, tokenizer, seed), eval_blocks
