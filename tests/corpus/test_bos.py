"""Tokenizers that put a token before each text. It is context and has no loss."""

import copy

import datasets
import numpy as np
import pytest
import torch
from conftest import make_text, talk
from texts import loss_text, pairs, plain, read_rows
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from corpus.chat import CHAT_TEMPLATE
from corpus.flags import TextConfig
from corpus.preview import preview
from corpus.tokenize import begin_of_text_ids, tokenize
from corpus.tokens import token_ids
from data import TrainingData, group_texts

TEXTS = ["the model", make_text(60), "a"]


@pytest.fixture
def bos_tokenizer(tokenizer):
    """Return a tokenizer that adds <s>, as Llama's does."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=tokenizer.eos_token)


def test_each_document_begins_with_the_token(tokenizer, bos_tokenizer):
    (bos,) = begin_of_text_ids(bos_tokenizer)
    assert begin_of_text_ids(tokenizer) == []
    stream = tokenize(plain(TEXTS), bos_tokenizer)
    expected = [bos_tokenizer(text)["input_ids"] + [bos_tokenizer.eos_token_id] for text in TEXTS]
    assert token_ids(stream[:]).tolist() == [*expected[0], *expected[1], *expected[2]] and expected[0][0] == bos
    assert np.flatnonzero(stream[:] < 0).tolist() == [0, len(expected[0]), len(expected[0] + expected[1])]
    assert stream.num_loss_tokens == len(stream) - 3
    (block,) = group_texts(stream, 1000, isolate_documents=True)
    first = block["position_ids"] == 0
    assert block["input_ids"][first].eq(bos).all() and block["labels"][first].eq(-100).all() and first.sum() == 3
    assert loss_text(tokenize(pairs([("the", " model")]), bos_tokenizer), bos_tokenizer) == " model<|endoftext|>"


@pytest.mark.parametrize("isolate_documents", [False, True])
def test_windows_begin_with_the_token(bos_tokenizer, isolate_documents):
    stream = tokenize(plain(TEXTS), bos_tokenizer)
    begin = begin_of_text_ids(bos_tokenizer)
    windows = group_texts(stream, 16, 5, isolate_documents, begin)
    items = [windows[i] for i in range(len(windows))]
    assert all(item["input_ids"][0] == begin[0] and len(item["input_ids"]) <= 16 for item in items)
    learnt = torch.cat([item["labels"][item["labels"] != -100] for item in items])
    assert learnt.tolist() == stream[:][stream[:] >= 0].tolist()  # each token once
    for item in items[1:]:
        assert (item["labels"][:11] == -100).all()
        if isolate_documents:
            starts = torch.where(item["position_ids"] == 0)[0].tolist()
            lengths = np.diff([*starts, len(item["position_ids"])])
            assert item["position_ids"].tolist() == [i for length in lengths for i in range(length)]
    assert max(len(window["input_ids"]) for window in (group_texts(stream, 16, 16, False, begin))) == 16
    narrow = group_texts(stream, 16, 15, False, begin * 2)  # two tokens leave room for 14, so windows slide by 14
    assert [len(narrow[i]["input_ids"]) for i in range(2)] == [16, 16]
    assert len(group_texts(stream, 16, None, False, begin)) == -(-len(stream) // 16)  # blocks are not windows


def test_the_preview_shows_what_is_learnt(bos_tokenizer):
    documents = pairs([("the model ", "learns"), ("é", "東京 é")])
    training = TrainingData(group_texts(tokenize(documents, bos_tokenizer), 9), 0)
    shown = preview(training, bos_tokenizer, in_color=False).splitlines()
    assert "[[learnt]], token|token" in shown[0] and len(shown) == 4
    assert shown[1] == "document 1: <s>|t|he| |m|o|d|el[[ l|e|a|rn|s|<|endoftext|>]]"  # " l" is a token
    assert shown[2].startswith("document 2: <s>|é[[") and shown[2].endswith("é|<|endoftext|>]]")
    assert shown[3] == "block 0: <s>|t|he| |m|o|d|el[[ l]]"
    colored = preview(training, bos_tokenizer, in_color=True)
    assert "\033[32m" in colored and "\033[33m<s>\033[0m" in colored and "[[" not in colored


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_chat_template_that_writes_the_token_gets_no_second_one(bos_tokenizer, loss_on):
    table = datasets.Dataset.from_list([{"chat": talk("the", "model")}] * 2)
    for written in ("", "{{ bos_token }}"):
        bos_tokenizer.chat_template = written + CHAT_TEMPLATE
        stream = tokenize(read_rows(table, TextConfig(text_column="chat", loss_on=loss_on)), bos_tokenizer)
        ids = token_ids(stream[:]).tolist()
        assert ids.count(bos_tokenizer.bos_token_id) == 2 and ids[0] == bos_tokenizer.bos_token_id
        assert stream[:1] < 0 and "<s>" not in loss_text(stream, bos_tokenizer)
        assert stream.num_loss_tokens == len(ids) - 2 or loss_on == "completion"


def test_the_cache_knows_the_tokens_that_a_template_uses(bos_tokenizer):
    table = datasets.Dataset.from_list([{"chat": talk("the", "model")}] * 2)
    bos_tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    documents = read_rows(table, TextConfig(text_column="chat"))
    first = tokenize(documents, bos_tokenizer)
    bos_tokenizer.bos_token = "the"
    assert tokenize(documents, bos_tokenizer).sha256 != first.sha256
