"""The tokenizer, the causal language model, its loss, and the proof that it is causal.

tokenizer = load_tokenizer(config, train_documents)
model = load_model(config, load_config(config, tokenizer)).to(device)    # float32, pretrained or from scratch
check_model(model, tokenizer, block_size=128)          # positions, vocabulary, causality
nll_sum = next_token_nll(model, input_ids, labels)     # summed over the labels that are not -100
"""

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.autograd.function import once_differentiable
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

from config import UserError, find_hub, flag, one_line, require, warn
from data import IGNORED_LABEL, Documents

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SHORT_BLOCK = 128  # tokens, up to which plain attention is the fastest on a CPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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
        if "trust_remote_code" in reason:
            reason, fix = "it needs code of its own, which is never run", "give a model that transformers itself has"
        elif isinstance(error.__cause__ or error, LocalEntryNotFoundError):
            reason, fix = "it is not in the cache, and the Hub cannot be reached", "check id, revision and network"
        elif "named model.safetensors" in reason:
            command = f"from transformers import pipeline as p; p('text-generation', '{name}').save_pretrained('safe')"
            fix = f'a pytorch_model.bin can run code and is never read: convert it once with python -c "{command}"'
        raise UserError(f"{source}: no {what} can be loaded from it ({reason}); {fix}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(config: ModelConfig, documents: Documents) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, or trains one on ``documents`` (the training part, never what is held out)."""
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


def load_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's config with the overrides; for a model from scratch it fits a tokenizer that was chosen for it."""
    name, flag_name = (config.model, "--model") if config.model else (config.model_config, "--model_config")
    overrides = _overrides(config.model_overrides)
    if config.model_config and config.tokenizer:  # a config knows only the tokenizer that it was published with
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        fitting = {"vocab_size": len(tokenizer)} | {key: getattr(tokenizer, key) for key in special}
        overrides = fitting | overrides
    with _loading(f"{flag_name} {name}", "model config", "check it and --model_overrides"):
        settings, unknown = AutoConfig.from_pretrained(
            name, revision=config.model_revision, return_unused_kwargs=True, trust_remote_code=False, **overrides
        )
    require(not unknown, f"--model_overrides: {settings.model_type} has no setting {', '.join(unknown)}; see its docs")
    return settings


def load_model(config: ModelConfig, settings: PreTrainedConfig) -> PreTrainedModel:
    """Returns the model in float32: pretrained, or freshly initialized."""
    if config.model:
        return load_pretrained(config.model, settings, config.model_revision)
    with _loading(f"--model_config {config.model_config}", "causal language model", "check it and --model_overrides"):
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)


def load_pretrained(
    name: str,
    settings: PreTrainedConfig | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,  # transformers 5 would load in the checkpoint's own
) -> PreTrainedModel:
    """Loads weights from safetensors alone: a pickle can run code. What is trained is float32; see `DTYPES`."""
    fix = "give a Hub id or a directory with config.json and model.safetensors"
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
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def next_token_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, reduction: Literal["sum", "none"] = "sum"
) -> torch.Tensor:
    """Negative log-likelihood in nats of each label given the tokens before it, in float32: summed, or one by one.

    input_ids and labels are (batch, sequence), not shifted; labels of -100 are skipped. The model's own ``labels=``
    loss is never used: it is a mean, which accumulation cannot add up, and ten architectures forget the shift. Where
    logits are nothing but hidden states times the head's weights, they never exist as a whole.
    """
    head = plain_head(model) if reduction == "sum" or not torch.is_grad_enabled() else None
    device = input_ids.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.half:
        head = None  # its gradients would be made before the GradScaler can keep them within the range of float16
    bare_head = in_place_of(head, lambda hidden: hidden) if head else nullcontext()
    with never_packed(), attention_kernel(input_ids), bare_head:
        logits = model(input_ids=input_ids, use_cache=False).logits  # (batch, sequence, vocabulary), or hidden states
    if head is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # shifting labels spares a copy of the logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction
        )
    operands = logits[:, :-1].flatten(0, 1), head.weight, head.bias, labels[:, 1:].flatten()
    if torch.is_grad_enabled():
        return LinearCrossEntropy.apply(*operands)
    nll = linear_cross_entropy(*operands)[0]
    return nll.sum() if reduction == "sum" else nll


def count_predicted(labels: torch.Tensor) -> int:
    """The number of labels that `next_token_nll` sums over: the first token of a block has nothing to predict it."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def attention_kernel(input_ids: torch.Tensor) -> AbstractContextManager:
    """The kernel that is fastest: on a CPU, flash attention's backward pass in bfloat16 is slow for short blocks."""
    device, length = input_ids.device.type, input_ids.shape[1]
    plain = device == "cpu" and length <= SHORT_BLOCK and torch.is_grad_enabled() and torch.is_autocast_enabled(device)
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


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
        training = model.training
        model.eval()
        with torch.no_grad(), in_place_of(head, lambda _: known.clone()):
            model.has_plain_head = torch.equal(model(input_ids=ids, use_cache=False).logits, known)
        model.train(training)
    return head if model.has_plain_head else None


def largest_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that a model is stacked from: the list of modules with most parameters, or else the model itself."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[model]))


def flops_per_token(model: PreTrainedModel, block_size: int) -> float | None:
    """Arithmetic of a forward and backward pass: 6 N + 12 L H Q T of PaLM (Chowdhery et al. 2022, appendix B).

    N are all parameters, L the layers, H the heads, Q their width, T the block size. None for a mixture of experts, of
    which only a part is at work, and for layers of which only some attend to all that came before.
    """
    config = model.config.get_text_config(decoder=True)
    values = config.to_dict()
    layers, heads, width, head_width = (
        values.get(config.attribute_map.get(name, name))
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim")
    )
    mixed = set(values.get("layer_types") or ()) - {"full_attention"} or any("experts" in name for name in values)
    if mixed or not isinstance(layers, int):
        return None
    attention = 12 * layers * heads * (head_width or width / heads) * block_size if isinstance(heads, int) else 0
    return 6 * model.num_parameters() + attention


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of `linear_cross_entropy`, whose gradients are made together with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        nll, *gradients = linear_cross_entropy(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if gradient is None else gradient.mul_(grad) for gradient in ctx.saved_tensors), None


@torch.no_grad()
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    wanted: Sequence[bool] = (False, False, False),
    chunk: int = 1024,
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The cross-entropy (tokens,) in nats of logits ``hidden @ weight.T + bias``, and the gradients of its sum.

    hidden is (tokens, width), weight (vocabulary, width), bias (vocabulary,) or None, targets (tokens,), of which -100
    counts nothing; gradients that are not ``wanted`` are None. Logits exist for ``chunk`` tokens at a time; a CPU makes
    them ``tile`` columns at a time, which are still in its cache when their exponentials are taken. Softmax is a tile's
    softmax times exp(tile_logsumexp - logsumexp); this second factor goes to the narrow operands of the products.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    tile = tile or (8192 if device == "cpu" else len(weight))
    tiles = weight.to(dtype).split(tile)
    nll = torch.empty(len(targets), device=hidden.device)
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    empty = torch.empty_like if len(targets) else torch.zeros_like  # the first chunk writes it, later ones add to it
    d_weight = empty(weight) if wanted[1] else None
    d_bias = torch.zeros_like(bias) if wanted[2] else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        states, known, target = hidden[rows], targets[rows, None] != IGNORED_LABEL, targets[rows, None].clamp_min(0)
        operand, target_logit = states.to(dtype), torch.zeros((), device=hidden.device)
        softmaxes, places, tops, totals = [], [], [], []
        for i, columns in enumerate(tiles):
            logits = operand @ columns.T  # (chunk, tile)
            if bias is not None:
                logits += bias[i * tile : (i + 1) * tile]
            place = (target - i * tile).clamp(0, len(columns) - 1)  # of the target, if this tile holds it
            places.append((place, target == place + i * tile))
            target_logit = torch.where(places[-1][1], logits.gather(1, place).float(), target_logit)
            softmax = logits.softmax(1, dtype=torch.float32)
            tops.append(logits.amax(1, keepdim=True).float())
            totals.append(1 / softmax.amax(1, keepdim=True))  # of exp(logits - top)
            if any(wanted):
                softmaxes.append(softmax.to(dtype))
        tops = torch.cat(tops, 1)  # (chunk, number of tiles)
        largest = tops.amax(1, keepdim=True)
        tile_logsumexp = tops - largest + torch.cat(totals, 1).log()
        logsumexp = tile_logsumexp.logsumexp(1, keepdim=True)  # like the tiles', less the largest logit
        log_probability = target_logit - largest - logsumexp
        nll[rows] = (-log_probability * known).squeeze(1)
        if not any(wanted):
            continue
        factors = (tile_logsumexp - logsumexp).clamp_min(-60).exp()  # what is less counts nothing, and divides below
        for i, (columns, softmax, (place, holds)) in enumerate(zip(tiles, softmaxes, places, strict=True)):
            factor = factors[:, i : i + 1]
            # Where a model is sure, probability - 1 is tiny: it has to be made before anything is rounded.
            error = (torch.expm1(log_probability) / factor).to(dtype)
            softmax.scatter_(1, place, torch.where(holds, error, softmax.gather(1, place)))
            factor = factor * known
            if d_hidden is not None:
                d_hidden[rows].addcmul_(softmax @ columns, factor)
            if d_weight is not None:
                part = d_weight[i * tile : (i + 1) * tile]
                (part.add_ if start else part.copy_)(softmax.T @ (states * factor).to(dtype))
            if d_bias is not None:
                d_bias[i * tile : (i + 1) * tile] += (softmax * factor).sum(0)
    return nll, None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Raises UserError unless the model can hold the blocks and the vocabulary, and is causal."""
    limit, rows = position_limit(model), model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    fits, largest_fits = limit is None or block_size <= limit, largest < rows
    require(fits, f"--block_size {block_size}: {model.config.model_type} holds at most {limit} positions; lower it")
    held = f"its largest id is {largest}, but the model's embedding has {rows} rows"
    require(largest_fits, f"tokenizer {tokenizer.name_or_path}: {held}; use the tokenizer that belongs to the model")
    check_causal(model, block_size)


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
    training = model.training
    model.eval()
    earlier, same = (
        model(input_ids=probe.to(model.device), use_cache=False).logits[:, :half].float() for probe in (ids, other)
    )
    model.train(training)
    leak = (earlier - same).abs().max() / earlier.abs().max().clamp_min(1e-6)
    if not leak <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
        raise UserError(
            f"{model.config.model_type} is not causal here: changing later tokens moves earlier logits by {leak:.1e} "
            f"of their size, so its loss would be worthless; make it a decoder with "
            f"--model_overrides '{{\"is_decoder\": true}}', or choose a causal architecture"
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
