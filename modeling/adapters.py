"""Adapters, through peft: attach, load, save and merge them.

peft replaces layers of the model in place, so the model keeps its class and the names of its weights. peft's wrapper
saves and merges adapters. It is an attribute of the model.
"""

import re
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cli.errors import UserError, root_cause

PREFIX = "base_model.model."  # the start of the names of weights in an adapter


def import_peft(source: str) -> Any:
    """Return the module peft. Raise UserError, which begins with ``source``, if it is not installed."""
    try:
        import peft
    except ImportError as error:
        fix = "Run pip install -r requirements-lora.txt."
        raise UserError(f"{source}: an adapter needs peft, which is not installed. {fix}") from error
    return peft


def attach(model: PreTrainedModel, config: Any) -> Any:
    """Add the adapter that a peft config describes to the layers of ``model``, in place. Return peft's wrapper."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft itself corrects the faults, such as GPT-2's transposed weights
        wrapper = import_peft("an adapter").get_peft_model(model, config)
    vars(model)["adapter"] = wrapper  # an attribute: the wrapper contains the model, so it is no submodule
    return wrapper


def adapter_of(model: PreTrainedModel) -> Any | None:
    """Return peft's wrapper of a model with an adapter, or None."""
    return vars(model).get("adapter")


def load_adapter(model: PreTrainedModel, directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Add the adapter of a directory, with its weights, to its base model, in place.

    The embeddings are resized if the adapter was made for another number of tokens. Raise ValueError if the adapter
    has parts outside of layers, or if weights are missing or left over.
    """
    peft = import_peft("an adapter")
    config = peft.PeftConfig.from_pretrained(directory, inference_mode=True)
    embedding = next(name for name, layer in model.named_modules() if layer is model.get_input_embeddings())
    tokens = config.to_dict().get("trainable_token_indices") or []
    tokens = tokens.values() if isinstance(tokens, dict) else [tokens]
    saved, held = weights.get(f"{PREFIX}{embedding}.weight"), len(model.get_input_embeddings().weight)
    num_rows = max(held, 1 + max(chain(*tokens), default=0)) if saved is None else len(saved)
    if num_rows != held:
        model.resize_token_embeddings(num_rows, mean_resizing=False)  # the adapter has the new rows
    # With a resized embedding peft saves some layers three times.
    twice = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
    weights = {key: t for key, t in weights.items() if twice.sub("", key) == key or twice.sub("", key) not in weights}
    ours = {*model.parameters()}
    wrapper = attach(model, config)
    forward = peft.tuners.tuners_utils.BaseTuner.forward
    if type(wrapper.base_model).forward is not forward or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(f"an adapter of type {_type_of(config)} changes more than layers")
    new = {name: parameter for name, parameter in wrapper.named_parameters() if parameter not in ours}
    for parameter in new.values() if model.dtype == torch.float32 else ():
        parameter.data = parameter.data.float()  # a layer that is trained as a whole is a copy, perhaps in bfloat16
    result = peft.set_peft_model_state_dict(wrapper, weights)
    if wrong := [*result.unexpected_keys, *(new.keys() & {*result.missing_keys})]:
        raise ValueError(f"weights of the adapter are missing or left over: {', '.join(sorted(wrong)[:3])}")


def save_adapter(model: PreTrainedModel, directory: Path, trained: dict[str, torch.Tensor] | None = None) -> None:
    """Save the adapter of ``model`` in the format of peft.

    ``trained`` maps the names of the trained weights to whole tensors. It is needed if the model is sharded. If base
    and adapter are below the working directory, the base's path is ./relative. Such a path is never read as a Hub id.
    """
    config, here = adapter_of(model).active_peft_config, Path.cwd()
    base = Path(config.base_model_name_or_path).absolute()
    if base.exists():
        is_below = base.is_relative_to(here) and directory.absolute().is_relative_to(here)
        config.base_model_name_or_path = f"./{base.relative_to(here)}" if is_below else str(base)
    state = trained and {PREFIX + name: tensor for name, tensor in trained.items()}
    adapter_of(model).save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    model.generation_config.save_pretrained(directory)  # its end-of-text tokens may differ from the base model's


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Merge the adapter of ``model``, if it has one, into its weights, and cast them to ``dtype``, in place.

    Each layer is merged in float32 and then cast, so that no second model is in memory. Weights that transformers keeps
    in float32 stay so. Raise UserError if peft cannot merge this type of adapter.
    """
    if adapter_of(model):
        _merge(model, dtype)
    kept = (*(getattr(model, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict")),)
    is_kept = re.compile(rf"(^|\.)({'|'.join(chain(*kept))})($|\.)").search if any(kept) else lambda name: None
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if is_kept(name) else dtype)


def _merge(model: PreTrainedModel, dtype: torch.dtype) -> None:
    layer_type = import_peft("merging an adapter").tuners.tuners_utils.BaseTunerLayer
    wrapper, merged = vars(model).pop("adapter"), set()
    # Embedding and head may share one matrix. If one of them is adapted, the merged model has two.
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    adapted = [layer for layer in layers if isinstance(layer, layer_type)]
    if adapted:
        adapted[0].get_base_layer().weight = torch.nn.Parameter(adapted[0].get_base_layer().weight.clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    try:
        for layer in [*wrapper.modules()]:
            if isinstance(layer, layer_type) and layer not in merged:
                layer.float()
                parts = [part for part in layer.modules() if isinstance(part, layer_type)]  # one for each parameter
                for part in parts:
                    part.merge()
                layer.to(dtype)
                merged |= {*parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers that are merged already, or an embedding that is no longer tied
            wrapper.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        problem = f"an adapter of type {_type_of(wrapper.active_peft_config)} cannot be merged ({root_cause(error)})"
        raise UserError(f"--model: {problem}. Use a LoRA adapter.") from error


def _type_of(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)
