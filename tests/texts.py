"""Documents, tokenizers and expected tokens for the tests of text."""

import datasets
import torch
from conftest import make_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from corpus.flags import TextConfig
from corpus.records import Documents
from corpus.tables import Table
from data import group_texts


def texts(documents):
    return ["".join(pieces) for pieces in documents]


def read_rows(table, config):
    return Documents(Table("--dataset test", table, table._fingerprint, table._fingerprint), config)


def plain(documents):
    return read_rows(datasets.Dataset.from_dict({"text": documents}), TextConfig())


def pairs(records, **settings):
    table = datasets.Dataset.from_list([{"q": question, "a": answer} for question, answer in records])
    return read_rows(table, TextConfig(prompt_column="q", completion_column="a", **settings))


def loss_text(stream, tokenizer):
    """Return the tokens with loss as text, with the ends of documents."""
    labels = group_texts(stream, 10**6)[0]["labels"]
    assert stream.num_loss_tokens == int((labels >= 0).sum())
    return tokenizer.decode(labels[labels >= 0])


def expected_ids(documents, tokenizer):
    """Return the expected ids by definition: each document's own ids, then end-of-text."""
    ids = []
    for text in texts(documents):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def all_ids(blocks):
    return torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()


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
    # As in Llama and T5, the first word gets a space that words inside of a text do not get.
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
