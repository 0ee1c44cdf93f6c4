"""Text that is streamed: the same blocks as when it is read as a whole, a shuffle buffer, exact resumption."""

import json
from itertools import takewhile

import datasets
import pytest
import torch
from conftest import make_text

import checkpoint
import data
import streaming
import text
from data import Position, collate
from text import DataConfig


@pytest.fixture
def corpus(tmp_path):
    """Three files of records, some filtered out and one long, and the evaluation text."""
    for file in range(3):
        rows = [{"n": i % 5, "name": f"{i}é", "text": make_text(4 + 7 * i, 20 * file + i)} for i in range(9)]
        rows[4]["text"] = make_text(700, file)
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row | {"text": make_text(8)}) + "\n" for row in rows[:5]))
    return {"train_files": [f"{tmp_path}/[0-9].jsonl"], "eval_files": [f"{tmp_path}/eval.jsonl"], "block_size": 32}


def stored(config, tokenizer):
    """The blocks of the text as a whole, in its order."""
    blocks = data.load_blocks(config, *text.load_documents(config, 0), tokenizer, 0)[0].blocks
    return [blocks[i] for i in range(len(blocks))]


def streamed(config, tokenizer, seed=0):
    return streaming.load_blocks(config, *streaming.load_documents(config, seed), tokenizer, seed)[0]


def epoch(training, number=0, batch_size=4, grad_accum_steps=2, position=None):
    """The updates from ``position`` to the end of epoch ``number``: (micro-batches, position, numbers of blocks)."""
    updates = training.batches(batch_size, grad_accum_steps, position or Position())
    return list(takewhile(lambda update: update[1].epoch <= number, updates))


def same(some, others):
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filter": ["n!=3"], "max_documents": 11},
        {"pack": "documents"},
        {"pack": "documents", "long_documents": "drop"},
        {"prompt_column": "{name}: ", "completion_column": "text", "text_column": "text"},
    ],
    ids=str,
)
@pytest.mark.parametrize("characters", [1 << 20, 300])
def test_the_blocks_are_those_of_the_whole_text(settings, characters, corpus, tokenizer, monkeypatch):
    """In the same order without a buffer; in another one, each once, with a buffer."""
    expected = stored(DataConfig(**corpus, **settings), tokenizer)
    monkeypatch.setattr(data, "ROW_CHARACTERS", characters)
    monkeypatch.setattr(data, "WINDOW_CHARACTERS", 2500)
    training = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=1), tokenizer)
    updates = epoch(training)
    assert same([batch for batches, *_ in updates for batch in batches], list(map(collate, grouped(expected, 4))))
    assert [number for *_, numbers in updates for number in numbers] == list(range(len(expected)))
    assert updates[-1][1] == Position(0, len(expected))
    assert same([training.first(3)], [collate(expected[:3])])
    shuffled = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=10), tokenizer)
    for number in (0, 1):
        numbers = [n for _, at, numbers in epoch(shuffled, 1) if at.epoch == number for n in numbers]
        assert sorted(numbers) == list(range(len(expected))) != numbers
        assert all(n < place + 10 for place, n in enumerate(numbers))  # no more is read than the buffer holds
        shuffled = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=10), tokenizer)


def grouped(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def test_the_seed_decides_the_order(corpus, tokenizer):
    config = DataConfig(**corpus, streaming=True, shuffle_buffer=8)
    orders = [[n for *_, numbers in epoch(streamed(config, tokenizer, seed)) for n in numbers] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt", "saved"])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_it_goes_on_exactly_from_any_update(kind, pack, corpus, tokenizer, tmp_path, monkeypatch):
    """Also behind the end of an epoch, and where a piece of tokens ends within a document."""
    monkeypatch.setattr(data, "ROW_CHARACTERS", 700)
    monkeypatch.setattr(data, "WINDOW_CHARACTERS", 2500)
    settings = {"filter": ["n!=3"], "max_documents": 14}
    table = datasets.Dataset.from_json(sorted(map(str, tmp_path.glob("[0-9].jsonl"))), cache_dir=str(tmp_path))
    if kind == "parquet":
        table.to_parquet(tmp_path / "rows.parquet", batch_size=4)
    elif kind == "csv":
        table.to_csv(tmp_path / "rows.csv")
    elif kind == "txt":
        settings = {"max_documents": 20}
        for i, row in enumerate(table["text"]):
            (tmp_path / f"{i}.txt").write_text(row)
        corpus["eval_files"] = [str(tmp_path / "0.txt")]
    if kind == "saved":
        table.save_to_disk(tmp_path / "saved")
        corpus |= {"dataset": str(tmp_path / "saved"), "train_files": []}
    elif kind != "jsonl":
        corpus["train_files"] = [f"{tmp_path}/*.{kind}"]
    config = DataConfig(**corpus | settings, pack=pack, streaming=True, shuffle_buffer=7)
    training, states, updates = streamed(config, tokenizer), [], []
    states.append((Position(), *training.state()))
    for update in training.batches(4, 2, Position()):
        updates.append(update)
        states.append((update[1], *training.state()))
        if update[1].epoch == 2:
            break
    assert len(updates) > 10
    for i, (position, state, tensors) in enumerate(states[:-1]):
        checkpoint.save(tmp_path / "step", tensors, json.loads(json.dumps(state)))
        other = streamed(config, tokenizer)
        state, tensors = checkpoint.load(tmp_path / "step")
        other.restore(state, tensors)
        assert same([tensors["stream"]], [other.state()[1]["stream"]])
        rest = [update for update, _ in zip(other.batches(4, 2, position), updates[i:], strict=False)]
        assert [update[1:] for update in rest] == [update[1:] for update in updates[i:]]
        assert all(same(update[0], true[0]) for update, true in zip(rest, updates[i:], strict=True))
