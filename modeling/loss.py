"""The loss: the negative log-likelihood of each token, summed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, masking_utils

from modeling.linear_cross_entropy import IGNORED_LABEL, LinearCrossEntropy, linear_cross_entropy

SHORT_BLOCK = 128  # tokens, up to which plain attention is the fastest on a CPU


def next_token_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> torch.Tensor:
    """Negative log-likelihood in nats of each label given the tokens before it, in float32: summed, or one by one.

    input_ids and labels are (batch, sequence), not shifted; labels of -100 are skipped. Where position_ids, of the same
    shape, begin again from 0, another document begins, which sees none of those before it (see `check_isolated`). The
    model's own ``labels=`` loss is never used: it is a mean, which accumulation cannot add up, and ten architectures
    forget the shift. Where logits are nothing but hidden states times the head's weights, they are made in chunks.
    In training, a mixture of experts whose config turns output_router_logits on adds its router's loss.
    """
    head = linear_head(model) if reduction == "sum" or not torch.is_grad_enabled() else None
    device = input_ids.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.half:
        head = None  # its gradients would be made before the GradScaler can keep them within the range of float16
    bare_head = in_place_of(head, lambda hidden: hidden) if head else nullcontext()
    isolation = nullcontext() if position_ids is not None else never_packed()
    with isolation, attention_kernel(model, input_ids), bare_head:
        output = model(input_ids=input_ids, use_cache=False, **isolated(model, position_ids))
    logits = output.logits  # (batch, sequence, vocabulary), or hidden states
    if head is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # shifting labels spares a copy of the logits
        nll = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction
        )
    else:
        operands = logits[:, :-1].flatten(0, 1), head.weight, head.bias, labels[:, 1:].flatten()
        if torch.is_grad_enabled():
            nll = LinearCrossEntropy.apply(*operands)
        else:
            nll = linear_cross_entropy(*operands)[0]
            nll = nll.sum() if reduction == "sum" else nll
    if model.training and (router_loss := getattr(output, "aux_loss", None)) is not None:
        weight = model.config.get_text_config(decoder=True).router_aux_loss_coef
        nll = nll + weight * router_loss * (labels[:, 1:] != IGNORED_LABEL).sum()  # it is a mean, and this a sum
    return nll


def count_predicted(labels: torch.Tensor) -> int:
    """The number of labels that `next_token_nll` sums over: the first token of a block has nothing to predict it."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def attention_kernel(model: PreTrainedModel, input_ids: torch.Tensor) -> AbstractContextManager:
    """The kernel that is fastest: on a CPU, flash attention's backward pass in bfloat16 is slow for short blocks."""
    device, length = input_ids.device.type, input_ids.shape[1]
    short = device == "cpu" and length <= SHORT_BLOCK and torch.is_grad_enabled() and torch.is_autocast_enabled(device)
    # What is recomputed in the backward pass must be what the forward pass has computed, and is not in this context.
    return sdpa_kernel(SDPBackend.MATH) if short and "recomputes" not in vars(model) else nullcontext()


def isolated(model: PreTrainedModel, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What the model has to be called with so that documents in a block do not see each other."""
    if position_ids is None:
        return {}
    positions = {"position_ids": position_ids} if "position_ids" in model.isolated_by else {}
    if "attention_mask" not in model.isolated_by:  # transformers itself makes the mask from them
        return positions
    document = (position_ids == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (batch, 1, sequence, sequence)
    return positions | {"attention_mask": torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)}


@contextmanager
def never_packed() -> Iterator[None]:
    """To see that a block holds no several sequences, transformers would wait for position ids from the device."""
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; the model gets its mode back, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def in_place_of(head: torch.nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def linear_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The output embedding, where it is linear and what it puts out are the logits: no soft cap, no scale after it.

    Looked at once a model: in place of what the head puts out come known values, which have to come through.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not torch.nn.Linear or "forward" in vars(head) or head._forward_hooks:
        return None
    if "has_linear_head" not in vars(model):
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        known = torch.linspace(-1e3, 1e3, ids.numel() * head.out_features, device=ids.device).view(1, 2, -1)
        with torch.no_grad(), evaluating(model), in_place_of(head, lambda _: known.clone()):
            model.has_linear_head = torch.equal(model(input_ids=ids, use_cache=False).logits, known)
    return head if model.has_linear_head else None
