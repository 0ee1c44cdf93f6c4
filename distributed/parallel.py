"""Run a model on several ranks with DistributedDataParallel (DDP) or fully_shard (FSDP2).

Only rank 0 loads weights. On the other ranks the model is on device meta until `Strategy.parallelize`.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from cli.errors import UserError, out_of_memory, require
from distributed.torchrun import first_line, is_connection_error
from modeling.architectures import layer_stacks
from modeling.checks import PROBED_ATTRIBUTES
from modeling.loss import next_token_nll
from modeling.precision import DTYPES, autocast

T = TypeVar("T")


class NextTokenLoss(torch.nn.Module):
    """Compute `next_token_nll` as a module. The loss uses the head outside the model, and DDP must see its weights."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return next_token_nll(self.model, **batch)


class Strategy:
    """Run one model on all ranks. Subclasses wrap it with DDP or FSDP2."""

    name: str
    alternative: str  # for a model that fails with this strategy

    def __init__(self, broadcast: Callable[[T], T]):
        """``broadcast`` returns rank 0's Python object on all ranks."""
        self._broadcast = broadcast

    def check_precision(self, precision: str) -> None:
        """Raise UserError if this strategy does not support the precision."""

    def load_device(self, device: torch.device) -> torch.device:
        """Return the device on which rank 0 holds the model before `parallelize`."""
        return device

    def parallelize(self, model: PreTrainedModel, device: torch.device, precision: str, block_size: int) -> None:
        """Copy or shard rank 0's weights to all ranks, and run the passes of one step.

        Raise UserError if this strategy does not support the model.
        """
        model.train()  # the warm-up passes must be the passes of training
        drops = [name for name, value in model.config.to_dict().items() if name.endswith("layerdrop") and value]
        wrong = f"--strategy {self.name}: each rank would drop different layers"
        require(not drops, f"{wrong}. Set {', '.join(drops)} to 0 with --model_overrides, or use one process.")

        # Loading and checking leave these attributes on rank 0 alone.
        for name, value in self._broadcast({name: vars(model).get(name) for name in PROBED_ATTRIBUTES}).items():
            if value is not None:
                setattr(model, name, value)
        ids = torch.zeros(1, block_size, dtype=torch.int64, device=device)
        self._wrap(model, ids, precision)
        self._warm_up(model, ids, precision)

    def _wrap(self, model: PreTrainedModel, ids: torch.Tensor, precision: str) -> None:
        """Bring rank 0's weights to all ranks. ``ids`` (1, block_size) are a batch to probe the model with."""

    def _warm_up(self, model: PreTrainedModel, ids: torch.Tensor, precision: str) -> None:
        """Run the forward and backward passes of a step, and drop the gradients."""
        try:
            for is_last in (True, False, True):
                with self.sync_gradients(model, is_last):
                    with autocast(ids.device, precision):
                        nll = self.next_token_nll(model, input_ids=ids, labels=ids)
                    nll.backward()
                if is_last:
                    self._find_trained_parts(model)
                    model.zero_grad()
        except (RuntimeError, AttributeError, TypeError) as error:
            if out_of_memory(error) or is_connection_error(error):
                raise
            wrong = f"--strategy {self.name}: {model.config.model_type} fails with it ({first_line(error)[:100]})"
            raise UserError(f"{wrong}. Use {self.alternative}.") from error

    def _find_trained_parts(self, model: PreTrainedModel) -> None:
        """Look at the gradients of a warm-up pass."""

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        return next_token_nll(model, **batch)

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        """Return the context of a forward and a backward pass. Gradients are averaged if ``is_last``."""
        return nullcontext()

    def reshard(self, model: PreTrainedModel) -> None:
        """Free the weights that belong to other ranks' shards."""

    def full_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """Return the model with all its weights on rank 0, None on the other ranks."""
        return model if dist.get_rank() == 0 else None


class DDP(Strategy):
    """Keep the whole model on each rank, and average the gradients after the last micro-batch."""

    name, alternative = "ddp", "one process"

    def _wrap(self, model: PreTrainedModel, ids: torch.Tensor, precision: str) -> None:
        # DDP sends the weights of rank 0 to the other ranks. In its first backward pass it reorders its buckets, which
        # changes the order of sums. The warm-up puts this before step 0, so a resumed run has the same bits.
        materialize(model, ids.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.wrapper = DistributedDataParallel(
            NextTokenLoss(model),
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._broadcast(
                dist.get_rank() == 0 and has_unused_weights(model, trained, ids, precision)
            ),
        )

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        return self.wrapper(**batch)

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        return nullcontext() if is_last else self.wrapper.no_sync()


class FSDP(Strategy):
    """Keep one shard of weights, gradients and optimizer state on each rank."""

    name, alternative = "fsdp", "--strategy ddp"

    def __init__(self, broadcast: Callable[[T], T]):
        super().__init__(broadcast)
        self._trained_parts: list[FSDPModule] = []

    def check_precision(self, precision: str) -> None:
        wrong = "--strategy fsdp: it does not scale the gradients of float16"
        require(precision != "fp16", f"{wrong}. Use --precision bf16 or fp32.")

    def load_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")  # one device may not hold the whole model

    def _wrap(self, model: PreTrainedModel, ids: torch.Tensor, precision: str) -> None:
        # FSDP2 warns about in-place changes of a returned view. Nothing here changes one.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        self._empty_model = copy_without_weights(model)
        full = {name: parameter.detach() for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(ids.device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(DTYPES[precision] if precision != "fp32" else None, torch.float32)

        # Materialize and shard one layer after the other: no device ever holds the whole model.
        for module in [*chain(*layer_stacks(model)), model]:
            materialize(module, ids.device)
            if not isinstance(module, (FSDPModule, torch.nn.ModuleList, torch.nn.ModuleDict)):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        for name, parameter in model.named_parameters():
            load_tensor(parameter, full.pop(name))
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def _find_trained_parts(self, model: PreTrainedModel) -> None:
        # A module that never runs, such as an image encoder, has no gradients whose reduction could be delayed.
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._trained_parts = [part for part in parts if any(p.grad is not None for p in part.parameters())]

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        for part in self._trained_parts:
            part.set_requires_gradient_sync(is_last, recurse=False)
        return nullcontext()

    def reshard(self, model: PreTrainedModel) -> None:
        model.reshard()

    def full_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        self.reshard(model)
        full = {id(tensor): full_tensor(tensor.detach()) for tensor in [*model.parameters(), *model.buffers()]}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        if dist.get_rank() != 0:
            return None
        copied = copy.deepcopy(self._empty_model)
        copied.load_state_dict({name: full[id(tensor)] for name, tensor in named}, strict=False, assign=True)
        copied.tie_weights()
        return copied


def grad_norm(model: PreTrainedModel) -> torch.Tensor:
    """Return the L2 norm of all gradients, over all shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensor(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor with all its shards on rank 0's CPU, None on the other ranks."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def load_tensor(target: torch.Tensor, full: torch.Tensor | None) -> None:
    """Copy rank 0's ``full`` tensor to ``target`` on all ranks. A sharded ``target`` gets its shard."""
    if dist.get_rank() != 0:
        full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    full = full.to(target.device, target.dtype)
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            dist.broadcast(full, 0)
            target.copy_(full)


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


def copy_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model with its weights on device meta, so that they take no memory."""
    memo = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def has_unused_weights(
    model: PreTrainedModel, trained: list[torch.nn.Parameter], ids: torch.Tensor, precision: str
) -> bool:
    """Return whether a backward pass leaves a weight without a gradient. DDP would wait for it."""
    with autocast(ids.device, precision):
        nll = next_token_nll(model, ids, ids)
    gradients = torch.autograd.grad(nll, trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)
