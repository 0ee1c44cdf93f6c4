"""Documents to tokens: windows, the cache, and which tokens carry loss."""

import os
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_text, write_jsonl
from texts import FAMILIES, all_ids, expected_ids, loss_text, pairs, plain, texts
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cli.errors import UserError
from corpus import tokenize as tokenize_module
from corpus.documents import TextFiles
from corpus.flags import DataConfig
from corpus.sources import load_documents
from corpus.tokenize import token_rows, tokenize, tokenizer_fingerprint
from corpus.tokens import DOCUMENT, TokenStream, token_ids
from data import group_texts


def test_the_stream_may_span_many_rows(rows, tokenizer, monkeypatch):
    whole = tokenize(rows, tokenizer)[:]
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 500)
    table = datasets.Dataset.from_list(list(token_rows(rows, tokenizer, tokenizer.eos_token_id)))
    stream = TokenStream(table)
    assert len(table) > 20
    assert np.array_equal(stream[:], whole)
    for start, stop in ((0, 1), (3, 500), (17, 4000), (len(whole) - 3, len(whole)), (5, 5), (0, 10**9)):
        assert np.array_equal(stream[start:stop], whole[start:stop])


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


def test_the_truncation_of_the_tokenizer_file_is_off(rows, tokenizer, tmp_path):
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


PAIRS = [("the model", " learns text"), ("a loss of ", "token"), ("東京 é\n", "é writes"), ("the", ""), ("", "x = 1")]


TEXT_WITH_LOSS = " learns text<|endoftext|> token<|endoftext|>é writes<|endoftext|><|endoftext|>x = 1<|endoftext|>"


def test_only_completions_carry_loss(tokenizer):
    documents = pairs(PAIRS)
    stream = tokenize(documents, tokenizer)
    assert (
        loss_text(stream, tokenizer) == TEXT_WITH_LOSS
    )  # a token of a completion may begin with the prompt's last space
    assert all_ids(group_texts(stream, 7)) == expected_ids(documents, tokenizer)
    assert stream.num_bytes == sum(len(answer.encode()) for _, answer in PAIRS)
    both = tokenize(pairs(PAIRS, loss_on="all"), tokenizer)
    assert both.num_loss_tokens == len(both) == len(stream) and np.array_equal(both[:], token_ids(stream[:]))
    windows = group_texts(stream, 7, 3)
    labels = torch.cat([windows[i]["labels"][0 if i == 0 else 4 :] for i in range(len(windows))])
    assert tokenizer.decode(labels[labels >= 0]) == TEXT_WITH_LOSS  # sliding windows know the same marks


def test_the_loss_mask_of_a_long_document_does_not_depend_on_the_windows(tokenizer, monkeypatch):
    documents = pairs([(make_text(700, i), " " + make_text(600, i + 1)) for i in range(3)])
    whole = tokenize(documents, tokenizer)[:]
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", 100)
    rows = list(token_rows(documents, tokenizer, tokenizer.eos_token_id))
    assert np.array_equal(np.frombuffer(b"".join(row["input_ids"] for row in rows), np.int32), whole)
    assert 0.3 < (whole < 0).mean() < 0.7


def test_a_slow_tokenizer_has_no_loss_mask():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    with pytest.raises(UserError, match=r"--loss_on completion: \w+ is a slow tokenizer"):
        tokenize(pairs([("the", " model")]), slow)
    assert tokenize(pairs([("the", " model")], loss_on="all"), slow)[:].tolist() == [
        ord(letter) + 3 for letter in "the model"
    ] + [1]


def test_a_stream_of_selected_documents(rows, tokenizer, monkeypatch):
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
