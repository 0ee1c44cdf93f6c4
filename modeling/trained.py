"""Choose the weights that are trained: all, some, or LoRA adapters (Hu et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from transformers import PreTrainedModel

from cli.errors import UserError, require, root_cause
from cli.flags import Count, Range, flag
from cli.hub import split_revision
from modeling.adapters import attach, import_peft


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
        names = ("model_config", "model_overrides")  # of ModelConfig
        changed = [f"--{name}" for name in names if getattr(self, name, None)]
        adapter = f"--lora_rank {self.lora_rank}: an adapter belongs to --model as it is. Remove {', '.join(changed)}."
        both = f"--freeze {' '.join(self.freeze)}: --lora_rank already freezes all weights. Remove --freeze."
        return [
            (bool(self.lora_rank) or not given, f"{given}: no effect without --lora_rank. Pass --lora_rank 8."),
            (not (self.lora_rank and self.freeze), both),
            (not (self.lora_rank and changed), adapter),
        ]


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Freeze the parameters of ``model`` with names that match one of ``patterns``.

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


def add_lora(model: PreTrainedModel, config: LoraConfig, added_tokens: Sequence[int] = ()) -> None:
    """Freeze ``model`` and add trainable adapters to its linear layers, in place.

    The rows of ``added_tokens`` in the embedding and in the head are trained, too. Raise UserError if peft is not
    installed or ``config.lora_targets`` does not fit the model.
    """
    peft = import_peft(f"--lora_rank {config.lora_rank}")
    targets = f"--lora_targets {' '.join(config.lora_targets)}"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(head, "weight", None) is embedding.weight
    rows = None
    if added_tokens:
        plain = isinstance(head, torch.nn.Linear) and head.bias is None
        more = f"the head of {model.config.model_type} is more than a matrix, so --lora_rank cannot train its tokens"
        require(plain, f"--add_tokens: {more}. Remove one of them.")
        trained = {embedding} if is_tied else {embedding, head}  # peft itself keeps the tie
        rows = {name: list(added_tokens) for name, module in model.named_modules() if module in trained}
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
        exclude_modules=None if config.lora_targets else _incompatible_layers(model),
        trainable_token_indices=rows,
    )
    # peft would round the first values of the adapters to the dtype of the weights. So show it float32 weights.
    held = {p: p.data for p in model.parameters() if p.dtype != torch.float32}
    for parameter in held:
        parameter.data = torch.zeros((), device=parameter.device).expand(parameter.shape)  # takes no memory
    try:
        attach(model, adapter)
    except ValueError as error:
        fix = "Use names from model.named_modules(), or remove --lora_targets."
        raise UserError(f"{targets}: {root_cause(error)}. {fix}") from error
    for parameter, data in held.items():
        parameter.data = data
    adapted = model.get_input_embeddings(), model.get_output_embeddings()
    if is_tied and any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in adapted):
        raise UserError(f"{targets}: embedding and head share one matrix, and an adapter would change both. Remove it.")
    adapter.base_model_name_or_path, adapter.revision = split_revision(model.name_or_path)


@torch.no_grad()
def _incompatible_layers(model: PreTrainedModel) -> list[str]:
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
