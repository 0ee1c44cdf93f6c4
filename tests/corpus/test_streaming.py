"""Streamed text: the same blocks as from the whole text, a shuffle buffer, exact resumption."""

import copy
import time

import datasets
import pytest
import torch
from conftest import make_text
from streams import epoch, grouped, same, saved, stored, streamed

from cli.errors import UserError
from corpus import tokenize as tokenize_module
from corpus.chat import CHAT_TEMPLATE
from corpus.flags import DataConfig
from corpus.position import Position
from data import collate


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filter": ["n!=3"], "max_documents": 11},
        {"pack": "documents"},
        {"pack": "documents", "long_documents": "drop"},
        {"prompt_column": "{name}: ", "completion_column": "text", "text_column": "text"},
        {"text_column": "said"},
    ],
    ids=str,
)
@pytest.mark.parametrize("characters", [1 << 20, 300])
def test_the_blocks_are_those_of_the_whole_text(settings, characters, corpus, tokenizer, monkeypatch):
    """A buffer of 1 keeps the order. A larger buffer changes it, and each block still appears once."""
    tokenizer = copy.deepcopy(tokenizer)  # it gets a chat template
    expected = stored(DataConfig(**corpus, **settings), tokenizer)
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", characters)
    monkeypatch.setattr(tokenize_module, "PART_CHARACTERS", 2500)
    training = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=1), tokenizer)
    updates = epoch(training)
    assert same([batch for batches, *_ in updates for batch in batches], list(map(collate, grouped(expected, 4))))
    assert [number for *_, numbers in updates for number in numbers] == list(range(len(expected)))
    assert updates[-1][1] == Position(1)
    assert same([training.first_batch(3)], [collate(expected[:3])])
    shuffled = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=10), tokenizer)
    orders = [[n for *_, numbers in epoch(shuffled, Position(number)) for n in numbers] for number in (0, 1)]
    assert orders[0] != orders[1]
    for numbers in orders:
        assert sorted(numbers) == list(range(len(expected))) != numbers
        assert all(n // 10 == place // 10 for place, n in enumerate(numbers))  # chunk after chunk


def test_the_seed_decides_the_order(corpus, tokenizer):
    config = DataConfig(**corpus, streaming=True, shuffle_buffer=8)
    orders = [[n for *_, numbers in epoch(streamed(config, tokenizer, seed)) for n in numbers] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_state_moves_on_after_long_documents(pack, corpus, tokenizer, tmp_path, monkeypatch):
    """No row of tokens ends with a document here. The state must move on, or resuming would read ever more text."""
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "PART_CHARACTERS", 500)
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(make_text(250, i))
    corpus |= {"train_files": [f"{tmp_path}/*.txt"], "eval_files": [f"{tmp_path}/0.txt"]}
    config = DataConfig(**corpus, pack=pack, streaming=True, shuffle_buffer=1)
    training, updates, states = streamed(config, tokenizer), [], []
    for update in training.batches(4, 4, Position()):
        if update[1].epoch:
            break
        updates.append(update)
        states.append(saved(training))
    newest = states[-1][0]["place"]["documents"]
    assert newest >= 7  # of 9 documents
    for i in range(0, len(states) - 1, 3):
        again = streamed(config, tokenizer)
        again.restore(states[i])
        following = next(again.batches(4, 4, updates[i][1]))
        assert following[2] == updates[i + 1][2]
        assert all(torch.equal(x[k], y[k]) for x, y in zip(following[0], updates[i + 1][0], strict=True) for k in x)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt", "saved"])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_resumes_exactly_from_any_step(kind, pack, corpus, tokenizer, tmp_path, monkeypatch):
    """This includes steps after the end of an epoch, and rows of tokens that end within a document."""
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(tokenize_module, "PART_CHARACTERS", 2500)
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
    states.append((Position(), []))
    for update in training.batches(4, 8, Position()):
        updates.append(update)
        states.append((update[1], saved(training)))
        if update[1].epoch == 2:
            break
    assert len(updates) > 10
    for i, (position, state) in enumerate(states[:-1]):
        other = streamed(config, tokenizer)
        other.restore(state)
        assert saved(other) == state
        rest = [update for update, _ in zip(other.batches(4, 8, position), updates[i:], strict=False)]
        assert [update[1:] for update in rest] == [update[1:] for update in updates[i:]]
        assert all(same(update[0], true[0]) for update, true in zip(rest, updates[i:], strict=True))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("remote", [False, True], ids=["local", "http"])
def test_a_lost_file_is_named_and_reading_resumes(remote, kind, site, corpus, tokenizer, tmp_path, monkeypatch):
    if remote:
        pytest.importorskip("aiohttp")
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(make_text(400, i))
    corpus["train_files"] = [f"{site if remote else tmp_path}/{i}.{kind}" for i in range(3)]
    config = DataConfig(**corpus, streaming=True, shuffle_buffer=1)
    expected = epoch(streamed(config, tokenizer))
    training, seen = streamed(config, tokenizer), []
    lost = tmp_path / f"2.{kind}"
    with pytest.raises(UserError, match=rf"/2\.{kind}: cannot be read"):
        for update in training.batches(4, 8, Position()):
            seen.append(update)
            if len(seen) == 1:
                lost.rename(tmp_path / "lost")
    state = saved(training)
    (tmp_path / "lost").rename(lost)
    other = streamed(config, tokenizer)
    other.restore(state)
    updates = seen + epoch(other, seen[-1][1])
    assert 1 < len(seen) < len(expected) and [u[1:] for u in updates] == [u[1:] for u in expected]
    assert all(same(one[0], two[0]) for one, two in zip(updates, expected, strict=True))


def test_a_resumed_stream_is_of_the_same_text(corpus, chat_tokenizer_with_date, tmp_path, monkeypatch):
    """A rewritten file is noticed, even if its size is the same. A copy and another day make no difference."""
    changes = {"text_column": "said", "streaming": True}
    config = DataConfig(**corpus | changes)
    before = streamed(config, chat_tokenizer_with_date).identity
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert streamed(config, chat_tokenizer_with_date).identity == before
    (tmp_path / "copies").mkdir()
    for i in range(3):
        (tmp_path / "copies" / f"{i}.jsonl").write_bytes((tmp_path / f"{i}.jsonl").read_bytes())
    copied = DataConfig(**corpus | changes | {"train_files": [f"{tmp_path}/copies/*.jsonl"]})
    assert streamed(copied, chat_tokenizer_with_date).identity == before
    second = tmp_path / "1.jsonl"
    second.write_text(second.read_text().replace("model", "token"))
    after = streamed(config, chat_tokenizer_with_date).identity
    assert after["training text"] != before["training text"] and after["text settings"] == before["text settings"]


@pytest.fixture
def chat_tokenizer_with_date(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    return tokenizer
