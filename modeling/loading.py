"""Load configs, tokenizers, models and adapters, with one-line errors. Hub ids take @revision."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from cli.errors import UserError, require, root_cause, warn
from cli.hub import find_hub, split_revision
from modeling.architectures import DROPPED, generate_as_trained, make_causal

WEIGHTS_FIX = "Use a Hub id, or a directory with config.json and model.safetensors."


@contextmanager
def loading(source: str, what: str, fix: str) -> Iterator[None]:
    """Turn the errors of the libraries into a UserError of one line.

    ``source`` is a flag and its value, ``what`` is loaded from it, and ``fix`` is a sentence that says what to do.
    """
    flag_name, _, name = source.partition(" ")
    name, _ = split_revision(name, flag_name)
    if not os.path.exists(name):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            problem = f"no such path, and not a Hub id ({root_cause(error)})"
            raise UserError(f"{source}: {problem}. Use a directory or a Hub id.") from error
        find_hub()
    try:
        yield
    except Exception as error:  # for a broken file the libraries raise anything, the plain Exception included
        reason = root_cause(error)
        kind = re.search(r"model type `([\w-]+)`", reason)
        if kind and kind[1] in DROPPED:
            reason = f"transformers has dropped {kind[1]}; 4.57.6 was its last release with it"
            fix = "Use another model."
        elif "trust_remote_code" in reason:
            reason, fix = "it needs its own code, which is never run", "Use a model that transformers itself has."
        elif isinstance(error.__cause__ or error, LocalEntryNotFoundError):
            reason, fix = "it is not in the cache, and the Hub cannot be reached", "Use another id or fix the network."
        elif "attn_implementation" in reason or "FlashAttention" in reason:
            fix = "Use another --attn_implementation or remove it."
        elif "named model.safetensors" in reason:
            command = f"from transformers import pipeline as p; p('text-generation', '{name}').save_pretrained('safe')"
            reason = f"{reason}; a pytorch_model.bin can run code and is never read"
            fix = f'Run python -c "{command}" to convert it.'
        raise UserError(f"{source}: no {what} can be loaded from it ({reason}). {fix}") from error


def load_tokenizer_by_name(name: str, flag_name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a Hub id (with an optional @revision) or a directory.

    Raise UserError, which begins with ``flag_name`` and ``name``, if there is none.
    """
    repo_id, revision = split_revision(name)
    fix = "Use a directory or Hub id with tokenizer.json, or in train.py --tokenizer."
    with loading(f"{flag_name} {name}", "tokenizer", fix):
        tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision, trust_remote_code=False)
    # If its vocabulary file is missing, a tokenizer loads without an error, with its special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{flag_name} {name}: there is no tokenizer in it. {fix}")
    return tokenizer


def read_config(name: str, flag_name: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return the model config of a Hub id (with an optional @revision), a directory or a JSON file.

    ``overrides`` replace its settings. Raise UserError, which begins with ``flag_name`` and ``name``, if that fails.
    """
    repo_id, revision = split_revision(name)
    with loading(f"{flag_name} {name}", "model config", "Use another config or other --model_overrides."):
        settings, unknown = AutoConfig.from_pretrained(
            repo_id, revision=revision, return_unused_kwargs=True, trust_remote_code=False, **overrides
        )
    named = ", ".join(unknown)
    require(not unknown, f"--model_overrides: {settings.model_type} has no setting {named}. Remove {named}.")
    return settings


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Put the weights of models that are made here on device meta, without memory. Buffers keep their values."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def load_pretrained(
    name: str, settings: PreTrainedConfig | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the model of a Hub id (with an optional @revision) or a directory, on the CPU in ``dtype``.

    ``settings`` replaces its config. For an adapter that peft saved, the base model is loaded first. Only safetensors
    are read, because a pickle can run code. Raise UserError if there is no such model.
    """
    repo_id, revision = split_revision(name)
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        adapter = find_adapter_config_file(repo_id, revision=revision)
    if adapter:
        return _load_adapter(name, Path(adapter), dtype)
    if settings is None:
        settings = read_config(name, "--model", {})
        make_causal(settings)
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        model, report = AutoModelForCausalLM.from_pretrained(
            repo_id,
            config=settings,
            revision=revision,
            dtype=dtype,  # the default of transformers 5 is the dtype of the checkpoint
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    for key, held, expected in report["mismatched_keys"]:
        shapes = f"{list(held)} in the weights, but {list(expected)} by config.json"
        raise UserError(f"--model {name}: {key} is {shapes}. {WEIGHTS_FIX}")
    if missing := sorted(report["missing_keys"]):
        warn(f"{name} lacks {len(missing)} weights, now newly initialized: {', '.join(missing[:4])} ...")
    model.name_or_path = name  # an adapter records the revision of its base model
    generate_as_trained(model)
    return model


def find_rows(model: PreTrainedModel, name: str) -> Callable[[], None] | None:
    """Return a function that fills the weights of ``model``, when it is sharded, with the rows that each rank holds.

    ``model`` is empty, and ``name`` a Hub id or a directory. Return None if its files do not hold the weights as they
    are: if transformers would convert, initialize, tie or untie some of them.
    """
    repo_id, revision = split_revision(name)
    held: dict[str, tuple[str, list[int]]] = {}
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        if find_adapter_config_file(repo_id, revision=revision):
            return None
        missing = {"_raise_exceptions_for_missing_entries": False}
        files = [cached_file(repo_id, SAFE_WEIGHTS_NAME, revision=revision, **missing)]
        if index := files[0] is None and cached_file(repo_id, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **missing):
            files, _ = get_checkpoint_shard_files(repo_id, index, revision=revision)
        for file in filter(None, files):
            with safe_open(file, "pt") as content:
                held |= {key: (file, content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118

    prefix, places = f"{model.base_model_prefix}.", {}
    once = {key for key, _ in chain(model.named_parameters(), model.named_buffers())}
    for key, tensor in model.state_dict().items():
        stored = key if key in held else key.removeprefix(prefix)
        file, shape = held.get(stored, (None, None))
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
        with suppress(OSError):  # most models on the Hub have one
            repo_id, revision = split_revision(name)
            model.generation_config = GenerationConfig.from_pretrained(repo_id, revision=revision)
    generate_as_trained(model)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return this rank's rows of a tensor, and the number of the first of them.

    The tensor is sharded in dimension 0, or not sharded: then all its rows are returned.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    rows_per_rank = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(len(tensor), rows_per_rank * tensor.device_mesh.get_local_rank())


def _load_adapter(name: str, config_file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model of an adapter with the adapter in it. ``config_file`` is its adapter_config.json."""
    peft = import_peft(f"--model {name}")
    repo_id, revision = split_revision(name)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    base, base_revision = config.get("base_model_name_or_path"), config.get("revision")
    require(bool(base), f"--model {name}: adapter_config.json has no base_model_name_or_path. Set it to a model.")
    model = load_pretrained(f"{base}@{base_revision}" if base_revision else base, dtype=dtype)
    fix = "Use a directory with adapter_config.json and adapter_model.safetensors."
    with loading(f"--model {name}", "adapter", fix):
        weights = load_file(cached_file(repo_id, "adapter_model.safetensors", revision=revision))
        conversions = vars(model).get("_weight_conversions")
        model.load_adapter(peft_config=peft.PeftConfig.from_pretrained(config_file.parent), adapter_state_dict=weights)
        model._weight_conversions = conversions  # the adapter's would rename the weights of the model when it is saved
    return model


def import_peft(source: str) -> Any:
    """Return the module peft. Raise UserError, which begins with ``source``, if it is not installed."""
    try:
        import peft
    except ImportError as error:
        fix = "Run pip install -r requirements-lora.txt."
        raise UserError(f"{source}: an adapter needs peft, which is not installed. {fix}") from error
    return peft


def materialize(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module to ``device``. A weight on device meta gets uninitialized memory, a tied weight only once."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                made.setdefault(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
                setattr(part, name, made[parameter])
    module.to(device)
