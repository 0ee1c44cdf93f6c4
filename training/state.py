"""The state of a run between two steps, and the tensors of its checkpoint."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from corpus.position import Position
from distributed.parallel import reshard


@dataclass
class TrainState:
    """The place of a run between two steps."""

    step: int = 0  # steps made
    position: Position = field(default_factory=Position)  # in the training text
    tokens_seen: int = 0  # only tokens with a label: prompts without loss do not count
    last_eval_step: int = -1
    best_step: int | None = None  # the step of the weights in model/
    best_loss: float = 0.0  # their evaluation loss
    skipped_in_a_row: int = 0  # steps that were not finite
    evaluations_since_best: int = 0  # without a better loss
    stopped_early: bool = False  # by --patience

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        return cls(**values | {"position": Position(**values["position"])})

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Return whether ``patience`` evaluations in a row brought no better loss. None has no limit."""
        return self.evaluations_since_best >= (patience or math.inf)

    def advance(self, position: Position) -> None:
        """Count one step. The text is now read up to ``position``."""
        self.step += 1
        self.position = position


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from seed, step and rank alone, so that a checkpoint needs no random state."""
    transformers.set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def trained_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return trained parameters and persistent buffers by name. Tied tensors appear once, under their first name.

    With FSDP2 each rank gets its shards. Frozen weights are left out.
    """
    reshard(model)
    once = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    once |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}


def moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of the optimizer's state by "parameter name:moment". With FSDP2 each rank gets its shards."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)  # SGD without momentum stores None
    }


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return [dtype, shape] of each tensor, over all shards, as JSON."""
    return {key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for key, tensor in tensors.items()}


def make_moments(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, described: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Give the optimizer zeros for the moments that `describe` returned, and return them by name.

    A moment has the shape, and thus the shards, of its parameter, or it is a separate tensor.
    """
    parameters, made = dict(model.named_parameters()), {}
    for key, (dtype, shape) in described.items():
        name, _, moment = key.rpartition(":")
        parameter, options = parameters[name], {"dtype": getattr(torch, dtype)}
        same = list(parameter.shape) == shape
        zeros = torch.zeros_like if same else torch.zeros
        made[key] = zeros(parameter, **options) if same else zeros(shape, device=parameter.device, **options)
        optimizer.state[parameter][moment] = made[key]
    return made
