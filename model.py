"""The tokenizer and the causal language model."""

import hashlib
import json
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cli.errors import UserError, require, warn
from cli.flags import flag
from corpus.documents import Documents
from modeling.architectures import generate_as_trained, make_causal, needs_padding
from modeling.loading import load_pretrained, load_tokenizer_by_name, loading, read_config, weights_on_meta

END_OF_TEXT = "<|endoftext|>"  # what a tokenizer trained here ends documents with; GPT-2's name for it


@dataclass
class ModelConfig:
    model: str | None = flag(None, "Hub id or local directory of a pretrained model")
    model_revision: str | None = flag(None, "a branch, tag or commit of the Hub model")
    model_config: str | None = flag(None, "from scratch instead: a directory or JSON file with a model's config.json")
    model_overrides: str | None = flag(None, """keys to change in the model's config: '{"n_layer": 4}'""")
    tokenizer: str | None = flag(
        None, "Hub id or local directory (default: the model's); train:N makes a byte-level BPE of N tokens"
    )
    add_tokens: list[str] = flag([], "tokens to add, such as '<note>'; their embeddings start at the mean of all")
    attn_implementation: str | None = flag(
        None, "sdpa, eager, or what else transformers knows (default: its own choice)"
    )

    def rules(self) -> list[tuple[bool, str]]:
        both = f"--model {self.model} and --model_config {self.model_config} exclude each other; give one of them"
        size = _vocab_size(self.tokenizer)
        none = "no model: give --model (pretrained) or --model_config (from scratch)"
        return [
            (bool(self.model) != bool(self.model_config), both if self.model else none),
            (
                not (self.model_revision and Path(self.model or "").is_dir()),
                f"--model_revision {self.model_revision}: the directory {self.model} has no revisions; leave it out",
            ),
            (
                size is None or 257 <= size <= 10**6,
                f"--tokenizer {self.tokenizer}: train:N needs N of at least 257 (256 bytes and {END_OF_TEXT}), "
                f"at most 1000000",
            ),
            (
                _overrides(self.model_overrides) is not None,
                f"--model_overrides {self.model_overrides}: must be a JSON object, such as '{{\"n_layer\": 4}}'",
            ),
        ]


def _overrides(text: str | None) -> dict[str, Any] | None:
    """The parsed overrides, or None where the text is not a JSON object."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _vocab_size(tokenizer: str | None) -> int | None:
    """N of ``train:N`` (0 where N is no number), None for any other tokenizer."""
    if tokenizer is None or not tokenizer.startswith("train:"):
        return None
    number = tokenizer.removeprefix("train:")
    return int(number) if number.isdecimal() else 0


def load_tokenizer(config: ModelConfig, documents: Documents) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, or trains one on ``documents`` (the training part, never what is held out)."""
    tokenizer = _load_tokenizer(config, documents)
    known = [token for token in config.add_tokens if token in tokenizer.get_vocab()]
    require(not known, f"--add_tokens {' '.join(known)}: the tokenizer has it already; leave it out")
    tokenizer.add_tokens(config.add_tokens)
    return tokenizer


def _load_tokenizer(config: ModelConfig, documents: Documents) -> PreTrainedTokenizerBase:
    size = _vocab_size(config.tokenizer)
    if size:
        if config.model:
            warn(f"--tokenizer {config.tokenizer}: the embeddings of {config.model} were trained for other tokens")
        return _train_tokenizer(size, documents)
    if config.tokenizer:
        return load_tokenizer_by_name(config.tokenizer, "--tokenizer")
    if config.model:
        return load_tokenizer_by_name(config.model, "--model", config.model_revision)
    source = Path(config.model_config)
    return load_tokenizer_by_name(str(source.parent if source.is_file() else source), "--model_config")


def _train_tokenizer(size: int, documents: Documents) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written with it, so there is no unknown token."""
    key = hashlib.sha256(f"{documents.fingerprint}\n{size}".encode()).hexdigest()[:32]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "trained_tokenizers" / f"{key}.json"
    if cached.exists():
        tokenizer = Tokenizer.from_file(str(cached))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for pieces in documents for piece in pieces), trainer)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
            tokenizer.save(f"{directory}/tokenizer.json")
            os.replace(f"{directory}/tokenizer.json", cached)
    if tokenizer.get_vocab_size() < size:
        warn(f"--tokenizer train:{size}: the text yields only {tokenizer.get_vocab_size()} tokens")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, unchanged: str | None = None
) -> PreTrainedConfig:
    """The model's config with the overrides; for a model from scratch it fits a tokenizer that was chosen for it.

    ``unchanged`` is why a pretrained model's config must not be changed to make it causal, if there is a reason.
    """
    name, flag_name = (config.model, "--model") if config.model else (config.model_config, "--model_config")
    if Path(name, "adapter_config.json").exists():
        fix = f"merge it first: python generate.py --model {name} --merge OUT"
        raise UserError(f"{flag_name} {name}: is an adapter, and no model by itself; {fix}")
    overrides = _overrides(config.model_overrides)
    settings = read_config(name, flag_name, config.model_revision, overrides)
    if config.model_config and config.tokenizer:  # a config knows only the tokenizer that it was published with
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        fitting = {"vocab_size": len(tokenizer)} | {key: getattr(tokenizer, key) for key in special}
        for key in fitting.keys() - overrides.keys():
            try:
                setattr(settings, key, fitting[key])
            except StrictDataclassFieldValidationError:  # some have to have a padding id
                setattr(settings, key, tokenizer.eos_token_id)
    changed = make_causal(settings, kept=overrides, new_block_size=None if config.model else block_size)
    require(not (changed and unchanged), f"{unchanged} {', '.join(changed)}; add --merge_lora")
    settings._attn_implementation = config.attn_implementation
    if config.model_config and getattr(settings, "pad_token_id", 0) is None and needs_padding(settings):
        settings.pad_token_id = tokenizer.eos_token_id
    return settings


def load_model(
    config: ModelConfig, settings: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, empty: bool = False
) -> PreTrainedModel:
    """Returns the model in float32: pretrained, or freshly initialized. Added tokens have their embeddings.

    An ``empty`` one has its weights on device meta, and no memory for them.
    """
    if config.model and not empty:
        model = load_pretrained(config.model, settings, config.model_revision)
    else:
        source = f"--model {config.model}" if config.model else f"--model_config {config.model_config}"
        with (
            loading(source, "causal language model", "check it and --model_overrides"),
            weights_on_meta() if empty else nullcontext(),
        ):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        generate_as_trained(model)
    if config.add_tokens:
        added = tokenizer.convert_tokens_to_ids(config.add_tokens)
        if max(added) >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                for rows in layer.parameters():  # weights (vocabulary, width), a bias (vocabulary,)
                    rows[added] = rows[: min(added)].mean(0)
    return model
