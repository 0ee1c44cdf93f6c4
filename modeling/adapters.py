"""What is trained: all weights, all but the frozen ones, or LoRA adapters (Hu et al. 2021, through peft)."""

import copy
import hashlib
import os
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
from transformers import PreTrainedModel

from cli.errors import UserError, require, root_cause
from cli.flags import Count, Range, flag
from modeling.loading import import_peft


@dataclass
class LoraConfig:
    freeze: list[str] = flag([], "patterns of parameters that are not trained, such as 'transformer.wte*'")
    lora_rank: Count | None = flag(None, "train adapters of this rank instead of the weights; needs peft")
    lora_alpha: Annotated[float, Range(above=0)] | None = flag(
        None, "adapters count lora_alpha / lora_rank times (default: twice the rank)"
    )
    lora_dropout: Annotated[float, Range(least=0, below=1)] = flag(0.0, "of what goes into the adapters")
    lora_targets: list[str] = flag([], "names of the layers that get adapters (default: all linear ones but the head)")
    merge_lora: bool = flag(False, "make model/ a plain model, with the adapters in its weights")

    def rules(self) -> list[tuple[bool, str]]:
        given = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "lora_targets": self.lora_targets}
        alone = [f"--{name}" for name, value in {**given, "merge_lora": self.merge_lora}.items() if value]
        both = f"--freeze {' '.join(self.freeze)}: with --lora_rank all weights are frozen; leave it out"
        return [
            (bool(self.lora_rank) or not alone, f"{', '.join(alone)}: needs --lora_rank, such as 8; give it"),
            (not (self.lora_rank and self.freeze), both),
        ]


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Leaves the parameters as they are whose names match one of ``patterns``."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        shown = ", ".join(list(parameters)[:3])
        require(bool(matching), f"--freeze {pattern}: no parameter is named so; they are {shown}, ...")
        for name in matching:
            parameters[name].requires_grad_(False)
    left = any(parameter.requires_grad for parameter in parameters.values())
    require(left, f"--freeze {' '.join(patterns)}: nothing is left to train; freeze less")


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes ``model`` and puts trainable adapters into its linear layers."""
    peft = import_peft(f"--lora_rank {config.lora_rank}: trains adapters")
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
        exclude_modules=None if config.lora_targets else _unlike_linear(model),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # of GPT-2's transposed weights, which it finds itself
            model.add_adapter(adapter)
    except ValueError as error:
        fix = "name them as model.named_modules() does, or leave it out"
        raise UserError(f"--lora_targets {' '.join(config.lora_targets)}: {root_cause(error)}; {fix}") from error
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in embeddings):
        tied = "embedding and head are one matrix, which an adapter of one of them would change for both"
        raise UserError(f"--lora_targets {' '.join(config.lora_targets)}: {tied}; leave it out")
    if os.path.exists(model.name_or_path):  # the adapter has to find it from any directory
        model.peft_config["default"].base_model_name_or_path = os.path.abspath(model.name_or_path)


@torch.no_grad()
def _unlike_linear(model: torch.nn.Module) -> list[str]:
    """Linear layers that put out more than a tensor, as Llama 4's routers do, and those whose weights Mamba reads."""
    found = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        unlike = name.endswith((".out_proj", ".dt_proj")) and hasattr(parent, "conv1d")
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            unlike = not torch.is_tensor(module(module.weight.new_zeros(1, module.in_features)))
        if unlike:
            found.append(name)
    return found


def save_merged(model: PreTrainedModel, directory: Path) -> None:
    """Saves a plain model whose weights are W + B A alpha / rank. ``model`` itself stays as it is, to the bit."""
    LoraLayer = import_peft("an adapter is merged").tuners.lora.LoraLayer
    plain, done = copy.deepcopy(model), []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not name.startswith(tuple(done)):
            layer = plain.get_submodule(name)
            if hasattr(layer, "unload_and_optionally_merge_module"):  # of parameters that are no layers, as experts are
                base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                base = layer.get_base_layer()
            plain.set_submodule(name, base)
            done.append(f"{name}.")
    plain._hf_peft_config_loaded = False  # else only an adapter would be saved
    plain.save_pretrained(directory)


def frozen_sha256(model: torch.nn.Module) -> str | None:
    """What the weights are that checkpoints leave out, or None where all are trained."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    digest = hashlib.sha256()
    for parameter in frozen:
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else None
