"""Save a model that is sharded over several ranks, one layer at a time."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling.adapters import adapter_of, save_adapter

FILE_SIZE = "2GB"  # at most, unless one tensor is larger


def save_sharded(model: PreTrainedModel, directory: Path, full_tensor: Callable, writes: bool) -> None:
    """Write the files that ``model.save_pretrained`` writes in one process. All ranks must call this; one ``writes``.

    ``full_tensor`` returns a whole tensor on the rank that writes, and None on the other ranks. The rank that writes
    holds one file and one layer at a time. It raises a disk error only after all ranks have sent the last tensor.
    """
    if adapter_of(model):
        trained = {name: full_tensor(p) for name, p in model.named_parameters() if p.requires_grad}
        return save_adapter(model, directory, trained) if writes else None

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    empty = remove_tied_weights_from_state_dict(empty, model)
    converted = revert_weight_conversion(model, empty)
    converted = {name: torch.empty_like(tensor) for name, tensor in converted.items()}  # views would count as a whole
    parts = _independent_parts(model, empty, converted)
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(converted, filename_pattern=pattern, max_shard_size=FILE_SIZE)
    files = {name: set(names) for name, names in split.filename_to_tensors.items()}

    failure, held = None, {}
    try:
        if writes:
            model.save_pretrained(directory, state_dict={})  # all files but the weights
    except Exception as error:
        failure = error
    for part in parts:
        tensors = {name: full_tensor(state[name]) for name in part}
        try:
            if writes and not failure:
                held |= {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}
                for file in [file for file, names in files.items() if names <= held.keys()]:
                    save_file({name: held.pop(name) for name in files.pop(file)}, directory / file, {"format": "pt"})
        except Exception as error:
            failure = error
    if failure:
        raise failure
    if writes and split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _independent_parts(
    model: PreTrainedModel, empty: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]
) -> list[list[str]]:
    """Return the names layer by layer, or in one part if a saved tensor is made of weights of several layers."""
    layers: dict[str, list[str]] = {}
    for name in empty:
        layer = re.match(r".*?\.\d+\.", name)
        layers.setdefault(layer.group() if layer else name, []).append(name)
    apart: dict[str, torch.Tensor] = {}
    for names in layers.values():
        apart |= revert_weight_conversion(model, {name: empty[name] for name in names})
    shapes, expected = ({name: tensor.shape for name, tensor in made.items()} for made in (apart, converted))
    return list(layers.values()) if shapes == expected else [list(empty)]
