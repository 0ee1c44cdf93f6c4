"""The tokenizer and the causal language model: loaded or made new, checked, and brought to all ranks.

tokenizer = load_tokenizer(config, train_documents)
model_config = load_config(config, tokenizer, block_size=128)       # made causal if the architecture has a switch
model = build_model(config, model_config, tokenizer, world, device, precision, num_steps)
nll_sum = next_token_nll(model, input_ids, labels)      # modeling/loss.py: summed over labels that are not -100
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError, require, warn
from cli.flags import AnyPath, flag
from corpus.bpe import END_OF_TEXT, train_tokenizer
from corpus.selection import TrainingDocuments
from corpus.tokenize import set_special_tokens
from distributed.empty import find_rows, frozen_digest
from distributed.world import World
from modeling.architectures import generate_as_trained, make_causal, needs_padding, num_rows, recompute_activations
from modeling.checks import check_model
from modeling.compile import compile_layers, should_compile
from modeling.loading import (
    load_pretrained,
    load_tokenizer_by_name,
    loading,
    read_config,
    stored_dtype,
    weights_on_meta,
)
from modeling.packing import isolate_with
from modeling.precision import set_dtypes
from modeling.trained import add_lora, freeze


@dataclass
class ModelConfig:
    title = "model"

    model: AnyPath | None = flag(None, "Hub id, with @REVISION if wanted, or directory of a pretrained model")
    model_config: AnyPath | None = flag(None, "from scratch instead: directory or JSON file with a model's config.json")
    model_overrides: str | None = flag(None, """keys to change in the model's config: '{"n_layer": 4}'""")
    tokenizer: AnyPath | None = flag(
        None, "Hub id or directory (default: the model's); train:N trains a byte-level BPE of N tokens"
    )
    add_tokens: list[str] = flag([], "tokens to add, such as '<note>'; their embeddings start at the mean of all")
    attn_implementation: str | None = flag(None, "sdpa, eager, or another of transformers (default: its own choice)")

    def rules(self) -> list[tuple[bool, str]]:
        given = f"--model {self.model} and --model_config {self.model_config}: exclude each other. Remove one of them."
        none = "--model: missing. Pass --model (pretrained) or --model_config (from scratch)."
        size = _vocab_size(self.tokenizer)
        trained = f"--tokenizer {self.tokenizer}: N must be between 257 (256 bytes and {END_OF_TEXT}) and 1000000"
        attention, name = self.attn_implementation or "", f"--attn_implementation {self.attn_implementation}"
        overrides = f"--model_overrides {self.model_overrides}: is no JSON object"
        return [
            (bool(self.model) != bool(self.model_config), given if self.model else none),
            (size is None or 257 <= size <= 10**6, f"{trained}. Use a number such as train:8192."),
            ("/" not in attention, f"{name}: a kernel of the Hub runs code of its own. Use sdpa, eager or remove it."),
            (_overrides(self.model_overrides) is not None, overrides + """. Pass one such as '{"n_layer": 4}'."""),
        ]


def _overrides(text: str | None) -> dict[str, Any] | None:
    """Return the parsed overrides, or None if the text is no JSON object."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _vocab_size(tokenizer: str | None) -> int | None:
    """Return N of ``train:N`` (0 if N is no number), and None for any other tokenizer."""
    if tokenizer is None or not tokenizer.startswith("train:"):
        return None
    number = tokenizer.removeprefix("train:")
    return int(number) if number.isdecimal() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(config: ModelConfig, documents: TrainingDocuments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on ``documents``: the training part, never the held-out part."""
    tokenizer = _load_tokenizer(config, documents)
    known = [token for token in config.add_tokens if token in tokenizer.get_vocab()]
    require(not known, f"--add_tokens {' '.join(known)}: the tokenizer has it already. Remove it.")
    tokenizer.add_tokens(config.add_tokens)
    return tokenizer


def _load_tokenizer(config: ModelConfig, documents: TrainingDocuments) -> PreTrainedTokenizerBase:
    size = _vocab_size(config.tokenizer)
    if size:
        if config.model:
            warn(f"--tokenizer {config.tokenizer}: the embeddings of {config.model} were trained for other tokens")
        return train_tokenizer(size, documents)
    if config.tokenizer:
        return load_tokenizer_by_name(config.tokenizer, "--tokenizer")
    if config.model:
        return load_tokenizer_by_name(config.model, "--model")
    source = Path(config.model_config)
    return load_tokenizer_by_name(str(source.parent if source.is_file() else source), "--model_config")


# ---------------------------------------------------------------------------------------------------------------------
# Model


def load_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, is_adapter: bool = False
) -> PreTrainedConfig:
    """Return the model's config with --model_overrides, made causal, and fitted to the tokenizer if from scratch.

    Raise UserError if an adapter would need changes, because it is loaded on top of the published model.
    """
    name, flag_name = (config.model, "--model") if config.model else (config.model_config, "--model_config")
    if Path(name, "adapter_config.json").exists():
        fix = f"Run python export.py --model {name} --out DIR, and pass DIR"
        raise UserError(f"{flag_name} {name}: is an adapter, and no model by itself. {fix}.")
    overrides = _overrides(config.model_overrides)
    settings = read_config(name, flag_name, overrides)
    if config.model_config and config.tokenizer:  # a config knows only the tokenizer that it was published with
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        fitting = {"vocab_size": len(tokenizer)} | {key: getattr(tokenizer, key) for key in special}
        for key in fitting.keys() - overrides.keys():
            try:
                setattr(settings, key, fitting[key])
            except StrictDataclassFieldValidationError:  # some configs must have a padding id
                setattr(settings, key, tokenizer.eos_token_id)
    changed = make_causal(settings, kept=overrides, new_block_size=None if config.model else block_size)
    alone = f"--lora_rank: {settings.model_type} is made causal with {', '.join(changed)}, which no adapter records"
    require(not (changed and is_adapter), f"{alone}. Remove --lora_rank.")
    if config.model_config and getattr(settings, "pad_token_id", 0) is None and needs_padding(settings):
        settings.pad_token_id = tokenizer.eos_token_id
    return settings


def load_model(
    config: ModelConfig,
    settings: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    empty: bool = False,
    linear: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return the model in float32: pretrained, or freshly initialized. Added tokens have their embeddings.

    An ``empty`` model has its weights on device meta, which takes no memory. ``linear`` is the dtype of a pretrained
    model's linear layers: float32, or the dtype in its files.
    """
    attention = {"attn_implementation": config.attn_implementation}
    if config.model and not empty:
        model = load_pretrained(config.model, settings, linear=linear, **attention)
    else:
        source = f"--model {config.model}" if config.model else f"--model_config {config.model_config}"
        with (
            loading(source, "causal language model", "Use another config or other --model_overrides."),
            weights_on_meta() if empty else nullcontext(),
        ):
            options = {"dtype": torch.float32, "trust_remote_code": False}
            model = AutoModelForCausalLM.from_config(settings, **options, **attention)
        generate_as_trained(model)
        set_dtypes(model, linear)
    if config.add_tokens:
        added = tokenizer.convert_tokens_to_ids(config.add_tokens)
        if max(added) >= num_rows(model):
            model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                for rows in layer.float().parameters():  # weights (vocabulary, width), a bias (vocabulary,)
                    rows[added] = rows[: min(added)].mean(0)
    return model


def build_model(
    config: Any,
    settings: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    device: torch.device,
    precision: str,
    num_steps: int,
    compiled: bool | None = None,
) -> PreTrainedModel:
    """Return the model, ready to train: loaded and checked on rank 0, brought to all ranks, compiled if that pays.

    ``compiled`` says whether a resumed run was compiled. The model gets two attributes: ``is_compiled``, and
    ``frozen_sha256`` of the weights that no checkpoint holds. Raise UserError if text or flags do not fit the model.
    """
    shape = {"block_size": config.block_size, "isolate_documents": config.pack == "documents"}
    shape["keep_attention"] = bool(config.attn_implementation)
    check = partial(check_model, tokenizer=tokenizer, precision=precision, **shape)
    # Autocast would cast frozen weights of linear layers in each step. So weights stored in bfloat16 keep that dtype.
    is_partly_frozen = bool(config.model and (config.lora_rank or config.freeze))
    linear = stored_dtype(config.model) if is_partly_frozen and precision == "bf16" else torch.float32
    fill = ()  # with FSDP2 each rank reads its own rows, if files hold the weights; else rank 0 loads or makes them
    if world.shards and config.model and not config.lora_rank and not config.add_tokens:
        with world.local_main_first():
            model = load_model(config, settings, tokenizer, empty=True, linear=linear)
            read = find_rows(model, config.model)
        fill = (read, partial(check, model)) if all(world.on_all(lambda: bool(read))) else ()
    if not fill:
        with world.local_main_first():
            model = load_model(config, settings, tokenizer, not world.is_main, linear)
            if world.is_main:
                check(model.to(torch.device("cpu") if world.shards else device))

    # Train all weights, the weights that are not frozen, or adapters.
    freeze(model, config.freeze)
    if config.lora_rank:
        add_lora(model, config, tokenizer.convert_tokens_to_ids(config.add_tokens))
    if is_partly_frozen:
        set_dtypes(model, linear, only_frozen=True)
    if config.gradient_checkpointing != "off":
        recompute_activations(model, config.gradient_checkpointing)

    # DDP or FSDP2, and then torch.compile. A resumed run must compute as before, even with more steps.
    model = world.parallelize(model, device, precision, config.block_size, fill)
    if config.pack == "documents":
        isolate_with(model, model.attentions[1], model.isolated_by)  # the choice of rank 0
    frozen = world.on_all(lambda: frozen_digest(model) if world.shards or world.is_main else 0)
    model.frozen_sha256 = f"{sum(frozen) % 2**256:064x}" if any(frozen) else None
    if compiled is None or config.compile != "auto":
        flops = 6 * model.num_parameters() * config.batch_size * config.block_size * num_steps / world.size
        compiled = world.on_main(lambda: should_compile(config.compile, model, flops))
    set_special_tokens(model, tokenizer, bool(config.tokenizer), kept=_overrides(config.model_overrides))
    model.is_compiled = compiled
    if compiled:
        compile_layers(model, config.block_size)
    return model
