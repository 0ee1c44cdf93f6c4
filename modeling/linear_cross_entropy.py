"""The cross-entropy of a linear head, computed with the logits of one chunk of tokens in memory at a time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100  # the label that F.cross_entropy and every Hugging Face model skip


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of `linear_cross_entropy`. The forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> torch.Tensor:
        nll, *gradients = linear_cross_entropy(*operands, needs_grad=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients, operands[-1])
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *gradients, loss_scale = ctx.saved_tensors
        grad = grad if loss_scale is None else grad / loss_scale
        return *(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None, None, None


def transform_logits(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """Return ``cap * tanh(scale * logits / cap)``, or without a cap ``scale * logits``. The cap returns float32."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else (logits.float() / cap).tanh_().mul_(cap)


@torch.no_grad()
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float = 1.0,
    cap: float | None = None,
    loss_scale: torch.Tensor | None = None,
    needs_grad: Sequence[bool] = (False, False, False),
    chunk: int = 1024,
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the cross-entropy of the logits, and the gradients of its sum.

    The logits are `transform_logits` of ``hidden @ weight.T + bias``. hidden is (tokens, width), weight (vocabulary,
    width), bias (vocabulary,) or None, targets (tokens,) int64. The cross-entropy is (tokens,) float32 in nats; it is
    0 for targets of -100. Other targets outside of the vocabulary raise IndexError, or on a GPU a device-side assert.
    The gradients are of hidden, weight and bias, times ``loss_scale``. They are None if ``needs_grad`` says so.

    Logits exist for ``chunk`` tokens at a time. A CPU computes them ``tile`` columns at a time, which are still in its
    cache when their exponentials are taken. The softmax over the vocabulary is the softmax over a tile times
    exp(tile_logsumexp - logsumexp). This factor is applied to the narrow operands of the products.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    has_tiles = device == "cpu" and dtype is not torch.half  # float16 cannot hold a value that the factor makes smaller
    tile = tile or (8192 if has_tiles else len(weight))
    tiles = weight.to(dtype).split(tile)
    known = torch.where(targets == IGNORED_LABEL, 0, targets)
    nll = F.embedding(known, hidden.new_zeros(len(weight), 1)).squeeze(1).float()  # fails for any other target
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_grad[0] else None
    # The first chunk writes d_weight and later chunks add to it.
    empty = torch.empty_like if len(targets) else torch.zeros_like
    d_weight = empty(weight, dtype=torch.float32) if needs_grad[1] else None  # FSDP2's weight may have a shorter dtype
    d_bias = torch.zeros_like(bias) if needs_grad[2] else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        states, has_loss = hidden[rows], targets[rows, None] != IGNORED_LABEL
        log_probability, error, factors, softmaxes, targets_in_tiles = _softmax_by_tiles(
            states.to(dtype), tiles, bias, targets[rows, None].clamp_min(0), scale, cap, loss_scale, any(needs_grad)
        )
        nll[rows] = (-log_probability * has_loss).squeeze(1)
        if not any(needs_grad):
            continue
        for i, (columns, softmax, (place, is_here)) in enumerate(zip(tiles, softmaxes, targets_in_tiles, strict=True)):
            factor = factors[:, i : i + 1]
            softmax.scatter_(1, place, torch.where(is_here, (error / factor).to(dtype), softmax.gather(1, place)))
            factor = factor * (has_loss * scale)
            if d_hidden is not None:
                d_hidden[rows].addcmul_(softmax @ columns, factor)
            if d_weight is not None:
                part = d_weight[i * tile : (i + 1) * tile]
                (part.add_ if start else part.copy_)(softmax.T @ (states * factor).to(dtype))
            if d_bias is not None:
                d_bias[i * tile : (i + 1) * tile] += (softmax * factor).sum(0)
        del softmaxes, softmax  # free them before the next chunk makes its own
    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
    return nll, *(None if gradient is None else gradient.to(of.dtype) for gradient, of in gradients)


def _softmax_by_tiles(
    states: torch.Tensor,
    tiles: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    cap: float | None,
    loss_scale: torch.Tensor | None,
    keep_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the log-probability of the targets of one chunk, and the softmax over each tile of the vocabulary.

    states is (chunk, width), each tile (columns, width), target (chunk, 1). Returned are log_probability (chunk, 1)
    float32, error (chunk, 1), factors (chunk, number of tiles) that scale a tile's softmax to the vocabulary's, the
    softmaxes (chunk, columns), and for each tile (column of the target, whether the target is in the tile), both
    (chunk, 1). The error is the probability of the target minus 1. Error and softmaxes are multiplied by the slope of
    the cap, and by ``loss_scale`` before they are rounded.
    """
    tile, target_logit = len(tiles[0]), torch.zeros((), device=states.device)
    softmaxes, targets_in_tiles, maxima, sums = [], [], [], []
    for i, columns in enumerate(tiles):
        logits = states @ columns.T  # (chunk, columns)
        if bias is not None:
            logits += bias[i * tile : (i + 1) * tile]
        logits = transform_logits(logits, scale, cap)
        place = (target - i * tile).clamp(0, len(columns) - 1)
        is_here = target == place + i * tile
        targets_in_tiles.append((place, is_here))
        target_logit = torch.where(is_here, logits.gather(1, place).float(), target_logit)
        softmax = logits.softmax(1, dtype=torch.float32)
        maxima.append(logits.amax(1, keepdim=True).float())
        sums.append(1 / softmax.amax(1, keepdim=True))  # of exp(logits - maximum)
        if keep_softmax:
            softmaxes.append(_scale_gradient(softmax, logits, cap, loss_scale).to(states.dtype))
    maxima = torch.cat(maxima, 1)  # (chunk, number of tiles)
    maximum = maxima.amax(1, keepdim=True)
    tile_logsumexp = maxima - maximum + torch.cat(sums, 1).log()  # relative to the maximum
    logsumexp = tile_logsumexp.logsumexp(1, keepdim=True)
    factors = (tile_logsumexp - logsumexp).clamp_min(-60).exp()  # a divisor too; below exp(-60) nothing counts
    log_probability = target_logit - maximum - logsumexp
    # If the model is sure, probability - 1 is tiny. It has to be computed before anything is rounded.
    error = _scale_gradient(torch.expm1(log_probability), target_logit, cap, loss_scale)
    return log_probability, error, factors, softmaxes, targets_in_tiles


def _scale_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, cap: float | None, loss_scale: torch.Tensor | None
) -> torch.Tensor:
    """Multiply a gradient of logits in place by the slope of their soft cap, and by ``loss_scale``."""
    if cap is not None:
        gradient.addcmul_(gradient, (logits / cap).square_(), value=-1)  # 1 - tanh^2
    return gradient if loss_scale is None else gradient.mul_(loss_scale)
