"""Properties of an architecture: its switches to become causal, its positions, its layers, its arithmetic."""

import math
import re
import warnings
from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from cli.errors import require, warn

ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # decoders only if their config says so
# transformers 5 has dropped these architectures. 4.57.6 was the last release with them.
DROPPED = ("mega", "open-llama", "qdqbert", "speech_to_text_2", "transfo-xl", "xlm-prophetnet")
WINDOW = re.compile(r"(window(_size|_len)?|att(entio)?n_chunk_(size|length)|local_attention)$")

Checkpointing = Literal["off", "full", "selective"]
# Most of a layer's arithmetic. Batched products are left out, because eager attention computes its scores with them.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
PRODUCTS += [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]


@torch.no_grad()
def needs_padding(settings: PreTrainedConfig) -> bool:
    """Return whether the model fails without a padding id. RoBERTa's family counts positions from it."""
    if getattr(type(settings)(), "pad_token_id", None) is None:
        return False
    options = {"attn_implementation": None, "trust_remote_code": False}  # a config may name a kernel of the Hub
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(settings, **options)(input_ids=torch.zeros(1, 2).long())
    except (TypeError, AttributeError):
        return True
    except Exception:  # an operation needs data, or there is another fault: loading the real model reports it
        return False
    return False


def make_causal(settings: PreTrainedConfig, kept: Collection[str] = (), new_block_size: int | None = None) -> list[str]:
    """Change the settings that let a token attend to later tokens, in place, and return their names.

    The settings named in ``kept`` do not change. ``new_block_size`` is the block size in tokens of a model from
    scratch, or None for a pretrained model.
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
    # Reformer's hashing attends to later tokens, and in training its positions must fill a block.
    if kind == "reformer" and new_block_size:
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


def generate_as_trained(model: PreTrainedModel) -> None:
    """Make XLNet and XLM predict from the last token, as in training. Their own code appends a mask token.

    They get no attention mask, because XLNet cannot batch it. So only prompts of one length share a batch.
    """
    if model.config.model_type in ("xlnet", "xlm"):
        model.prepare_inputs_for_generation = lambda input_ids, attention_mask=None, **_: {"input_ids": input_ids}


def recompute_activations(model: PreTrainedModel, choice: str = "full") -> None:
    """Switch gradient checkpointing on. Layers keep only their inputs, and with "selective" also their PRODUCTS.

    Raise UserError if the model does not support it.
    """
    unsupported = f"--gradient_checkpointing {choice}: {model.config.model_type} does not support it. Remove it."
    require(model.supports_gradient_checkpointing, unsupported)
    options: dict[str, Any] = {"use_reentrant": False}
    if choice == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, PRODUCTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older transformers do not have the new name
        model.gradient_checkpointing_enable(options)
    model.recomputes = True


def layer_stacks(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Return the outermost lists of modules of a model, the one with the most weights first."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [list(layers) for layers in sorted(outer, key=num_weights, reverse=True)]


def transformer_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of the largest stack, or the model itself if it has no stack."""
    return next(iter(layer_stacks(model)), [model])


def num_weights(module: torch.nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def num_rows(model: PreTrainedModel) -> int:
    """Return the number of tokens that the embedding holds, even if peft wraps it."""
    return len(model.get_input_embeddings().weight)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the largest sequence length in tokens, or None if the architecture sets no limit."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # max_seq_len: MPT
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding id on. ProphetNet embeds one position after the last one.
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None:
            unused = module.padding_idx + 1 + (config.model_type == "prophetnet")
            limit = min(limit or module.num_embeddings, module.num_embeddings - unused)
    return limit if limit and limit > 0 else None


def smallest_window(model: PreTrainedModel) -> int | None:
    """Return the smallest number of tokens that a layer attends to, or None if the config names no window."""
    values = model.config.get_text_config(decoder=True).to_dict().items()
    return min((size for name, size in values if WINDOW.search(name) and type(size) is int and size > 0), default=None)
