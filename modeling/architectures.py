"""What is particular to an architecture: how it becomes causal, its positions, its layers, its arithmetic."""

import math
import warnings
from collections.abc import Collection

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from cli.errors import require, warn

ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # which are decoders only where their config says so
# What transformers 5 no longer has; its last release with them was 4.57.6.
DROPPED = ("mega", "open-llama", "qdqbert", "speech_to_text_2", "transfo-xl", "xlm-prophetnet")


@torch.no_grad()
def needs_padding(settings: PreTrainedConfig) -> bool:
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


def make_causal(settings: PreTrainedConfig, kept: Collection[str] = (), new_block_size: int | None = None) -> list[str]:
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


def generate_as_trained(model: PreTrainedModel) -> None:
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


def layer_stacks(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """What a model is stacked from: its lists of modules, less those within others, with most weights first."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [list(layers) for layers in sorted(outer, key=num_weights, reverse=True)]


def transformer_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the largest stack, or else the model itself."""
    return next(iter(layer_stacks(model)), [model])


def num_weights(module: torch.nn.Module) -> int:
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


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens a sequence may have, or None where the architecture sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding id on, which costs padding_idx + 1 of them.
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit or module.num_embeddings, module.num_embeddings - module.padding_idx - 1)
    return limit if limit and limit > 0 else None
