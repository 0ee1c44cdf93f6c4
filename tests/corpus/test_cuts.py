"""Parts of documents have the tokens of the whole document: random texts, texts that are hard to cut, and time."""

import os
import random
import time
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
from conftest import make_text
from tokenizers import AddedToken, Regex, Tokenizer, models, trainers
from tokenizers import normalizers as n
from tokenizers import pre_tokenizers as p
from transformers import PreTrainedTokenizerFast

from corpus.cuts import Cutter

LLAMA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{CONTRACTIONS}?" for word in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*"))
O200K += r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
CLIP = r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
GPT2 = p.ByteLevel(add_prefix_space=False)
RAW = p.ByteLevel(add_prefix_space=False, use_regex=False)
WIDE = [AddedToken("<mask>", lstrip=True), AddedToken("<end>", rstrip=True), AddedToken("word", single_word=True)]
OPTIONS = {"special_tokens": ["</s>", "<unk>"], "show_progress": False}
FAMILIES = {
    "bpe": (models.BPE, {"fuse_unk": True}, trainers.BpeTrainer(vocab_size=600, **OPTIONS)),
    "unigram": (models.Unigram, None, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **OPTIONS)),
    "wordpiece": (models.WordPiece, {}, trainers.WordPieceTrainer(vocab_size=400, **OPTIONS)),
}


def split(pattern, behavior="isolated", **options):
    return p.Split(Regex(pattern), behavior, **options)


PATTERNS = {"llama3": f"{CONTRACTIONS}|{LLAMA % '{1,3}'}", "qwen2": f"{CONTRACTIONS}|{LLAMA % ''}", "o200k": O200K}
SPACES, UNDERSCORES = n.Replace(Regex(" {2,}"), " "), n.Replace(" ", "▁")
DEEPSEEK = p.Sequence([split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(r"\s+$"), p.Digits(True), RAW])
TOKENIZERS = {
    **{name: ("bpe", p.Sequence([split(pattern), RAW])) for name, pattern in PATTERNS.items()},
    "gpt2": ("bpe", GPT2),
    "gpt2 with prefix": ("bpe", p.ByteLevel(add_prefix_space=True)),
    "falcon": ("bpe", p.Sequence([p.Punctuation("contiguous"), GPT2, p.Digits(), split("[0-9][0-9][0-9]")])),
    "deepseek": ("bpe", DEEPSEEK),
    "starcoder": ("bpe", p.Sequence([p.Digits(True), GPT2]), n.NFC()),
    "bloom": ("bpe", p.Sequence([split(BLOOM), RAW])),
    "phrases": ("bpe", split(r"the model|\w+ a\w+z|\w+|\s|[^\s\w]+")),  # a match may contain a space
    "clip": ("bpe", p.Sequence([split(CLIP, "removed", invert=True), RAW]), n.Sequence([n.NFC(), n.Lowercase()])),
    "gemma": ("bpe", p.Split(" ", "merged_with_previous"), UNDERSCORES),
    "llama2": ("bpe", p.Metaspace(prepend_scheme="first", split=False)),
    "llama2 with Prepend": ("bpe", None, n.Sequence([n.Prepend("▁"), UNDERSCORES])),
    "bpe of words": ("bpe", p.Metaspace()),
    "bpe without words": ("bpe", None),
    "t5": ("unigram", p.Metaspace(), n.Sequence([n.NFKC(), n.Strip(left=False), SPACES])),
    "xlm-r": ("unigram", p.Sequence([p.WhitespaceSplit(), p.Metaspace()]), n.Sequence([n.Nmt(), n.NFKC(), SPACES])),
    "unigram": ("unigram", p.Metaspace(split=False)),
    "unigram without words": ("unigram", None, n.NFKC()),
    "bert": ("wordpiece", p.BertPreTokenizer(), n.BertNormalizer()),
    "wordpiece": ("wordpiece", p.Whitespace(), n.Sequence([n.NFD(), n.StripAccents(), n.Strip(left=False)])),
}
PIECES = [
    "the abcz",
    "the model", " word", "word", "(self):", "x = 1;\n    return x\n", "a\r\nb\r\n", "東京は晴れ。\n明日も", "ｶﾞ ﾊﾟ\n",
    "é", "e\u0301 ", "\n\u0301x", " \u0301", "각\n\u1161\u11a8", "👩\u200d💻 ", "²³ ½ 12345 7", " ", "   ", "\n", "\t",
    "\n\n", "\u3000", "\u00a0", "▁", " ▁a", "</s>", " </s> ", "<mask>", "a <mask> b", "x <end> y", "<end>\nz", "``",
    "I'll it's 's ", "\u017f ß\nß", "ﬁ ", "/", ".\n", "!!", "q\x00 \x85", "हिन्दी में क्षण।\nक", "สวัสดี ำ", "“b” ", "0",
    "-", "=", "ab", "Σ Σς ", "İ i̇ ", "ﷺ ﹰ", "SGVsbG8sIHdvcmxkIQ+/",
]  # fmt: skip


@cache
def tokenizer_of(name):
    family, pre_tokenizer, *normalizers = TOKENIZERS[name]
    model, options, trainer = FAMILIES[family]
    tokenizer = Tokenizer(model() if options is None else model(unk_token="<unk>", **options))
    # SentencePiece learns from words. So no token has a space after another character.
    tokenizer.pre_tokenizer = p.Metaspace() if name in ("gemma", "llama2") else pre_tokenizer
    tokenizer.normalizer = normalizers[0] if normalizers else None
    tokenizer.train_from_iterator([make_text(30, seed) + " ".join(PIECES) for seed in range(40)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    if name in ("qwen2", "gpt2 with prefix", "gemma", "t5", "bert"):
        tokenizer.add_tokens(WIDE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return tokenizer, Cutter(tokenizer)


def encode(tokenizer, text):
    return tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def make_document(draw):
    pieces, parts = draw.sample(PIECES, draw.randint(1, 12)), []
    for _ in range(draw.randint(0, 100)):
        parts.append(draw.choice(pieces) * (draw.randint(1, 100) if draw.random() < 0.02 else 1))
    return "".join(parts) if draw.random() < 0.9 else make_text(draw.randint(1, 300), draw.random())


def same_tokens(name, text, size, bounds=()):
    """Assert that the parts have the tokens of the whole text. The text is given in strings. Return the parts."""
    tokenizer, cutter = tokenizer_of(name)
    parts = list(cutter.cut((text[i:j] for i, j in pairwise([0, *bounds, len(text)])), size))
    assert "".join(parts) == text
    assert len(text) > size or len(parts) == 1
    assert [token for part in parts for token in encode(tokenizer, part)] == encode(tokenizer, text), (name, parts)
    return parts


def test_parts_have_the_tokens_of_the_whole_document():
    first = int(os.environ.get("CUT_SEED", 0))
    for seed in range(first, first + int(os.environ.get("CUT_DOCUMENTS", 2000))):
        draw = random.Random(seed)
        name, text, size = draw.choice(list(TOKENIZERS)), make_document(draw), draw.randint(50, 1000)
        bounds = sorted(draw.randint(0, len(text)) for _ in range(draw.choice([0, 3, 300])))
        same_tokens(name, text, size, bounds)


HARD = [
    ("unigram", "ab" * 70_000 + "a"), ("unigram without words", "01" * 70_000), ("t5", "-" * 140_000),
    ("bert", " " * 65_000 + "end"), ("bert", "0f" * 35_000), ("gpt2", "xyz" + "-" * 1_000_000 + "end"),
    ("llama3", make_text(50_000)), ("llama2", "=" * 140_000), ("llama2", make_text(20_000).replace("\n", "")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), HARD, ids=range(len(HARD)))
def test_hard_texts_take_no_longer_in_parts(name, text):
    same_tokens(name, text, 1 << 14)
    tokenizer, cutter = tokenizer_of(name)
    seconds = {}
    for _ in range(3):
        for way, parts in (("whole", [text]), ("parts", cutter.cut([text], 1 << 14))):
            start = time.perf_counter()
            for part in parts:
                encode(tokenizer, part)
            seconds[way] = min(seconds.get(way, 1e9), time.perf_counter() - start)
    assert seconds["parts"] < 3 * seconds["whole"] + 0.01, seconds  # 1.5 on an idle machine


@pytest.mark.parametrize(
    "pattern", [r"(?!\S)\s", r"a(?=b)", r"(?<=a)b", "a++", "a+?", "^a", r"\ba", r"(a)\1", "a*", "(?i)a"]
)
def test_a_pattern_without_proof_is_not_cut(pattern):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = p.Sequence([split(pattern), p.WhitespaceSplit()])
    cutter = Cutter(SimpleNamespace(is_fast=True, backend_tokenizer=tokenizer))
    assert len(list(cutter.cut(["a word " * 100], 100))) == 1


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3", "qwen2", "o200k", "deepseek", "xlm-r", "bert", "gemma", "llama2", "t5"]
)
def test_prose_is_cut(name):
    texts = ["It reads text, and writes (some of) it.\n\nNever more.\n" * 400]
    if name not in ("gemma", "llama2", "t5"):  # their newlines are no separate tokens
        texts.append("吾輩は猫である。\n名前はまだ無い。\n" * 1000)
    assert all(len(part) < 1500 for text in texts for part in same_tokens(name, text, 500))


def test_slow_and_empty():
    assert list(tokenizer_of("gpt2")[1].cut([], 10)) == [""]
    assert list(Cutter(SimpleNamespace(is_fast=False)).cut(["a b " * 9, "c"], 10)) == ["a b " * 9 + "c"]
