"""Fill an empty model with the rows of each weight that a rank holds, and compare frozen weights between runs."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from cli.hub import split_revision
from modeling.architectures import generate_as_trained
from modeling.loading import WEIGHTS_FIX, find_adapter, loading, stored_tensors


def materialize(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module to ``device``. Tensors on device meta get uninitialized memory; tied weights share it."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                made.setdefault(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
                setattr(part, name, made[parameter])
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(part, name, torch.empty_like(buffer, device=device))
    module.to(device)


def find_rows(model: PreTrainedModel, name: str) -> Callable[[], None] | None:
    """Return a function that fills each rank's rows of the weights, after ``model`` is sharded.

    ``model`` is empty, and ``name`` is a Hub id or a directory. Return None if transformers would convert, initialize,
    tie or untie weights from its files.
    """
    if find_adapter(name)[0]:
        return None
    held, places, prefix = stored_tensors(name), {}, f"{model.base_model_prefix}."
    once = {key for key, _ in chain(model.named_parameters(), model.named_buffers())}
    for key, tensor in model.state_dict().items():
        stored = key if key in held else key.removeprefix(prefix)
        file, shape, _ = held.get(stored, (None, None, None))
        if (shape == list(tensor.shape)) != (key in once):
            return None
        places |= {key: (file, stored)} if key in once else {}
    converts = any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model, add_legacy=False))
    return None if converts or hasattr(model.config, "quantization_config") else partial(_read, model, name, places)


@torch.no_grad()
def _read(model: PreTrainedModel, name: str, places: dict[str, tuple[str, str]]) -> None:
    """Fill this rank's rows of each weight. ``places`` maps a weight's name to its file and its name in the file."""
    state = model.state_dict()
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        for key, (file, stored) in places.items():
            rows, first = local_rows(state[key])
            with safe_open(file, "pt") as content:
                whole = content.get_slice(stored)
                rows.copy_(whole[first : first + len(rows)] if rows.ndim else whole[...])
        with suppress(OSError):  # some models have no generation config
            repo_id, revision = split_revision(name)
            model.generation_config = GenerationConfig.from_pretrained(repo_id, revision=revision)
    generate_as_trained(model)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return this rank's rows of a tensor, and the number of the first row.

    The tensor is sharded in dimension 0. If it is not sharded, return all rows.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    rows_per_rank = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(len(tensor), rows_per_rank * tensor.device_mesh.get_local_rank())


def frozen_digest(model: torch.nn.Module) -> int:
    """Return a digest of this rank's rows of the frozen weights, or 0 if all weights are trained.

    Each row is hashed in float32, with its parameter's name and its number. The digest is the sum of these hashes
    modulo 2^256, as in AdHash (Bellare and Micciancio 1997). So the sum over all ranks does not depend on the number
    of shards.
    """
    total = 0
    for name, parameter in model.named_parameters():
        rows, first = local_rows(parameter)
        for number, row in enumerate([] if parameter.requires_grad else torch.atleast_1d(rows), first):
            content = row.float().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            total += int.from_bytes(hashlib.sha256(f"{name} {number} ".encode() + content).digest())
    return total % 2**256
