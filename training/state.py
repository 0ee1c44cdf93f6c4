"""The state of a run between two steps, and the tensors of its checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from corpus.position import Position
from distributed.world import World


@dataclass
class TrainState:
    """The place of a run between two steps."""

    step: int = 0  # steps made
    position: Position = field(default_factory=Position)  # in the training text
    tokens_seen: int = 0  # with a label: prompts without loss do not count
    last_eval_step: int = -1
    best_step: int | None = None  # whose weights are in model/
    best_loss: float = 0.0  # and their evaluation loss
    skipped_in_a_row: int = 0  # steps that were not finite

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        return cls(**values | {"position": Position(**values["position"])})

    def advance(self, position: Position) -> None:
        """Count one step, after which the text is read up to ``position``."""
        self.step += 1
        self.position = position


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from seed, step and rank alone, so that a checkpoint needs no random state."""
    transformers.set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def training_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of a checkpoint on rank 0: {"weights": by name, "optimizer": by "parameter name:moment"}.

    Frozen weights are left out. All ranks must call this.
    """
    world.reshard(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}:{key}": world.full_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)  # SGD without momentum stores None
    }
    weights = {name: world.full_tensor(weight) for name, weight in _trained_weights(model).items()}
    return {"weights": weights, "optimizer": moments}


def restore_state(
    tensors: dict[str, dict[str, torch.Tensor]], model: PreTrainedModel, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Load the tensors that `training_state` returned on rank 0 into model and optimizer. All ranks must call this."""
    for name, weight in _trained_weights(model).items():
        world.load_tensor(weight, tensors["weights"][name] if tensors else None)
    parameters = dict(model.named_parameters())
    moments = {key: (value.shape, value.dtype) for key, value in tensors["optimizer"].items()} if tensors else {}
    for key, (shape, dtype) in world.broadcast(moments).items():
        name, _, moment = key.rpartition(":")
        like = torch.zeros_like(parameters[name])
        # A moment has the shape, and thus the shards, of its parameter, or it is a tensor of its own.
        state = like if shape == like.shape else torch.zeros(shape, dtype=dtype, device=like.device)
        world.load_tensor(state, tensors["optimizer"][key] if tensors else None)
        optimizer.state[parameters[name]][moment] = state


def _trained_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return trained parameters and persistent buffers by name; tied ones once, under their first name."""
    once = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    once |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}
