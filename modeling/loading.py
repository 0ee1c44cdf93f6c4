"""Load configs, tokenizers, models and adapters, with one-line errors."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from cli.errors import UserError, require, root_cause, warn
from cli.hub import find_hub
from modeling.architectures import DROPPED, generate_as_trained, make_causal


@contextmanager
def loading(source: str, what: str, fix: str) -> Iterator[None]:
    """Turns what the libraries raise over ``source``, a flag and its value, into a UserError."""
    name = source.partition(" ")[2]
    if not os.path.exists(name):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{source}: no such path, and no Hub id ({root_cause(error)}); check it") from error
        find_hub()
    try:
        yield
    except Exception as error:  # over a broken file they raise anything, the plain Exception included
        reason = root_cause(error)
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


def load_tokenizer_by_name(name: str, flag_name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    fix = "check it, or give --tokenizer: a Hub id, a local directory, or train:8192"
    with loading(f"{flag_name} {name}", "tokenizer", fix):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    # Without its vocabulary file a tokenizer loads silently, with its special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{flag_name} {name}: there is no tokenizer in it; give --tokenizer: a Hub id or train:8192")
    return tokenizer


def read_config(name: str, flag_name: str, revision: str | None, overrides: dict[str, Any]) -> PreTrainedConfig:
    with loading(f"{flag_name} {name}", "model config", "check it and --model_overrides"):
        settings, unknown = AutoConfig.from_pretrained(
            name, revision=revision, return_unused_kwargs=True, trust_remote_code=False, **overrides
        )
    require(not unknown, f"--model_overrides: {settings.model_type} has no setting {', '.join(unknown)}; see its docs")
    return settings


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
    with loading(f"--model {name}", "causal language model", fix):
        adapter = find_adapter_config_file(name, revision=revision)
    if adapter:
        return _load_adapter(name, Path(adapter), revision, dtype)
    if settings is None:
        settings = read_config(name, "--model", revision, {})
        make_causal(settings)
    with loading(f"--model {name}", "causal language model", fix):
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
    generate_as_trained(model)
    return model


def _load_adapter(name: str, config_file: Path, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    peft = import_peft(f"--model {name}: is an adapter")
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    require(bool(base), f"--model {name}: its adapter_config.json names no base_model_name_or_path; mend it")
    model = load_pretrained(base, dtype=dtype)
    with loading(f"--model {name}", "adapter", "give a directory with adapter_config.json and its safetensors"):
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
