"""Load configs, tokenizers, models and adapters, with one-line errors. Hub ids take @revision."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from cli.errors import UserError, require, root_cause, warn
from cli.hub import find_hub, split_revision
from modeling.adapters import import_peft, load_adapter
from modeling.architectures import DROPPED, generate_as_trained, make_causal
from modeling.precision import set_dtypes

WEIGHTS_FIX = "Use a Hub id, or a directory with config.json and model.safetensors."
ADAPTER_FIX = "Use an adapter of layers, such as LoRA, with adapter_config.json and adapter_model.safetensors."


@contextmanager
def loading(source: str, what: str, fix: str) -> Iterator[None]:
    """Turn the errors of the libraries into a UserError of one line.

    ``source`` is a flag and its value, ``what`` is loaded from it, and the sentence ``fix`` names the remedy.
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
    except Exception as error:  # for a broken file the libraries raise any class, even a plain Exception
        reason = root_cause(error)
        kind = re.search(r"model type `([\w-]+)`", reason)
        if kind and kind[1] in DROPPED:
            reason = f"transformers has dropped {kind[1]}; 4.57.6 was its last release with it"
            fix = "Use another model."
        elif "trust_remote_code" in reason:
            reason, fix = "it needs its own code, which is never run", "Use a model that transformers itself has."
        elif isinstance(error.__cause__ or error, LocalEntryNotFoundError):
            reason = "there is no such directory, it is not in the cache, and the Hub cannot be reached"
            fix = "Use another directory or id, or fix the network."
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
    if attention := getattr(settings, "_attn_implementation", None):
        warn(f"{name}: attn_implementation {attention} in its config is not used")
    return settings


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Put the weights of models made in this context on device meta, without memory. Buffers keep their values."""

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # registered unchanged, so that tied weights stay one tensor
        return torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


def stored_tensors(name: str) -> dict[str, tuple[str, list[int], str]]:
    """Return file, shape and dtype, such as "BF16", of each tensor in the safetensors of a Hub id or a directory."""
    repo_id, revision = split_revision(name)
    missing, held = {"_raise_exceptions_for_missing_entries": False}, {}
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        files = [cached_file(repo_id, SAFE_WEIGHTS_NAME, revision=revision, **missing)]
        if index := files[0] is None and cached_file(repo_id, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **missing):
            files, _ = get_checkpoint_shard_files(repo_id, index, revision=revision)
        for file in filter(None, files):
            with safe_open(file, "pt") as content:
                for key in content.keys():  # noqa: SIM118
                    tensor = content.get_slice(key)
                    held[key] = file, tensor.get_shape(), tensor.get_dtype()
    return held


def stored_dtype(name: str) -> torch.dtype:
    """Return bfloat16 if all weights of a model, or of an adapter's base model, are stored in it, else float32."""
    _, base = find_adapter(name)
    dtypes = {dtype for _, _, dtype in stored_tensors(base or name).values() if "F" in dtype}
    return torch.bfloat16 if dtypes == {"BF16"} else torch.float32


def find_adapter(name: str) -> tuple[Path | None, str]:
    """Return the adapter_config.json of an adapter and the name of its base model, or (None, "") for another model.

    A base model ./path is relative to a directory above the adapter's, or else to the working directory.
    """
    repo_id, revision = split_revision(name)
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        found = find_adapter_config_file(repo_id, revision=revision)
    if not found:
        return None, ""
    import_peft(f"--model {name}")
    with loading(f"--model {name}", "adapter", ADAPTER_FIX):
        config = json.loads(Path(found).read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    require(bool(base), f"--model {name}: adapter_config.json has no base_model_name_or_path. Set it to a model.")
    if base.startswith(("./", "/")):
        paths = (parent / base for parent in (*Path(found).resolve().parents, Path()))
        missing = f"--model {name}: its base model {base} does not exist"
        path = next((path for path in paths if path.exists()), None)
        require(path is not None, f"{missing}. Set base_model_name_or_path in its adapter_config.json.")
        base = str(path)
    return Path(found), f"{base}@{revision}" if revision else base


def load_pretrained(
    name: str,
    settings: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    linear: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return the model of a Hub id (with an optional @revision) or a directory, on the CPU in ``dtype``.

    ``settings`` replaces its config. With ``linear``, its `stored_dtype`, the weights of linear layers keep that dtype,
    and all other tensors are float32. For an adapter that peft saved, the base model is loaded first. Only safetensors
    are read, because a pickle can run code. Raise UserError if there is no such model.
    """
    repo_id, revision = split_revision(name)
    adapter, base = find_adapter(name)
    if adapter:
        model = load_pretrained(base, None, dtype, linear)
        with loading(f"--model {name}", "adapter", ADAPTER_FIX):
            weights = load_file(cached_file(repo_id, "adapter_model.safetensors", revision=revision))
            load_adapter(model, adapter.parent, weights)
            with suppress(OSError):  # an adapter's end-of-text tokens may differ from its base model's
                model.generation_config = GenerationConfig.from_pretrained(repo_id, revision=revision)
        return model
    if settings is None:
        settings = read_config(name, "--model", {})
        make_causal(settings)
    with loading(f"--model {name}", "causal language model", WEIGHTS_FIX):
        model, report = AutoModelForCausalLM.from_pretrained(
            repo_id,
            config=settings,
            revision=revision,
            dtype=linear or dtype,  # the default of transformers 5 is the dtype of the checkpoint
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    for key, held, expected in report["mismatched_keys"]:
        shapes = f"{list(held)} in the weights, but {list(expected)} by config.json"
        raise UserError(f"--model {name}: {key} is {shapes}. {WEIGHTS_FIX}")
    if missing := sorted(report["missing_keys"]):
        warn(f"{name} lacks {len(missing)} weights, now newly initialized: {', '.join(missing[:4])} ...")
    if linear:
        _make_buffers_again(model)
        set_dtypes(model, linear)
    model.name_or_path = name  # an adapter records the revision of its base model
    generate_as_trained(model)
    return model


def _make_buffers_again(model: PreTrainedModel) -> None:
    """Give buffers that no file holds, such as scales of embeddings, their float32 values."""
    with torch.random.fork_rng(devices=[]), weights_on_meta():  # so adapters draw the same random numbers
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    stored = model.state_dict()
    for name, buffer in fresh.named_buffers():
        if name not in stored:
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, buffer)
