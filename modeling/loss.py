"""The loss: the negative log-likelihood of each token, summed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, masking_utils

from modeling.linear_cross_entropy import IGNORED_LABEL, LinearCrossEntropy, linear_cross_entropy

SHORT_BLOCK = 128  # tokens; on a CPU, plain attention is the fastest up to this length


def next_token_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> torch.Tensor:
    """Return the negative log-likelihood in nats of each label given the tokens before it, in float32.

    input_ids and labels are (batch, sequence) int64, not shifted; labels of -100 are skipped. With reduction "sum" the
    result is a scalar, with "none" a vector. position_ids has the same shape. Each 0 in it begins a document, which
    attends to none before it (see `check_isolated`).

    The model's own ``labels=`` loss is never used. It is a mean, which gradient accumulation cannot add up, and ten
    architectures forget the shift. If the logits are a linear function of the hidden states, they are computed in
    chunks. In training, a mixture of experts with output_router_logits in its config adds its router loss.
    """
    head = linear_head(model) if reduction == "sum" or not torch.is_grad_enabled() else None
    device = input_ids.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.half:
        head = None  # its gradients are computed before the GradScaler can keep them in the range of float16
    bare_head = replace_forward(head, lambda hidden: hidden) if head else nullcontext()
    isolation = nullcontext() if position_ids is not None else skip_packing_detection()
    with isolation, attention_kernel(model, input_ids), bare_head:
        output = model(input_ids=input_ids, use_cache=False, **isolation_inputs(model, position_ids))
    logits = output.logits  # (batch, sequence, vocabulary); with a bare head the hidden states (batch, sequence, width)
    if head is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # shifting the labels saves a copy of the logits
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
        nll = nll + weight * router_loss * (labels[:, 1:] != IGNORED_LABEL).sum()  # from a mean to a sum
    return nll


def count_predicted(labels: torch.Tensor) -> int:
    """Return the number of labels that `next_token_nll` sums over. The first token of a block is not predicted."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def attention_kernel(model: PreTrainedModel, input_ids: torch.Tensor) -> AbstractContextManager:
    """Return a context that selects the fastest attention kernel.

    On a CPU, the backward pass of flash attention in bfloat16 is slow for short blocks.
    """
    device, length = input_ids.device.type, input_ids.shape[1]
    is_short = device == "cpu" and length <= SHORT_BLOCK
    prefers_math = is_short and torch.is_grad_enabled() and torch.is_autocast_enabled(device)
    # Gradient checkpointing computes the forward pass again outside of this context, and both must agree.
    return sdpa_kernel(SDPBackend.MATH) if prefers_math and "recomputes" not in vars(model) else nullcontext()


def isolation_inputs(model: PreTrainedModel, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the keyword arguments with which no document of a block attends to another.

    position_ids is (batch, sequence) int64, with a 0 at the start of each document. None returns no arguments.
    """
    if position_ids is None:
        return {}
    positions = {"position_ids": position_ids} if "position_ids" in model.isolated_by else {}
    if "attention_mask" not in model.isolated_by:  # transformers makes the mask from the position ids
        return positions
    document = (position_ids == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (batch, 1, sequence, sequence)
    return positions | {"attention_mask": torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)}


@contextmanager
def skip_packing_detection() -> Iterator[None]:
    """Stop transformers from looking for packed sequences, for which it would wait for the device."""
    detect = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = detect


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off, and set the model back to its mode at the end, after an exception too."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def replace_forward(head: torch.nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the forward pass of ``head`` for the time of the context."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def linear_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """Return the output embedding if it is linear and its output is the logits, with no soft cap or scale after it.

    The model is probed once: the head returns known values, and they must be the logits.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not torch.nn.Linear or "forward" in vars(head) or head._forward_hooks:
        return None
    if "has_linear_head" not in vars(model):
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        known = torch.linspace(-1e3, 1e3, ids.numel() * head.out_features, device=ids.device).view(1, 2, -1)
        with torch.no_grad(), evaluating(model), replace_forward(head, lambda _: known.clone()):
            model.has_linear_head = torch.equal(model(input_ids=ids, use_cache=False).logits, known)
    return head if model.has_linear_head else None
