"""Streamed text on several ranks. Each rank is an object of this process."""

import dataclasses
import json
from itertools import chain, islice

import datasets
import pytest
from conftest import make_text
from streams import saved, streamed

from cli.errors import UserError
from corpus import sources
from corpus import tokenize as tokenize_module
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.tokenize import tokenize
from modeling.linear_cross_entropy import IGNORED_LABEL


@pytest.fixture(params=["jsonl", "parquet", "txt"])
def files(request, corpus, tmp_path, monkeypatch):
    """Make four files. Two or four ranks read whole files. Three ranks read each third record, except of .txt files."""
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 150)  # small rows, so the shards take turns
    for i in range(4):
        part = datasets.Dataset.from_list([{"text": make_text(5 + 9 * (j % 4), 8 * i + j)} for j in range(8 + i)])
        if request.param == "parquet":
            part.to_parquet(tmp_path / f"part{i}.parquet", batch_size=3)
        elif request.param == "jsonl":
            part.to_json(tmp_path / f"part{i}.jsonl")
        else:
            (tmp_path / f"part{i}.txt").write_text(" ".join(part["text"]))
    changes = {"train_files": [f"{tmp_path}/part*.{request.param}"], "streaming": True, "shuffle_buffer": 5}
    return DataConfig(**corpus | changes | {"block_size": 16})


def on_ranks(config, tokenizer, ranks, at=None):
    """Return the data of the ranks, restored from ``at``, and an endless iterator over their steps."""
    trainings = [streamed(config, tokenizer) for _ in range(ranks)]
    position, state = at or (Position(), [])
    for training in trainings if at else []:
        training.restore(state)
    updates = (training.batches(2, 9, position, rank, ranks) for rank, training in enumerate(trainings))
    return trainings, zip(*updates, strict=True)


def tokens(update):
    """Return the tokens of each block of a step, without padding."""
    rows = (row for batch in update[0] for row in zip(batch["input_ids"], batch["labels"], strict=True))
    found = [ids[labels != IGNORED_LABEL].tolist() for ids, labels in rows]
    return [block for block in found if block]


def documents_of(blocks, tokenizer):
    return sorted(filter(None, tokenizer.decode(list(chain(*blocks))).split(tokenizer.eos_token)))


@pytest.mark.parametrize("limit", [None, 17])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_shards_are_the_text(shards, limit, files, tokenizer):
    """Each document is in one shard, once per epoch."""
    whole = sources.read_documents(files, "--train_files", files.train_files)
    config, found, orders = dataclasses.replace(files, max_documents=limit), [], set()
    for rank in range(shards):
        blocks, numbers = [], []
        for update in streamed(config, tokenizer).batches(2, 9, Position(), rank, shards):
            blocks, numbers = blocks + tokens(update), numbers + update[2]
            if update[1].epoch:
                break
        assert sorted(numbers) == list(range(rank, shards * len(numbers), shards))
        orders.add(tuple(number // shards for number in numbers[:6]))
        found += documents_of([blocks[i] for i in sorted(range(len(blocks)), key=numbers.__getitem__)], tokenizer)
    assert len(orders) == shards
    expected = documents_of(tokenize(whole, tokenizer)[:][None].tolist(), tokenizer)
    count = min(limit or len(expected), len(expected))
    assert len(found) == count and (sorted(found) == expected if not limit else set(found) <= set(expected))


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_resumes_with_the_same_steps_on_any_number_of_ranks(shards, files, tokenizer):
    expected, (first, updates) = [], on_ranks(files, tokenizer, shards)
    for ranks_updates in islice(updates, 40):
        expected.append((ranks_updates[0][1], sorted(block for update in ranks_updates for block in tokens(update))))
    assert all(update[1].epoch > 1 for update in ranks_updates)
    at, place = None, 0
    for ranks in (shards, 3, 1, 8, 4, 2, shards):
        trainings, updates = on_ranks(files, tokenizer, ranks, at)
        if at:
            assert saved(*trainings) == at[1]  # nothing has been drawn yet
        for ranks_updates in islice(updates, 5):
            blocks = sorted(block for update in ranks_updates for block in tokens(update))
            assert (ranks_updates[0][1], blocks) == expected[place]
            assert len({len(micro_batches) for micro_batches, *_ in ranks_updates}) == 1
            place += 1
        at = ranks_updates[0][1], saved(*trainings)
        assert len(at[1]) == shards
    assert place == 35 and [len(t.blocks._own) for t in first] == [1] * shards


def test_a_rank_reads_only_its_own_files(files, tokenizer, tmp_path):
    for rank in (0, 1):
        updates = streamed(files, tokenizer).batches(2, 9, Position(), rank, 2)
        expected = [tokens(update) for update in islice(updates, 30)]
        training = streamed(files, tokenizer)
        others = sorted(tmp_path.glob("part*"))[1 - rank :: 2]
        for path in others:
            path.rename(tmp_path / f"gone-{path.name}")
        updates = training.batches(2, 9, Position(), rank, 2)
        assert [tokens(update) for update in islice(updates, 30)] == expected
        for path in others:
            (tmp_path / f"gone-{path.name}").rename(path)


def test_shards_that_cannot_be_read_are_named(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 100)
    rows = [{"text": make_text(30, i)} for i in range(9)]
    rows[7] = {"text": None}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**corpus | {"train_files": [f"{tmp_path}/rows.jsonl"]}, streaming=True)
    with pytest.raises(UserError, match=r"rows.jsonl, --text_column text: record 8 contains None"):
        next(on_ranks(config, tokenizer, 2)[1])
    few = r"shard 0 of 4: the training text has [1-9]\d* tokens, and 64 or more are needed"
    with pytest.raises(UserError, match=few):
        config = dataclasses.replace(config, max_documents=4, block_size=64)
        next(on_ranks(config, tokenizer, 8)[1])
