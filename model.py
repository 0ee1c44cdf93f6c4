"""The tokenizer, the causal language model, its loss, and the proof that it is causal.

tokenizer = load_tokenizer(config, train_documents)
settings = load_config(config, tokenizer, block_size=128)      # made causal where an architecture has to be told
model = load_model(config, settings, tokenizer).to(device)     # float32, pretrained or from scratch
check_model(model, tokenizer, block_size=128)          # positions, vocabulary, causality
nll_sum = next_token_nll(model, input_ids, labels)     # summed over the labels that are not -100
"""

import ctypes
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassFieldValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    masking_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from config import UserError, find_hub, flag, one_line, out_of_memory, require, warn
from data import IGNORED_LABEL
from linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from text import Documents

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SHORT_BLOCK = 128  # tokens, up to which plain attention is the fastest on a CPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # which are decoders only where their config says so
# What transformers 5 no longer has; its last release with them was 4.57.6.
DROPPED = ("mega", "open-llama", "qdqbert", "speech_to_text_2", "transfo-xl", "xlm-prophetnet")

FOUND = ("has_plain_head", "isolated_by", "generation_config")  # attributes that loading and checking a model leave

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


@contextmanager
def _loading(source: str, what: str, fix: str) -> Iterator[None]:
    """Turns what the libraries raise over ``source``, a flag and its value, into a UserError."""
    name = source.partition(" ")[2]
    if not os.path.exists(name):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{source}: no such path, and no Hub id ({one_line(error)}); check it") from error
        find_hub()
    try:
        yield
    except Exception as error:  # over a broken file they raise anything, the plain Exception included
        reason = one_line(error)
        kind = re.search(r"model type `([\w-]+)`", reason)
        if kind and kind[1] in DROPPED:
            reason = f"transformers has dropped {kind[1]}; 4.57.6 was its last release with it"
            fix = "give another model"
        elif "trust_remote_code" in reason:
            reason, fix = "it needs code of its own, which is never run", "give a model that transformers itself has"
        elif isinstance(error.__cause__ or error, LocalEntryNotFoundError):
            reason, fix = "it is not in the cache, and the Hub cannot be reached", "check id, revision and network"
        elif "attn_implementation" in reason or "FlashAttention" in reason:
            fix = "give another --attn_implementation or leave it out"
        elif "named model.safetensors" in reason:
            command = f"from transformers import pipeline as p; p('text-generation', '{name}').save_pretrained('safe')"
            fix = f'a pytorch_model.bin can run code and is never read: convert it once with python -c "{command}"'
        raise UserError(f"{source}: no {what} can be loaded from it ({reason}); {fix}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


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


def load_tokenizer_by_name(name: str, flag_name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    fix = "check it, or give --tokenizer: a Hub id, a local directory, or train:8192"
    with _loading(f"{flag_name} {name}", "tokenizer", fix):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    # Without its vocabulary file a tokenizer loads silently, with its special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{flag_name} {name}: there is no tokenizer in it; give --tokenizer: a Hub id or train:8192")
    return tokenizer


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


# ---------------------------------------------------------------------------------------------------------------------
# Model


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
    settings = _read_config(name, flag_name, config.model_revision, overrides)
    if config.model_config and config.tokenizer:  # a config knows only the tokenizer that it was published with
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        fitting = {"vocab_size": len(tokenizer)} | {key: getattr(tokenizer, key) for key in special}
        for key in fitting.keys() - overrides.keys():
            try:
                setattr(settings, key, fitting[key])
            except StrictDataclassFieldValidationError:  # some have to have a padding id
                setattr(settings, key, tokenizer.eos_token_id)
    changed = _make_causal(settings, kept=overrides, new_block_size=None if config.model else block_size)
    require(not (changed and unchanged), f"{unchanged} {', '.join(changed)}; add --merge_lora")
    settings._attn_implementation = config.attn_implementation
    if config.model_config and getattr(settings, "pad_token_id", 0) is None and _needs_padding(settings):
        settings.pad_token_id = tokenizer.eos_token_id
    return settings


@torch.no_grad()
def _needs_padding(settings: PreTrainedConfig) -> bool:
    """Whether a model does not work without a padding id, from which RoBERTa's family counts its positions."""
    if getattr(type(settings)(), "pad_token_id", None) is None:
        return False
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(settings, trust_remote_code=False)(input_ids=torch.zeros(1, 2).long())
    except (TypeError, AttributeError):
        return True
    except Exception:  # which the real model will raise again, or that it has no data
        return False
    return False


def _read_config(name: str, flag_name: str, revision: str | None, overrides: dict[str, Any]) -> PreTrainedConfig:
    with _loading(f"{flag_name} {name}", "model config", "check it and --model_overrides"):
        settings, unknown = AutoConfig.from_pretrained(
            name, revision=revision, return_unused_kwargs=True, trust_remote_code=False, **overrides
        )
    require(not unknown, f"--model_overrides: {settings.model_type} has no setting {', '.join(unknown)}; see its docs")
    return settings


def _make_causal(
    settings: PreTrainedConfig, kept: Collection[str] = (), new_block_size: int | None = None
) -> list[str]:
    """Changes the settings that let a token see later ones, except those that are to be ``kept``; returns which.

    ``new_block_size`` is that of a model from scratch.
    """
    kind, causal = settings.model_type, {}
    if kind in ENCODERS and getattr(settings, "is_decoder", None) is False and not settings.is_encoder_decoder:
        causal["is_decoder"] = True
    if kind == "big_bird":
        causal["attention_type"] = "original_full"
    if kind == "xlm":
        causal["causal"] = True
    if kind == "xlnet":
        causal["attn_type"] = "uni"
    if kind == "reformer" and new_block_size:  # its hashing looks ahead; in training its positions fill a block
        rows = next(n for n in range(math.isqrt(new_block_size), 0, -1) if new_block_size % n == 0)
        chunk = math.gcd(new_block_size, settings.local_attn_chunk_length)
        causal |= {
            "attn_layers": ["local"] * len(settings.attn_layers),
            "axial_pos_shape": (rows, new_block_size // rows),
            "max_position_embeddings": new_block_size,
            "local_attn_chunk_length": chunk if chunk >= 16 else new_block_size,
        }
    changed = {key: value for key, value in causal.items() if getattr(settings, key) != value and key not in kept}
    for key, value in changed.items():
        setattr(settings, key, value)
    if changed:
        warn(f"{kind} is made causal with {', '.join(f'{key}={value}' for key, value in changed.items())}")
    return list(changed)


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
            _loading(source, "causal language model", "check it and --model_overrides"),
            weights_on_meta() if empty else nullcontext(),
        ):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        _generate_as_trained(model)
    if config.add_tokens:
        added = tokenizer.convert_tokens_to_ids(config.add_tokens)
        if max(added) >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                for rows in layer.parameters():  # weights (vocabulary, width), a bias (vocabulary,)
                    rows[added] = rows[: min(added)].mean(0)
    return model


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Models that are made here take no memory for weights; buffers, which are computed, are as ever."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def load_pretrained(
    name: str,
    settings: PreTrainedConfig | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,  # transformers 5 would load in the checkpoint's own
) -> PreTrainedModel:
    """Loads weights from safetensors alone: a pickle can run code. What is trained is float32; see `DTYPES`.

    Of an adapter that peft saved, the model that it was made for is loaded first.
    """
    fix = "give a Hub id or a directory with config.json and model.safetensors"
    with _loading(f"--model {name}", "causal language model", fix):
        adapter = find_adapter_config_file(name, revision=revision)
    if adapter:
        return _load_adapter(name, Path(adapter), revision, dtype)
    if settings is None:
        settings = _read_config(name, "--model", revision, {})
        _make_causal(settings)
    with _loading(f"--model {name}", "causal language model", fix):
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=settings,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
    for key, held, expected in report["mismatched_keys"]:
        shapes = f"{list(held)} in the weights, but {list(expected)} by config.json"
        raise UserError(f"--model {name}: {key} is {shapes}; {fix}")
    if missing := sorted(report["missing_keys"]):
        warn(f"{name} lacks {len(missing)} weights, now newly initialized: {', '.join(missing[:4])} ...")
    _generate_as_trained(model)
    return model


def _load_adapter(name: str, config_file: Path, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    peft = import_peft(f"--model {name}: is an adapter")
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    require(bool(base), f"--model {name}: its adapter_config.json names no base_model_name_or_path; mend it")
    model = load_pretrained(base, dtype=dtype)
    with _loading(f"--model {name}", "adapter", "give a directory with adapter_config.json and its safetensors"):
        weights = load_file(cached_file(name, "adapter_model.safetensors", revision=revision))
        conversions = vars(model).get("_weight_conversions")
        model.load_adapter(peft_config=peft.PeftConfig.from_pretrained(config_file.parent), adapter_state_dict=weights)
        model._weight_conversions = conversions  # those of the adapter would rename the model's weights in a save
    return model


def import_peft(why: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{why}, which needs peft; install it: pip install -r requirements-lora.txt") from error
    return peft


def _generate_as_trained(model: PreTrainedModel) -> None:
    """XLNet and XLM would put a mask token behind a text and predict from there, which is not what is trained here."""
    if model.config.model_type in ("xlnet", "xlm"):
        model.prepare_inputs_for_generation = lambda input_ids, attention_mask=None, **_: {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }


def recompute_activations(model: PreTrainedModel) -> None:
    """Layers keep only their inputs for the backward pass, and compute the rest a second time there."""
    kind = model.config.model_type
    require(model.supports_gradient_checkpointing, f"--gradient_checkpointing: {kind} is unable to; leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has a newer name, which older transformers do not know
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.recomputes = True


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def next_token_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> torch.Tensor:
    """Negative log-likelihood in nats of each label given the tokens before it, in float32: summed, or one by one.

    input_ids and labels are (batch, sequence), not shifted; labels of -100 are skipped. Where position_ids, of the same
    shape, begin again from 0, another document begins, which sees none of those before it (see `check_isolated`). The
    model's own ``labels=`` loss is never used: it is a mean, which accumulation cannot add up, and ten architectures
    forget the shift. Where logits are nothing but hidden states times the head's weights, they are made in chunks.
    In training, a mixture of experts whose config turns output_router_logits on adds its router's loss.
    """
    head = plain_head(model) if reduction == "sum" or not torch.is_grad_enabled() else None
    device = input_ids.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.half:
        head = None  # its gradients would be made before the GradScaler can keep them within the range of float16
    bare_head = in_place_of(head, lambda hidden: hidden) if head else nullcontext()
    isolation = nullcontext() if position_ids is not None else never_packed()
    with isolation, attention_kernel(model, input_ids), bare_head:
        output = model(input_ids=input_ids, use_cache=False, **isolated(model, position_ids))
    logits = output.logits  # (batch, sequence, vocabulary), or hidden states
    if head is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # shifting labels spares a copy of the logits
        nll = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction
        )
    else:
        operands = logits[:, :-1].flatten(0, 1), head.weight, head.bias, labels[:, 1:].flatten()
        if torch.is_grad_enabled():
            nll = LinearCrossEntropy.apply(*operands)
        else:
            nll = linear_cross_entropy(*operands)[0]
            nll = nll.sum() if reduction == "sum" else nll
    if model.training and (router_loss := getattr(output, "aux_loss", None)) is not None:
        weight = model.config.get_text_config(decoder=True).router_aux_loss_coef
        nll = nll + weight * router_loss * (labels[:, 1:] != IGNORED_LABEL).sum()  # it is a mean, and this a sum
    return nll


def count_predicted(labels: torch.Tensor) -> int:
    """The number of labels that `next_token_nll` sums over: the first token of a block has nothing to predict it."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def attention_kernel(model: PreTrainedModel, input_ids: torch.Tensor) -> AbstractContextManager:
    """The kernel that is fastest: on a CPU, flash attention's backward pass in bfloat16 is slow for short blocks."""
    device, length = input_ids.device.type, input_ids.shape[1]
    short = device == "cpu" and length <= SHORT_BLOCK and torch.is_grad_enabled() and torch.is_autocast_enabled(device)
    # What is recomputed in the backward pass must be what the forward pass has computed, and is not in this context.
    return sdpa_kernel(SDPBackend.MATH) if short and "recomputes" not in vars(model) else nullcontext()


def isolated(model: PreTrainedModel, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What the model has to be called with so that documents in a block do not see each other."""
    if position_ids is None:
        return {}
    positions = {"position_ids": position_ids} if "position_ids" in model.isolated_by else {}
    if "attention_mask" not in model.isolated_by:  # transformers itself makes the mask from them
        return positions
    document = (position_ids == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (batch, 1, sequence, sequence)
    return positions | {"attention_mask": torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)}


@contextmanager
def never_packed() -> Iterator[None]:
    """To see that a block holds no several sequences, transformers would wait for position ids from the device."""
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; the model gets its mode back, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def in_place_of(head: torch.nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def plain_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The output embedding, where it is linear and what it puts out are the logits: no soft cap, no scale after it.

    Looked at once a model: in place of what the head puts out come known values, which have to come through.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not torch.nn.Linear or "forward" in vars(head) or head._forward_hooks:
        return None
    if "has_plain_head" not in vars(model):
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        known = torch.linspace(-1e3, 1e3, ids.numel() * head.out_features, device=ids.device).view(1, 2, -1)
        with torch.no_grad(), evaluating(model), in_place_of(head, lambda _: known.clone()):
            model.has_plain_head = torch.equal(model(input_ids=ids, use_cache=False).logits, known)
    return head if model.has_plain_head else None


def layer_stacks(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """What a model is stacked from: its lists of modules, less those within others, with most weights first."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [list(layers) for layers in sorted(outer, key=_num_weights, reverse=True)]


def largest_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the largest stack, or else the model itself."""
    return next(iter(layer_stacks(model)), [model])


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flops_per_token(model: PreTrainedModel, block_size: int) -> float | None:
    """Arithmetic of a forward and backward pass: 6 N + 12 L H Q T of PaLM (Chowdhery et al. 2022, appendix B).

    N are all parameters, L the layers, H the heads, Q their width, T the block size. None for a mixture of experts, of
    which only a part is at work, for layers of which only some attend to all that came before, and for frozen weights.
    """
    config = model.config.get_text_config(decoder=True)
    values = config.to_dict()
    layers, heads, width, head_width = (
        values.get(config.attribute_map.get(name, name))
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim")
    )
    mixed = set(values.get("layer_types") or ()) - {"full_attention"} or any("experts" in name for name in values)
    if mixed or not isinstance(layers, int) or not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    attention = 12 * layers * heads * (head_width or width / heads) * block_size if isinstance(heads, int) else 0
    return 6 * model.num_parameters() + attention


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    apart: bool = False,
    precision: str = "fp32",
) -> None:
    """Raises UserError unless the model can hold the blocks and the vocabulary, works in the precision, is causal, and
    keeps documents ``apart`` where it has to."""
    limit, rows = position_limit(model), model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    fits, largest_fits = limit is None or block_size <= limit, largest < rows
    require(fits, f"--block_size {block_size}: {model.config.model_type} holds at most {limit} positions; lower it")
    held = f"its largest id is {largest}, but the model's embedding has {rows} rows"
    require(largest_fits, f"tokenizer {tokenizer.name_or_path}: {held}; use the tokenizer that belongs to the model")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), evaluating(model), autocast(model.device, precision):
            next_token_nll(model, ids, ids)
    except RuntimeError as error:
        if precision == "fp32" or out_of_memory(error):
            raise
        fix = "give --precision fp32"
        raise UserError(
            f"--precision {precision}: {model.config.model_type} fails ({one_line(error)}); {fix}"
        ) from error
    check_causal(model, block_size)
    if apart:
        check_isolated(model, block_size)


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens a sequence may have, or None where the architecture sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding id on, which costs padding_idx + 1 of them.
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit or module.num_embeddings, module.num_embeddings - module.padding_idx - 1)
    return limit if limit and limit > 0 else None


@torch.no_grad()
def check_causal(model: PreTrainedModel, block_size: int) -> None:
    """Raises UserError if a later token changes the logits of an earlier one.

    A model that sees the token it has to predict trains to a beautiful and worthless loss.
    """
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (1, block_size), generator=generator)
    half = max(1, block_size // 2)
    other = ids.clone()
    other[:, half:] = (ids[:, half:] + torch.randint(1, rows, (1, block_size - half), generator=generator)) % rows
    with evaluating(model):
        earlier, same = (
            model(input_ids=probe.to(model.device), use_cache=False).logits[:, :half].float() for probe in (ids, other)
        )
    leak = (earlier - same).abs().max() / earlier.abs().max().clamp_min(1e-6)
    if not leak <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
        fix = {
            "cpmant": "it has no causal switch; choose another architecture",
            "reformer": "its hashing looks ahead; train it from scratch, with --model_config",
        }.get(
            model.config.model_type,
            "make it a decoder with --model_overrides '{\"is_decoder\": true}', or choose a causal architecture",
        )
        raise UserError(
            f"{model.config.model_type} is not causal here: changing later tokens moves earlier logits by {leak:.1e} "
            f"of their size, so its loss would be worthless; {fix}"
        )


@torch.no_grad()
def check_isolated(model: PreTrainedModel, block_size: int) -> None:
    """Finds what keeps documents in a block apart: position ids that begin again, or else a block-diagonal mask.

    Raises UserError where a change to one document moves the logits of the next one either way.
    """
    half, rows = max(1, block_size // 2), model.get_input_embeddings().num_embeddings
    ids, other = (torch.randint(rows, (1, 2 * half), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other[:, half:] = ids[:, half:]
    positions = torch.arange(half, device=model.device).repeat(2, 2)  # flash kernels pack where there is one row alone
    # Both only last: RoBERTa's positions do not begin with 0.
    for model.isolated_by in (["position_ids"], ["attention_mask"], ["attention_mask", "position_ids"]):
        try:
            with evaluating(model):
                later, same = (
                    model(
                        input_ids=probe.expand(2, -1).to(model.device), use_cache=False, **isolated(model, positions)
                    ).logits
                    for probe in (ids, other)
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):  # it takes nothing of the kind
            continue
        if (later - same)[:, half:].abs().max() <= 1e-5 * later.abs().max():
            return
    raise UserError(
        f"--pack documents: {model.config.model_type} sees the document before, be it with position ids that begin "
        f"again or with a block-diagonal mask; give --pack stream"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where and in which precision


def select_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Makes a CPU's work faster, at the price of memory that is not given back before the process ends."""
    # Tensors of megabytes are taken from the system and given back with each operation, and to have their pages
    # mapped anew takes longer than most operations.
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """Turns ``auto`` into the fastest precision that the device computes natively: fp32, bf16 or fp16."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: a CPU has no fast float16; give bf16, fp32 or auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which forward passes run; master weights stay float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])
