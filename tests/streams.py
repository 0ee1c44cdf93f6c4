"""Streamed text and its blocks, for the tests of streaming."""

import json

import torch

import data
from corpus.position import Position


def stored(config, tokenizer):
    """Return the blocks of the whole text, in order."""
    blocks = data.load_data(config, *data.load_documents(config, 0), tokenizer, 0)[0].blocks
    return [blocks[i] for i in range(len(blocks))]


def streamed(config, tokenizer, seed=0):
    return data.load_data(config, *data.load_documents(config, seed), tokenizer, seed)[0]


def epoch(training, position=None):
    """Return the steps from ``position`` to the end of its epoch: (micro-batches, position, block numbers)."""
    position, found = position or Position(), []
    for update in training.batches(4, 8, position):
        found.append(update)
        if update[1].epoch > position.epoch:
            return found


def saved(*trainings):
    """Return the state of the ranks that a checkpoint stores."""
    states = [training.state(rank, len(trainings)) for rank, training in enumerate(trainings)]
    shards = {s: state for part in states for s, state in part.items()}
    return json.loads(json.dumps([shards[s] for s in sorted(shards)]))


def same(some, others):
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(some, others, strict=True)
    )


def grouped(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]
