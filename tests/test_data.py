import math
import os
import pickle
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_text, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cli.errors import UserError
from corpus import selection
from corpus import tokenize as tokenize_module
from corpus.documents import TextFiles
from corpus.flags import DataConfig, TextConfig
from corpus.position import Position
from corpus.records import read_rows
from corpus.selection import blocks_within, window_hashes
from corpus.sources import load_documents
from corpus.tokenize import load_stream, token_rows, tokenize, tokenizer_fingerprint
from corpus.tokens import DOCUMENT, TokenStream, token_ids
from data import TrainingData, collate, group_texts, load_data, make_loader


def texts(documents):
    return ["".join(pieces) for pieces in documents]


def plain(documents):
    return read_rows(datasets.Dataset.from_dict({"text": documents}), TextConfig())


def pairs(records, **settings):
    table = datasets.Dataset.from_list([{"q": question, "a": answer} for question, answer in records])
    return read_rows(table, TextConfig(prompt_column="q", completion_column="a", **settings))


def scored_text(stream, tokenizer):
    """What is learnt, the ends of documents included, as text."""
    labels = group_texts(stream, 10**6)[0]["labels"]
    assert stream.num_loss_tokens == int((labels >= 0).sum())
    return tokenizer.decode(labels[labels >= 0])


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
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 500)
    table = datasets.Dataset.from_list(list(token_rows(rows, tokenizer, tokenizer.eos_token_id)))
    stream = TokenStream(table)
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
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", window)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", window // 2)
    documents = TextFiles(((str(path), 0, None),))
    assert texts(documents) == [text]
    rows = list(token_rows(documents, tokenizer, tokenizer.eos_token_id))
    ids = np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32).tolist()
    assert ids == expected_ids(documents, tokenizer)
    records = np.frombuffer(b"".join(row["documents"] for row in rows), DOCUMENT)
    assert records[["tokens", "loss_tokens", "bytes"]].tolist() == [(len(ids), len(ids), len(text.encode()))]


def test_a_long_row_is_windowed_too(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", 100)
    documents = plain(["short one", make_text(2000), "", make_text(900)])
    rows = list(token_rows(documents, tokenizer, tokenizer.eos_token_id))
    assert np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32).tolist() == expected_ids(
        documents, tokenizer
    )
    assert sum(len(row["documents"]) for row in rows) == 4 * DOCUMENT.itemsize


def test_truncation_that_the_tokenizer_file_asks_for_is_not_done(rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    cut = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    cut.backend_tokenizer.enable_truncation(max_length=5)
    cut.backend_tokenizer.enable_padding(length=9)
    first = tokenize(rows, cut)
    assert first[:].tolist() == expected_ids(rows, tokenizer)
    assert tokenizer_fingerprint(cut) == tokenizer_fingerprint(tokenizer)  # a resumed run is the same


def test_second_start_reads_the_cache_and_a_changed_file_is_noticed(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", 5)
    config = DataConfig(train_files=[str(path)], text_column="answers.text", eval_files=[str(path)])
    first = tokenize(load_documents(config, 0)[0], tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "token_rows", lambda *_: pytest.fail("tokenized again"))
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
        has_loss = torch.cat([w["labels"][w["labels"] != -100] for w in (windows[i] for i in range(len(windows)))])
        assert has_loss.tolist() == stream[:].tolist()
        if stride < block_size:  # every scored token but the first has enough before it
            starts = [int((windows[i]["labels"] != -100).nonzero()[0]) for i in range(1, len(windows))]
            assert all(start == block_size - stride for start in starts)


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_each_block_is_seen_once_an_epoch_and_order_can_be_taken_up_anywhere(rows, tokenizer, grad_accum_steps):
    blocks = group_texts(tokenize(rows, tokenizer), 32)
    whole = blocks.stream[:]

    def updates(position, count):
        batches = TrainingData(blocks, 7).batches(4, 4 * grad_accum_steps, position)
        return [next(batches) for _ in range(count)]

    per_epoch = math.ceil(math.ceil(len(blocks) / 4) / grad_accum_steps)
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


def test_iterating_leaves_the_global_random_state_alone(rows, tokenizer):
    before = torch.get_rng_state()
    list(make_loader(group_texts(tokenize(rows, tokenizer), 64), 4))
    assert torch.equal(torch.get_rng_state(), before)


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
from corpus.tokenize import tokenize
from data import group_texts, make_loader
from corpus.documents import TextFiles
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


# ---------------------------------------------------------------------------------------------------------------------
# What is scored


PAIRS = [("the model", " learns text"), ("a loss of ", "token"), ("東京 é\n", "é writes"), ("the", ""), ("", "x = 1")]
LEARNT = " learns text<|endoftext|> token<|endoftext|>é writes<|endoftext|><|endoftext|>x = 1<|endoftext|>"


def test_prompts_are_read_and_completions_are_learnt(tokenizer):
    documents = pairs(PAIRS)
    stream = tokenize(documents, tokenizer)
    assert scored_text(stream, tokenizer) == LEARNT  # a token of a completion may begin with the prompt's last space
    assert all_ids(group_texts(stream, 7)) == expected_ids(documents, tokenizer)
    assert stream.num_bytes == sum(len(answer.encode()) for _, answer in PAIRS)
    both = tokenize(pairs(PAIRS, loss_on="all"), tokenizer)
    assert both.num_loss_tokens == len(both) == len(stream) and np.array_equal(both[:], token_ids(stream[:]))
    windows = group_texts(stream, 7, 3)
    labels = torch.cat([windows[i]["labels"][0 if i == 0 else 4 :] for i in range(len(windows))])
    assert tokenizer.decode(labels[labels >= 0]) == LEARNT  # sliding windows know the same marks


def test_marks_in_a_long_document_do_not_depend_on_the_windows(tokenizer, monkeypatch):
    documents = pairs([(make_text(700, i), " " + make_text(600, i + 1)) for i in range(3)])
    whole = tokenize(documents, tokenizer)[:]
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", 100)
    rows = list(token_rows(documents, tokenizer, tokenizer.eos_token_id))
    assert np.array_equal(np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32), whole)
    assert 0.3 < (whole < 0).mean() < 0.7


def test_a_slow_tokenizer_cannot_tell_a_completion():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    with pytest.raises(UserError, match=r"--loss_on completion: \w+ is a slow tokenizer"):
        tokenize(pairs([("the", " model")]), slow)
    assert tokenize(pairs([("the", " model")], loss_on="all"), slow)[:].tolist() == [
        ord(letter) + 3 for letter in "the model"
    ] + [1]


# ---------------------------------------------------------------------------------------------------------------------
# Documents that are left out, and text that stands twice


def test_a_stream_of_chosen_documents(rows, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 300)
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 200)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", 90)
    stream = TokenStream(datasets.Dataset.from_list(list(token_rows(rows, tokenizer, 0))))
    ids = [tokenizer(text)["input_ids"] + [0] for text in texts(rows)]
    draw, sums = np.random.default_rng(0), set()
    for share in (0, 0.1, 0.5, 0.9, 1):
        dropped = draw.random(60) < share
        kept = stream.select(np.flatnonzero(~dropped))
        expected = [token for document, gone in zip(ids, dropped, strict=True) for token in document if not gone]
        assert kept[:].tolist() == expected and len(kept) == kept.num_loss_tokens == len(expected)
        assert [kept[i : i + 7].tolist() for i in range(0, len(kept), 5)] == [
            expected[i : i + 7] for i in range(0, len(expected), 5)
        ]
        assert kept.documents["tokens"].tolist() == [len(ids[i]) for i in np.flatnonzero(~dropped)]
        again = pickle.loads(pickle.dumps(kept))
        assert again[:].tolist() == expected and again.sha256 == kept.sha256
        sums.add(kept.sha256)
        back = kept.select(np.arange(kept.num_documents)[::-2])
        assert back[:].tolist() == [token for i in np.flatnonzero(~dropped)[::-2] for token in ids[i]]
    assert len(sums) == 5
    assert stream.select(np.array([3, 3, 4]))[:].tolist() == ids[3] + ids[3] + ids[4]


@pytest.mark.parametrize("collide", [False, True])
@pytest.mark.parametrize("block_size", [3, 16, 10**6])
def test_blocks_that_stand_elsewhere_are_found_at_any_place(block_size, collide, tokenizer, monkeypatch):
    monkeypatch.setattr(selection, "PIECE_TOKENS", 100)
    if collide:
        hashes = window_hashes
        monkeypatch.setattr(selection, "window_hashes", lambda *given: 0 * hashes(*given))
    own, shared = make_text(80, 1), make_text(60, 2)
    train = tokenize(plain([make_text(90, 3) + shared + make_text(33, 4), "the the the the the the"]), tokenizer)
    for text in (own + shared + own, shared[20:90], own[:30], "the the the the the", ""):
        blocks = group_texts(tokenize(plain([text]), tokenizer), block_size)
        flat = "," + ",".join(map(str, train[:])) + ","
        ids = [blocks[i]["input_ids"].tolist() for i in range(len(blocks))]
        held = [f",{','.join(map(str, block))}," in flat and len(block) == block_size for block in ids]
        assert blocks_within(blocks.stream, block_size, train).tolist() == held
        assert len(text) < 100 or block_size > 16 or (any(held) and not all(held))


def blocks_of(tmp_path, tokenizer, train, evaluation, **settings):
    for name, documents in (("train", train), ("eval", evaluation)):
        datasets.Dataset.from_dict({"text": documents}).to_json(tmp_path / f"{name}.jsonl")
    files = {"train_files": [str(tmp_path / "train.jsonl")], "eval_files": [str(tmp_path / "eval.jsonl")]}
    config = DataConfig(**files, block_size=16, **settings)
    training, eval_blocks = load_data(config, *load_documents(config, 0), tokenizer, 0)
    return training.blocks, eval_blocks


def test_what_is_there_twice_is_told_and_dropped(tmp_path, tokenizer, capsys):
    known, other = make_text(60, 1), make_text(60, 2)
    train = [known, make_text(60, 3), known, other, known]
    evaluation = [make_text(60, 4), known, make_text(40, 5) + " " + other]
    blocks, eval_blocks = blocks_of(tmp_path, tokenizer, train, evaluation)
    many, counts = len(eval_blocks), "2 training documents; trained on are 1 held-out documents and "
    assert counts in capsys.readouterr().out
    assert (blocks.stream.num_documents, eval_blocks.stream.num_documents) == (5, 3)
    blocks, eval_blocks = blocks_of(tmp_path, tokenizer, train, evaluation, deduplicate=True)
    out = capsys.readouterr().out
    assert counts in out and out.endswith("held-out blocks: dropped\n")
    assert (blocks.stream.num_documents, eval_blocks.stream.num_documents) == (3, 2)
    whole = f",{','.join(map(str, blocks.stream[:]))},"
    left = [eval_blocks[i]["input_ids"].tolist() for i in range(len(eval_blocks))]
    assert 0 < len(left) < len(group_texts(eval_blocks.stream, 16)) < many
    assert not any(f",{','.join(map(str, ids))}," in whole for ids in left if len(ids) == 16)
    for evaluation, settings in (([known], {"deduplicate": True}), ([""], {})):
        with pytest.raises(UserError, match="no token of the evaluation text has a loss"):
            blocks_of(tmp_path, tokenizer, train, evaluation, **settings)
    capsys.readouterr()
    blocks_of(tmp_path, tokenizer, [other], [known])
    assert capsys.readouterr().out == ""


def mixed(config, tokenizer, seed):
    """The documents that are trained and evaluated on, as texts and in order."""
    training, eval_blocks = load_data(config, *load_documents(config, seed), tokenizer, seed)
    ids = [part.stream[:] for part in (training.blocks, eval_blocks)]
    return [tokenizer.decode(part).split("<|endoftext|>")[:-1] for part in ids]


@pytest.fixture
def sources(tmp_path):
    """Three texts, a table of 40 records and a saved data set of 10."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"txt {i}")
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(40)]}).to_json(tmp_path / "rows.jsonl")
    datasets.Dataset.from_dict({"text": [f"saved {i}" for i in range(10)]}).save_to_disk(tmp_path / "saved")
    return [f"{tmp_path}/*.txt:1", f"{tmp_path}/rows.jsonl:2.5", f"{tmp_path}/saved:1"]


def test_a_mixture_holds_out_first_and_then_repeats_small_sources(sources, tokenizer, capsys):
    config = DataConfig(mix=sources, eval_fraction=0.2)
    train, held_out = mixed(config, tokenizer, 3)
    assert f"{sources[0][:-2]}: 2 documents, each 6.50 times per epoch" in capsys.readouterr().out
    assert len(held_out) == len(set(held_out)) == 1 + 8 + 2 and not set(train) & set(held_out)
    whole = {f"{name} {i}" for name, size in (("txt", 3), ("row", 40), ("saved", 10)) for i in range(size)}
    assert set(train) | set(held_out) == whole
    seen = {name: Counter(text for text in train if text.startswith(name)) for name in ("txt", "row", "saved")}
    assert {name: counts.total() for name, counts in seen.items()} == {"txt": 13, "row": 32, "saved": 13}
    for counts in seen.values():  # each pass over a source is whole
        assert max(counts.values()) - min(counts.values()) <= 1
    assert train == mixed(config, tokenizer, 3)[0] != mixed(config, tokenizer, 4)[0]
    assert train != sorted(train)
    config.max_documents = 1
    with pytest.raises(UserError, match="Use more text"):  # a text of a few letters, cut in two
        mixed(config, tokenizer, 3)


def test_what_a_mixture_repeats_is_not_there_twice(tmp_path, tokenizer, capsys):
    for name, seeds in (("a", range(4)), ("b", range(1, 40))):
        table = datasets.Dataset.from_dict({"text": [make_text(40, seed) for seed in seeds]})
        table.to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "c.txt").write_text(make_text(50, 99), encoding="utf-8")
    mix = [f"{tmp_path}/{name}.jsonl:1" for name in "ab"]
    config = DataConfig(mix=mix, eval_files=[f"{tmp_path}/c.txt"], deduplicate=True)
    train, _ = mixed(config, tokenizer, 0)
    assert "twice     3 training documents" in capsys.readouterr().out
    assert Counter(Counter(train).values()) == {1: 36, 9: 4}
    config.mix = [mix[1], mix[1]]
    with pytest.raises(UserError, match=r"--mix .*b.jsonl: no document is left"):
        mixed(config, tokenizer, 0)


def test_a_single_text_in_a_mixture_ends_before_the_next(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text(make_text(200), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", 4)
    config = DataConfig(mix=[f"{tmp_path}/one.txt:1", f"{tmp_path}/rows.jsonl:1"], text_column="answers.text")
    train, held_out = mixed(config, tokenizer, 0)
    (head,) = {text for text in train if make_text(200).startswith(text)}
    assert head + held_out[0] == make_text(200) and len(train) == 6


def test_long_documents_are_split_or_dropped_and_counted(tmp_path, tokenizer, capsys):
    train, evaluation = ["the text", make_text(90, 2), "a model of text"] * 4, ["a model learns"] * 2
    for way, documents in (("split", 12), ("drop", 8)):
        blocks, _ = blocks_of(tmp_path, tokenizer, train, evaluation, long_documents=way)
        assert blocks.stream.num_documents == documents
        told = "training  " in (out := capsys.readouterr().out)
        assert told == (way == "drop")
    assert "4 of 12 documents are longer than 16 tokens: dropped" in out
    stream = load_stream(TextConfig(block_size=16), pairs([("the " * 20, "a"), ("a", "b")]), tokenizer, "text")
    assert stream.num_documents == 2
    out = capsys.readouterr().out
    assert f"text      1 of 2 documents are longer than 16 tokens: split; 4 of {len(stream)} tokens carry loss" in out
    with pytest.raises(UserError, match="--long_documents drop: all 1 documents of the training text"):
        blocks_of(tmp_path, tokenizer, train[1:2], evaluation, long_documents="drop")
