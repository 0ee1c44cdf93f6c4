"""Tokens to blocks and batches."""

import math
import time
import tracemalloc
import types

import numpy as np
import pytest
import torch
from texts import all_ids, expected_ids, texts

from corpus.flags import DataConfig
from corpus.position import Position
from corpus.tokenize import tokenize
from data import Blocks, TrainingData, collate, group_texts, load_data, load_documents, make_loader


@pytest.mark.parametrize("block_size", [2, 7, 64, 10**6])
def test_no_token_is_lost(rows, tokenizer, block_size):
    stream = tokenize(rows, tokenizer)
    blocks = group_texts(stream, block_size)
    assert all_ids(blocks) == expected_ids(rows, tokenizer)
    assert {len(blocks[i]["input_ids"]) for i in range(len(blocks) - 1)} <= {block_size}
    assert stream.counted_documents == "60 documents"
    assert stream.select([0]).counted_documents == "1 document"
    assert stream.num_bytes == sum(len(text.encode()) for text in texts(rows))


def test_short_blocks_are_padded_on_the_right(rows, tokenizer):
    blocks = group_texts(tokenize(rows, tokenizer), 64)
    batch = collate([blocks[0], blocks[len(blocks) - 1]])
    short = len(blocks[len(blocks) - 1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 64)
    assert 0 < short < 64 and batch["labels"][1, short:].eq(-100).all() and batch["labels"][1, :short].ge(0).all()


def test_sliding_windows_predict_each_token_once(rows, tokenizer):
    stream = tokenize(rows, tokenizer)
    for block_size, stride in ((16, 5), (16, 16), (64, 1000), (10**6, 3)):
        if stride > block_size:
            continue
        windows = group_texts(stream, block_size, stride)
        has_loss = torch.cat([w["labels"][w["labels"] != -100] for w in (windows[i] for i in range(len(windows)))])
        assert has_loss.tolist() == stream[:].tolist()
        if stride < block_size:  # every token with loss but the first has enough tokens before it
            starts = [int((windows[i]["labels"] != -100).nonzero()[0]) for i in range(1, len(windows))]
            assert all(start == block_size - stride for start in starts)


@pytest.mark.parametrize("micro_batches_per_step", [1, 3])
def test_each_epoch_uses_each_block_once_and_resumes_anywhere(rows, tokenizer, micro_batches_per_step):
    blocks = group_texts(tokenize(rows, tokenizer), 32)
    whole = blocks.stream[:]

    def updates(position, count):
        batches = TrainingData(blocks, 7).batches(4, 4 * micro_batches_per_step, position)
        return [next(batches) for _ in range(count)]

    per_epoch = math.ceil(math.ceil(len(blocks) / 4) / micro_batches_per_step)
    two_epochs = updates(Position(), 2 * per_epoch)
    assert two_epochs[per_epoch - 1][1] == Position(1) and two_epochs[-1][1] == Position(2)
    epochs = []
    for epoch in (two_epochs[:per_epoch], two_epochs[per_epoch:]):
        labels = torch.cat([batch["labels"][batch["labels"] != -100] for update, *_ in epoch for batch in update])
        assert sorted(labels.tolist()) == sorted(whole.tolist())
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1]  # another order in each epoch
    torch.manual_seed(0)
    for taken_up in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        again = updates(two_epochs[taken_up - 1][1], 2 * per_epoch - taken_up)
        for (before, place, _), (after, same_place, _) in zip(two_epochs[taken_up:], again, strict=True):
            assert place == same_place
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))  # drew nothing


def test_an_epoch_starts_soon_and_with_little_memory():
    """This holds for 8 million blocks. Earlier, all steps of an epoch were divided among the ranks at its start."""

    class Many(Blocks):
        def __init__(self):
            self.stream, self.block_size, self.isolate_documents = plain_stream, 2, False

        def __len__(self):
            return 8_000_000

        def tokens(self, number):
            return np.array([number, 1]), None

    plain_stream = types.SimpleNamespace(sha256="", num_loss_tokens=1, num_tokens=1)
    training, started = TrainingData(Many(), 3), time.monotonic()
    tracemalloc.start()
    batches = training.batches(2, 4, Position(1, 7_999_996))
    (batch, _), position, numbers = next(batches)
    after = next(batches)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 6 and peak < 100e6  # for two epochs; usually 1 s
    expected = np.random.default_rng([3, 1]).permutation(8_000_000)
    assert numbers == expected[-4:].tolist() and batch["input_ids"][:, 0].tolist() == numbers[:2]
    assert (position, after) == (Position(2), Position(2, 4))


def test_evaluation_is_on_as_many_blocks_as_wanted(rows, tokenizer):
    def chosen(count, seed):
        config = DataConfig(train_files=rows.records.paths, text_column="answers.text", block_size=8)
        config.max_eval_blocks = count
        _, blocks = load_data(config, *load_documents(config, 0), tokenizer, seed)
        return blocks.total, list(blocks.kept)

    total, some = chosen(20, 0)
    assert len(some) == 20 and some == sorted(set(some)) and set(some) < set(range(total)) and some != list(range(20))
    assert chosen(20, 0)[1] == some != chosen(20, 1)[1]
    assert chosen(0, 0) == chosen(2000, 0) == (total, list(range(total)))


def test_iterating_leaves_the_global_random_state_alone(rows, tokenizer):
    before = torch.get_rng_state()
    list(make_loader(group_texts(tokenize(rows, tokenizer), 64), 4))
    assert torch.equal(torch.get_rng_state(), before)
