"""Choose the weights that are trained: all, some, or LoRA adapters (Hu et al. 2021, through peft)."""

import copy
import hashlib
import os
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from transformers import PreTrainedModel

from cli.errors import UserError, require, root_cause
from cli.flags import Count, Range, flag
from modeling.loading import import_peft, local_rows, split_revision


@dataclass
class LoraConfig:
    title = "what is trained"

    freeze: list[str] = flag([], "patterns of the names of parameters to freeze, such as 'transformer.wte*'")
    lora_rank: Count | None = flag(None, "train LoRA adapters of this rank and freeze all weights; needs peft")
    lora_alpha: Annotated[float, Range(above=0)] | None = flag(
        None, "the adapters are scaled by lora_alpha / lora_rank (default: twice the rank)"
    )
    lora_dropout: Annotated[float, Range(least=0, below=1)] = flag(0.0, "dropout on the input of the adapters")
    lora_targets: list[str] = flag(
        [], "names of the layers that get adapters (default: all linear layers but the head)"
    )

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) for each rule that these flags must keep."""
        lora_only = {
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "lora_targets": self.lora_targets,
        }
        given = ", ".join(f"--{name}" for name, value in lora_only.items() if value)
        both = f"--freeze {' '.join(self.freeze)}: --lora_rank already freezes all weights. Remove --freeze."
        return [
            (bool(self.lora_rank) or not given, f"{given}: no effect without --lora_rank. Pass --lora_rank 8."),
            (not (self.lora_rank and self.freeze), both),
        ]


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Freeze the parameters of ``model`` whose names match one of ``patterns``.

    Raise UserError if a pattern matches no parameter, or if no trainable parameter is left.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        shown = ", ".join(list(parameters)[:3])
        require(bool(matching), f"--freeze {pattern}: no parameter matches. Use a name such as {shown}.")
        for name in matching:
            parameters[name].requires_grad_(False)
    trainable = any(parameter.requires_grad for parameter in parameters.values())
    require(trainable, f"--freeze {' '.join(patterns)}: no parameter is left to train. Remove a pattern.")


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze ``model`` and add trainable adapters to its linear layers, in place.

    Raise UserError if peft is not installed or ``config.lora_targets`` does not fit the model.
    """
    peft = import_peft(f"--lora_rank {config.lora_rank}")
    targets = f"--lora_targets {' '.join(config.lora_targets)}"
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
        exclude_modules=None if config.lora_targets else _incompatible_layers(model),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft detects GPT-2's transposed weights itself
            model.add_adapter(adapter)
    except ValueError as error:
        fix = "Use names from model.named_modules(), or remove --lora_targets."
        raise UserError(f"{targets}: {root_cause(error)}. {fix}") from error
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in embeddings):
        raise UserError(f"{targets}: embedding and head share one matrix, and an adapter would change both. Remove it.")
    # The saved adapter names its base model. An absolute path is found from any working directory.
    base, revision = split_revision(model.name_or_path)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path, saved.revision = os.path.abspath(base) if os.path.exists(base) else base, revision


@torch.no_grad()
def _incompatible_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers that cannot hold an adapter.

    Llama 4's routers return more than one tensor. Mamba reads the weights of out_proj and dt_proj directly.
    """
    names = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        incompatible = name.endswith((".out_proj", ".dt_proj")) and hasattr(parent, "conv1d")
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            incompatible = not torch.is_tensor(module(module.weight.new_zeros(1, module.in_features)))
        if incompatible:
            names.append(name)
    return names


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain copy of ``model`` whose weights are W + B A alpha / rank. ``model`` itself does not change."""
    LoraLayer = import_peft("merging an adapter").tuners.lora.LoraLayer
    plain, merged = copy.deepcopy(model), []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not name.startswith(tuple(merged)):
            layer = plain.get_submodule(name)
            # peft adapts single parameters too, such as the stacked weights of experts.
            if hasattr(layer, "unload_and_optionally_merge_module"):
                base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                base = layer.get_base_layer()
            plain.set_submodule(name, base)
            merged.append(f"{name}.")
    plain._hf_peft_config_loaded = False  # otherwise save_pretrained would save the adapter alone
    return plain


def frozen_digest(model: torch.nn.Module) -> int:
    """Return a digest of this rank's rows of the frozen weights, or 0 if all weights are trained.

    Each row is hashed with its parameter's name and its number. The digest is the sum of these hashes modulo 2^256, as
    in AdHash (Bellare and Micciancio 1997). So the digests of all ranks have the same sum for any number of shards.
    """
    total = 0
    for name, parameter in model.named_parameters():
        rows, first = local_rows(parameter)
        for number, row in enumerate([] if parameter.requires_grad else torch.atleast_1d(rows), first):
            content = row.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            total += int.from_bytes(hashlib.sha256(f"{name} {number} ".encode() + content).digest())
    return total % 2**256
