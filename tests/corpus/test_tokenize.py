"""Documents to tokens: windows, the cache, and the tokens with loss."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_text, write_jsonl
from texts import FAMILIES, all_ids, expected_ids, loss_text, pairs, texts
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cli.errors import UserError
from corpus import tokenize as tokenize_module
from corpus.flags import TextConfig
from corpus.sources import read_documents
from corpus.tokenize import token_parts, tokenize, tokenizer_fingerprint
from corpus.tokens import concatenate, token_ids
from data import group_texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [200, 997])
def test_a_long_document_has_the_tokens_of_the_whole_text(family, window, tmp_path, monkeypatch):
    tokenizer = FAMILIES[family]()
    # Cutting fails most easily at runs of newlines, and at a word that is longer than the overlap.
    text = make_text(3000) + "\n" * 70 + "x" * 300 + " " * 90 + make_text(500, seed=5) + "\r\n"
    path = tmp_path / f"{family}-{window}.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(tokenize_module, "PART_CHARACTERS", window)
    documents = read_documents(TextConfig(), "--files", [str(path)])
    assert texts(documents) == [text]
    stream = tokenize(documents, tokenizer)
    ids = expected_ids(documents, tokenizer)
    assert stream[:].tolist() == ids
    counts = [(len(ids), len(ids), len(text.encode()))]
    assert stream.documents[["tokens", "loss_tokens", "bytes"]].tolist() == counts


def test_the_truncation_of_the_tokenizer_file_is_off(rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    cut = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    cut.backend_tokenizer.enable_truncation(max_length=5)
    cut.backend_tokenizer.enable_padding(length=9)
    first = tokenize(rows, cut)
    assert first[:].tolist() == expected_ids(rows, tokenizer)
    assert tokenizer_fingerprint(cut) == tokenizer_fingerprint(tokenizer)  # a resumed run has the same fingerprint


def test_second_start_reads_the_cache_and_a_changed_file_is_noticed(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", 5)
    documents = read_documents(TextConfig(text_column="answers.text"), "--train_files", [str(path)])
    first = tokenize(documents, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "_encode", lambda *_: pytest.fail("tokenized again"))
        assert tokenize(documents, tokenizer).sha256 == first.sha256
    before = path.stat()
    path.write_text(path.read_text().replace("model", "token"))  # the same number of bytes
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p`, rsync and tar do
    second = tokenize(documents, tokenizer)
    assert second.sha256 != first.sha256
    assert second[:].tolist() == expected_ids(documents, tokenizer)
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(path.read_bytes())
    moved = read_documents(TextConfig(text_column="answers.text"), "--train_files", [str(copied)])
    assert tokenize(moved, tokenizer).sha256 == second.sha256  # --resume compares the content only


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    """A process tokenizes and batches 24 MB. It needs less memory than the tokens of the text."""
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
from corpus.flags import TextConfig
from corpus.sources import read_documents
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/tokenizer")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tokenize(read_documents(TextConfig(), "--files", [sys.argv[2]]), tokenizer)
before = peak()
stream = tokenize(read_documents(TextConfig(), "--files", [sys.argv[1] + "/large.txt"]), tokenizer)
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
    assert tokenizer.decode(labels[labels >= 0]) == TEXT_WITH_LOSS  # sliding windows have the same loss mask


def test_the_loss_mask_of_a_long_document_does_not_depend_on_the_windows(tokenizer, monkeypatch):
    documents = pairs([(make_text(700, i), " " + make_text(600, i + 1)) for i in range(3)])
    whole = tokenize(documents, tokenizer)[:]
    monkeypatch.setattr(tokenize_module, "PART_CHARACTERS", 500)
    parts = [part.ids for part in token_parts(documents.read(tokenizer), tokenizer)]
    assert len(parts) > 20 and np.array_equal(np.concatenate(parts), whole)
    assert 0.3 < (whole < 0).mean() < 0.7


def test_a_slow_tokenizer_has_no_loss_mask():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    with pytest.raises(UserError, match=r"--loss_on completion: \w+ is a slow tokenizer"):
        tokenize(pairs([("the", " model")]), slow)
    assert tokenize(pairs([("the", " model")], loss_on="all"), slow)[:].tolist() == [
        ord(letter) + 3 for letter in "the model"
    ] + [1]


def test_a_stream_of_selected_documents(rows, tokenizer):
    """The documents may come from several files."""
    whole = tokenize(rows, tokenizer)
    stream = concatenate([whole.select(np.arange(20)), whole, whole.select(np.arange(40, 60))])
    ids = [tokenizer(text)["input_ids"] + [0] for text in texts(rows)]
    ids = ids[:20] + ids + ids[40:]
    draw, sums = np.random.default_rng(0), set()
    for share in (0, 0.1, 0.5, 0.9, 1):
        dropped = draw.random(100) < share
        kept = stream.select(np.flatnonzero(~dropped))
        expected = [token for document, gone in zip(ids, dropped, strict=True) for token in document if not gone]
        assert kept[:].tolist() == expected and len(kept) == kept.num_loss_tokens == len(expected)
        assert [kept[i : i + 7].tolist() for i in range(0, len(kept), 5)] == [
            expected[i : i + 7] for i in range(0, len(expected), 5)
        ]
        assert kept.documents["tokens"].tolist() == [len(ids[i]) for i in np.flatnonzero(~dropped)]
        sums.add(kept.sha256)
        back = kept.select(np.arange(kept.num_documents)[::-2])
        assert back[:].tolist() == [token for i in np.flatnonzero(~dropped)[::-2] for token in ids[i]]
    assert len(sums) == 5
    assert stream.select(np.array([3, 3, 4]))[:].tolist() == ids[3] + ids[3] + ids[4]
