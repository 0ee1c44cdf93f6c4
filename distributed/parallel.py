"""DistributedDataParallel (DDP) and fully_shard (FSDP2) for any causal language model."""

import math
import warnings
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from distributed.empty import materialize
from modeling.architectures import layer_stacks
from modeling.loss import next_token_nll
from modeling.precision import DTYPES, autocast


class NextTokenLoss(torch.nn.Module):
    """Compute `next_token_nll` as a module. The loss uses the head outside the model, and DDP must see its weights."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return next_token_nll(self.model, **batch)


def has_unused_weights(model: PreTrainedModel, ids: torch.Tensor, precision: str) -> bool:
    """Return whether a backward pass leaves a trained weight without a gradient. DDP would wait for that gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with autocast(ids.device, precision):
        nll = next_token_nll(model, ids, ids)
    return any(gradient is None for gradient in torch.autograd.grad(nll, trained, allow_unused=True))


def wrap_in_ddp(model: PreTrainedModel, has_unused_weights: bool) -> DistributedDataParallel:
    """Send rank 0's weights to all ranks, and return the module that averages gradients."""
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": has_unused_weights}
    return DistributedDataParallel(NextTokenLoss(model), forward_sync_buffers=False, **options)


def shard(model: PreTrainedModel, device: torch.device, precision: str, sends: bool = True) -> None:
    """Keep one shard of weights, gradients and optimizer state on each rank.

    With ``sends``, rank 0 sends its weights to the shards. Otherwise their weights are not initialized.
    """
    # FSDP2 warns about in-place changes of a returned view. This code changes none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    full = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(DTYPES[precision] if precision != "fp32" else None, torch.float32)
    # Materialize and shard one layer at a time, so that no device ever holds the whole model. An embedding that no
    # other module shares is freed after its use. The head is kept, because the loss reads its weights later.
    embedding, weights = model.get_input_embeddings(), [p for _, p in model.named_parameters(remove_duplicate=False)]
    is_apart = isinstance(embedding, torch.nn.Embedding) and sum(p is embedding.weight for p in weights) == 1
    for module in [*chain(*layer_stacks(model)), *[embedding] * is_apart, model]:
        materialize(module, device)
        if not isinstance(module, (FSDPModule, torch.nn.ModuleList, torch.nn.ModuleDict)):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    if is_apart:
        embedding.set_unshard_in_backward(False)  # its backward pass needs no weights
    for name, parameter in model.named_parameters() if sends else ():
        _load(parameter, full.pop(name))
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _load(target: DTensor, full: torch.Tensor) -> None:
    """Copy the shards of rank 0's ``full`` tensor to ``target`` on all ranks."""
    if dist.get_rank() != 0:
        full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    with torch.no_grad():
        full = full.to(target.device, target.dtype)
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))


def delayed_parts(model: PreTrainedModel, memory: float | None = None) -> tuple[list[FSDPModule], str]:
    """Return the sharded modules that keep gradients until the last micro-batch, and the note of the plan.

    Only modules with gradients count: an image encoder that never runs has none. Kept gradients take 4 bytes per
    trained parameter on each device. If that is more than a quarter of its ``memory`` in bytes, none are kept.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if memory is None:
        device = trained[0].device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    if isinstance(model, FSDPModule) and 4 * sum(parameter.numel() for parameter in trained) > memory / 4:
        return [], ", gradients reduced per micro-batch"
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [part for part in parts if any(parameter.grad is not None for parameter in part.parameters())], ""


def reshard(model: PreTrainedModel) -> None:
    """Free the weights of other ranks' shards, which stay in memory after a forward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the whole tensor on rank 0's CPU, and None on the other ranks. All ranks must call this."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu() if not dist.is_initialized() or dist.get_rank() == 0 else None


def total_norm(model: PreTrainedModel) -> torch.Tensor:
    """Return the L2 norm of all gradients, over all shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
