"""Train a tokenizer on the text."""

import hashlib
import os
import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cli.errors import warn
from cli.hub import datasets_cache
from corpus.selection import TrainingDocuments

END_OF_TEXT = "<|endoftext|>"  # ends documents; GPT-2's name for it


def train_tokenizer(size: int, documents: TrainingDocuments) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``size`` tokens. Its bytes cover any text, so it needs no unknown token.

    It is cached by the fingerprint of the text.
    """
    key = hashlib.sha256(f"{documents.fingerprint}\n{size}".encode()).hexdigest()[:32]
    cached = datasets_cache() / "trained_tokenizers" / f"{key}.json"
    if cached.exists():
        tokenizer = Tokenizer.from_file(str(cached))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
        tokenizer.train_from_iterator((piece for pieces in documents for piece in pieces), trainer)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
            tokenizer.save(f"{directory}/tokenizer.json")
            os.replace(f"{directory}/tokenizer.json", cached)
    if tokenizer.get_vocab_size() < size:
        warn(f"--tokenizer train:{size}: the text yields only {tokenizer.get_vocab_size()} tokens")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
