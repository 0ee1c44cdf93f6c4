"""The loss: the negative log-likelihood of each token, summed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from cli.errors import require
from modeling.linear_cross_entropy import IGNORED_LABEL, LinearCrossEntropy, linear_cross_entropy, transform_logits
from modeling.packing import isolated_output

# Settings that change the output of the head: a factor or divisor, and a soft cap.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
IDENTITY = (1.0, None)  # the scale and the cap of most heads
SHORT_BLOCK = 128  # tokens; on a CPU, plain attention is the fastest up to this length


def next_token_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
    loss_scale: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the negative log-likelihood in nats of each label given the tokens before it, in float32.

    input_ids and labels are (batch, sequence) int64, not shifted; labels of -100 are skipped. With reduction "sum" the
    result is a scalar, with "none" a vector. position_ids has the same shape. Each 0 in it begins a document. Tokens
    attend to their own document alone (see `check_isolated`). cu_seq_lens is `document_bounds` of position_ids;
    without it, flash attention waits for the device.

    The model's own ``labels=`` loss is never used. It is a mean, which gradient accumulation cannot add up, and ten
    architectures forget the shift. The logits are computed in chunks if `linear_head` finds the head. For float16,
    ``loss_scale`` is the factor of the GradScaler. Without it, the logits are computed at once. In training, a mixture
    of experts with output_router_logits in its config adds its router loss.
    """
    device, has_gradient = input_ids.device.type, torch.is_grad_enabled()
    is_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.half
    # A chunk's gradients are computed in the forward pass. float16 would round unscaled gradients to 0.
    loss_scale = loss_scale if is_half else None
    in_chunks = not has_gradient or (reduction == "sum" and is_half == (loss_scale is not None))
    head = linear_head(model) if in_chunks else None
    seen: list[torch.Tensor] = []  # the input of the head, which returns it unchanged
    bare_head = replace_forward(head, lambda hidden: seen.append(hidden) or hidden) if head else nullcontext()
    with attention_kernel(model, input_ids), bare_head:
        output = isolated_output(model, input_ids, position_ids, cu_seq_lens)
    logits = output.logits  # (batch, sequence, vocabulary); with a bare head the hidden states (batch, sequence, width)
    if head and model.logit_transform != IDENTITY:
        (logits,) = seen  # before the model's own scale and cap
    logits = logits.view(*input_ids.shape, -1)  # flash attention takes all blocks as one row
    if head is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # shifting the labels saves a copy of the logits
        nll = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction
        )
    else:
        bias = getattr(head, "bias", None)  # peft's wrapper has none
        operands = logits[:, :-1].flatten(0, 1), head.weight, bias, labels[:, 1:].flatten(), *model.logit_transform
        operands = *operands, loss_scale, getattr(model, "is_compiled", False)
        if has_gradient:
            nll = LinearCrossEntropy.apply(*operands)
        else:
            nll = linear_cross_entropy(*operands)[0]
            nll = nll.sum() if reduction == "sum" else nll
    if (router_loss := getattr(output, "aux_loss", None)) is not None:
        weight = router_loss_weight(model)  # in evaluation too, so that `check_model` fails and not the first step
        if model.training:
            nll = nll + weight * router_loss * (labels[:, 1:] != IGNORED_LABEL).sum()  # from a mean to a sum
    return nll


def router_loss_weight(model: PreTrainedModel) -> float:
    """Return the weight of the router loss, from the config or the model. Raise UserError if neither has one."""
    places = product((model.config.get_text_config(decoder=True), model), ("router_aux_loss_coef", "aux_loss_coef"))
    weights = [getattr(place, name) for place, name in places if hasattr(place, name)]
    unknown = f"output_router_logits: {model.config.model_type} has no router_aux_loss_coef"
    require(bool(weights), f"{unknown}. Set output_router_logits to false in its config.")
    return weights[0]


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


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off. Set the model back to its mode at the end, even after an exception."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def replace_forward(head: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the forward pass of ``head`` in this context."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def linear_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the output embedding if it is linear and the logits are `transform_logits` of its output, else None.

    The model is probed once: the head returns known values. The scale and the cap that turn them into the logits are
    stored as ``model.logit_transform``. It is None if the config has no such values.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = getattr(head, "original_module", head)  # peft wraps a head that it trains
    if type(linear) is not torch.nn.Linear or "forward" in vars(head) or head._forward_hooks:
        return None
    if "logit_transform" not in vars(model):
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        known = torch.linspace(-1e3, 1e3, 2 * linear.out_features, device=ids.device).view(1, 2, -1)
        with torch.no_grad(), evaluating(model), replace_forward(head, lambda _: known.clone()):
            logits = model(input_ids=ids, use_cache=False).logits
        values = vars(model.config.get_text_config(decoder=True))
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and value}
        scales, caps = ([numbers[name] for name in names if name in numbers] for names in (SCALES, CAPS))
        transforms = product((1.0, *scales, *(1 / scale for scale in scales)), (None, *caps))
        fits = (each for each in transforms if torch.allclose(logits, transform_logits(known, *each), atol=0))
        model.logit_transform = next(fits, None) if logits.shape == known.shape else None
    return head if model.logit_transform else None
