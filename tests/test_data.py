import gzip
import json
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_text, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
from config import UserError
from data import (
    DataConfig,
    Position,
    Rows,
    TextFiles,
    collate,
    group_texts,
    load_documents,
    make_loader,
    tokenize,
    training_batches,
)


def texts(documents):
    return ["".join(pieces) for pieces in documents]


def expected_ids(documents, tokenizer):
    """The definition: each document's own ids, then end-of-text."""
    ids = []
    for text in texts(documents):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def all_ids(blocks):
    return torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()


@pytest.mark.parametrize("block_size", [2, 7, 64, 10**6])
def test_no_token_is_lost(rows, tokenizer, block_size):
    stream = tokenize(rows, tokenizer)
    blocks = group_texts(stream, block_size)
    assert all_ids(blocks) == expected_ids(rows, tokenizer)
    assert {len(blocks[i]["input_ids"]) for i in range(len(blocks) - 1)} <= {block_size}
    assert stream.num_documents == 60
    assert stream.num_bytes == sum(len(text.encode()) for text in texts(rows))


def test_the_stream_may_span_many_rows(rows, tokenizer, monkeypatch):
    whole = tokenize(rows, tokenizer)[:]
    monkeypatch.setattr(data, "ROW_CHARACTERS", 500)
    table = datasets.Dataset.from_list(list(data._token_rows(rows, tokenizer, tokenizer.eos_token_id)))
    stream = data.TokenStream(table)
    assert len(table) > 20
    assert np.array_equal(stream[:], whole)
    for start, stop in ((0, 1), (3, 500), (17, 4000), (len(whole) - 3, len(whole)), (5, 5), (0, 10**9)):
        assert np.array_equal(stream[start:stop], whole[start:stop])


def _trained(model, trainer, pre_tokenizer, decoder, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([make_text(4000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


FAMILIES = {
    "byte-level": lambda: _trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>", "<unk>"], show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    ),
    # Llama's and T5's way: the first word gets a space that no word in the middle of a text gets.
    "metaspace": lambda: _trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    ),
    "wordpiece": lambda: _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["</s>", "<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [200, 997])
def test_a_long_document_has_the_tokens_of_the_whole_text(family, window, tmp_path, monkeypatch):
    tokenizer = FAMILIES[family]()
    # Runs of newlines and a word longer than the overlap are where cutting goes wrong.
    text = make_text(3000) + "\n" * 70 + "x" * 300 + " " * 90 + make_text(500, seed=5) + "\r\n"
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(data, "WINDOW_CHARACTERS", window)
    monkeypatch.setattr(data, "OVERLAP_CHARACTERS", window // 2)
    documents = TextFiles(((str(path), 0, None),))
    assert texts(documents) == [text]
    rows = list(data._token_rows(documents, tokenizer, tokenizer.eos_token_id))
    ids = np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32).tolist()
    assert ids == expected_ids(documents, tokenizer)
    assert sum(row["num_bytes"] for row in rows) == len(text.encode())
    assert sum(row["num_documents"] for row in rows) == 1


def test_a_long_row_is_windowed_too(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(data, "OVERLAP_CHARACTERS", 100)
    documents = Rows(datasets.Dataset.from_dict({"text": ["short one", make_text(2000), "", make_text(900)]}), "text")
    rows = list(data._token_rows(documents, tokenizer, tokenizer.eos_token_id))
    assert np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32).tolist() == expected_ids(
        documents, tokenizer
    )
    assert sum(row["num_documents"] for row in rows) == 4


def test_truncation_that_the_tokenizer_file_asks_for_is_not_done(rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    cut = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    cut.backend_tokenizer.enable_truncation(max_length=5)
    cut.backend_tokenizer.enable_padding(length=9)
    first = tokenize(rows, cut)
    assert first[:].tolist() == expected_ids(rows, tokenizer)
    assert data.tokenizer_fingerprint(cut) == data.tokenizer_fingerprint(tokenizer)  # a resumed run is the same


def test_every_format_gives_the_same_documents(tmp_path):
    documents = [make_text(30, seed) for seed in range(12)]
    table = datasets.Dataset.from_dict({"text": documents})
    table.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in documents]), encoding="utf-8")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "other": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for i, text in enumerate(documents):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
        (tmp_path / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    names = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.gz", "*.txt", "*.txt.gz"]
    configs = [DataConfig(train_files=[str(tmp_path / name)]) for name in names]
    configs += [DataConfig(dataset=str(tmp_path / name)) for name in ("saved", "splits")]
    for config in configs:
        config.eval_files = [str(tmp_path / "a.jsonl")]
        train, evaluation = load_documents(config, 0)
        assert texts(train) == documents, config
        assert texts(evaluation) == documents
    for name, split in (("saved", "test"), ("splits", "test")):
        with pytest.raises(UserError, match="no split test there"):
            load_documents(DataConfig(dataset=str(tmp_path / name), dataset_eval_split=split), 0)
    config = DataConfig(dataset=str(tmp_path / "splits"), dataset_eval_split="other", max_documents=5)
    assert [texts(part) for part in load_documents(config, 0)] == [documents[:5], documents[:3]]


def test_nested_columns_are_joined(rows, jsonl_file):
    answers = [json.loads(line)["answers"]["text"] for line in jsonl_file.read_text().splitlines()]
    assert texts(rows) == [" ".join(answer) for answer in answers]  # the guide's way
    config = DataConfig(
        train_files=[str(jsonl_file)], text_column="answers.text", text_separator="\n\n", max_documents=3
    )
    config.eval_files = [str(jsonl_file)]
    assert texts(load_documents(config, 0)[0]) == ["\n\n".join(answer) for answer in answers[:3]]


def test_lists_of_records_are_joined():
    table = datasets.Dataset.from_list([{"turns": [{"say": "a"}, {"say": "b"}]}, {"turns": [{"say": "c"}]}])
    assert texts(Rows(table, "turns.say", "|")) == ["a|b", "c"]


def test_held_out_by_document_and_seed(jsonl_file):
    config = DataConfig(train_files=[str(jsonl_file)], text_column="answers.text", eval_fraction=0.2)
    train, evaluation = load_documents(config, 1)
    whole = [" ".join(json.loads(line)["answers"]["text"]) for line in jsonl_file.read_text().splitlines()]
    assert len(evaluation) == 12 and sorted(texts(train) + texts(evaluation)) == sorted(whole)
    assert texts(evaluation) == texts(load_documents(config, 1)[1]) != texts(load_documents(config, 2)[1])


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_single_document_is_held_out_from_its_end(kind, text_file, tokenizer, tmp_path):
    text = text_file.read_text(encoding="utf-8")
    path = text_file
    if kind == "jsonl":
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"text": text}))
    parts = load_documents(DataConfig(train_files=[str(path)], eval_fraction=0.25), 0)
    (head,), (tail,) = map(texts, parts)
    assert head + tail == text and 0.7 < len(head) / len(text) <= 0.75
    streams = [tokenize(part, tokenizer) for part in parts]
    # Cut between words, and not ended in the middle: together they are the tokens of the whole.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert np.concatenate([streams[0][:], streams[1][:]]).tolist() == ids


def test_second_start_reads_the_cache_and_a_changed_file_is_noticed(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", 5)
    config = DataConfig(train_files=[str(path)], text_column="answers.text", eval_files=[str(path)])
    first = tokenize(load_documents(config, 0)[0], tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_token_rows", lambda *_: pytest.fail("tokenized again"))
        assert tokenize(load_documents(config, 0)[0], tokenizer).sha256 == first.sha256
    write_jsonl(path, 5, seed=1)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    second = tokenize(load_documents(config, 0)[0], tokenizer)
    assert second.sha256 != first.sha256
    assert second[:].tolist() == expected_ids(load_documents(config, 0)[0], tokenizer)


def test_short_blocks_are_filled_behind(rows, tokenizer):
    blocks = group_texts(tokenize(rows, tokenizer), 64)
    batch = collate([blocks[0], blocks[len(blocks) - 1]])
    short = len(blocks[len(blocks) - 1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 64)
    assert 0 < short < 64 and batch["labels"][1, short:].eq(-100).all() and batch["labels"][1, :short].ge(0).all()


def test_sliding_windows_score_each_token_once(rows, tokenizer):
    stream = tokenize(rows, tokenizer)
    for block_size, stride in ((16, 5), (16, 16), (64, 1000), (10**6, 3)):
        if stride > block_size:
            continue
        windows = group_texts(stream, block_size, stride)
        scored = torch.cat([w["labels"][w["labels"] != -100] for w in (windows[i] for i in range(len(windows)))])
        assert scored.tolist() == stream[:].tolist()
        if stride < block_size:  # every scored token but the first has enough before it
            starts = [int((windows[i]["labels"] != -100).nonzero()[0]) for i in range(1, len(windows))]
            assert all(start == block_size - stride for start in starts)


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_each_block_is_seen_once_an_epoch_and_order_can_be_taken_up_anywhere(rows, tokenizer, grad_accum_steps):
    blocks = group_texts(tokenize(rows, tokenizer), 32)
    whole = blocks.stream[:]

    def updates(position, count):
        batches = training_batches(blocks, 4, grad_accum_steps, 7, position)
        return [next(batches) for _ in range(count)]

    per_epoch = math.ceil(math.ceil(len(blocks) / 4) / grad_accum_steps)
    two_epochs = updates(Position(), 2 * per_epoch)
    assert two_epochs[per_epoch - 1][1] == Position(1) and two_epochs[-1][1] == Position(2)
    epochs = []
    for epoch in (two_epochs[:per_epoch], two_epochs[per_epoch:]):
        labels = torch.cat([batch["labels"][batch["labels"] != -100] for update, _ in epoch for batch in update])
        assert sorted(labels.tolist()) == sorted(whole.tolist())
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1]  # another order in each epoch
    torch.manual_seed(0)
    for taken_up in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        again = updates(two_epochs[taken_up - 1][1], 2 * per_epoch - taken_up)
        for (before, place), (after, same_place) in zip(two_epochs[taken_up:], again, strict=True):
            assert place == same_place
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))  # drew nothing


def test_iterating_leaves_the_global_random_state_alone(rows, tokenizer):
    before = torch.get_rng_state()
    list(make_loader(group_texts(tokenize(rows, tokenizer), 64), 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 20 + b'{"text": null}\n', ["record 21 ", "None"]),
        ("a.jsonl", b'{"other": "a"}\n', ["--text_column text", "there are other"]),
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz", "cannot be read"]),
        ("a.doc", b"x", ["a.doc", "unknown format"]),
        ("a.jsonl", b'{"text": \n', ["a.jsonl", "not readable as json"]),
    ],
)
def test_unreadable_text_says_why(name, content, words, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        config = DataConfig(train_files=[str(tmp_path / name)], eval_files=[str(tmp_path / name)])
        tokenize(load_documents(config, 0)[0], tokenizer)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    """Tokenizes and batches 24 MB in a process of its own: less memory than the text's tokens alone would take."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    piece = make_text(200_000).encode()
    with open(tmp_path / "large.txt", "wb") as file:
        while file.tell() < 24 << 20:
            file.write(piece)
    program = """
import resource, sys
from transformers import AutoTokenizer
from data import TextFiles, group_texts, make_loader, tokenize
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/tokenizer")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tokenize(TextFiles(((sys.argv[2], 0, None),)), tokenizer)
before = peak()
stream = tokenize(TextFiles(((sys.argv[1] + "/large.txt", 0, None),)), tokenizer)
total = sum(int((batch["labels"] >= 0).sum()) for batch in make_loader(group_texts(stream, 1024), 64))
print(len(stream), total, peak() - before)
"""
    small = tmp_path / "small.txt"
    small.write_text(make_text(300_000))
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(small)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    length, total, megabytes = map(float, out.stdout.split())
    assert length == total > 5e6
    assert megabytes < 90, f"{megabytes:.0f} MB more for a 24 MB text"
