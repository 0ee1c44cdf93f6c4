"""The cross-entropy of a linear head, computed with the logits of one chunk of tokens in memory at a time."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100  # F.cross_entropy and every Hugging Face model skip this label
ALIGNMENT = 64  # columns of logits on a GPU
CACHED_ROWS = 64  # of a tile, for each thread of a CPU: 2 MB of float32


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of `linear_cross_entropy`. The forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> torch.Tensor:
        nll, *gradients = linear_cross_entropy(*operands, needs_grad=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients, operands[6])
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *gradients, loss_scale = ctx.saved_tensors
        grad = grad if loss_scale is None else grad / loss_scale
        # A factor of 1 is usual. On a CPU, asking costs less than another pass over the gradient of a vocabulary.
        if grad.device.type != "cpu" or not grad.equal(torch.ones_like(grad)):
            gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        return *gradients, None, None, None, None, None


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
    compiled: bool = False,
    needs_grad: Sequence[bool] = (False, False, False),
    chunk: int | None = None,
    tile: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the cross-entropy of the logits, and the gradients of its sum.

    The logits are `transform_logits` of ``hidden @ weight.T + bias``. hidden is (tokens, width), weight (vocabulary,
    width), bias (vocabulary,) or None, targets (tokens,) int64. The cross-entropy is (tokens,) float32 in nats; it is
    0 for targets of -100. Other targets outside of the vocabulary raise IndexError, or on a GPU a device-side assert.
    ``loss_scale`` multiplies the gradients of hidden, weight and bias. One is None if its ``needs_grad`` is false.

    Logits exist for ``chunk`` tokens at a time. Between the products with the weight, compiled code reads them twice.
    In eager mode, a CPU computes them in tiles of ``tile`` columns. A tile is still in the cache for its exponentials.
    The softmax over the vocabulary is the softmax over a tile times exp(tile_logsumexp - logsumexp). This factor is
    applied to the narrow operands of the products.
    """
    device, vocabulary = hidden.device.type, len(weight)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # In float16, a small gradient would become 0 before its factor is applied.
    has_tiles = device == "cpu" and dtype is not torch.half and not compiled
    tile = tile if has_tiles else vocabulary
    chunk = chunk or (4096 if device == "cuda" and compiled else 1024)
    compute = _by_tiles if has_tiles else partial(_by_rows, compiled)
    options = {"scale": scale, "cap": cap, "loss_scale": loss_scale, "keeps_gradient": any(needs_grad)}
    tiles = weight.to(dtype).split(tile)
    known = torch.where(targets == IGNORED_LABEL, 0, targets)
    nll = F.embedding(known, hidden.new_zeros(vocabulary, 1)).squeeze(1).float()  # fails for any other target
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_grad[0] else None
    # The first chunk writes d_weight and later chunks add to it.
    empty = torch.empty_like if len(targets) else torch.zeros_like
    d_weight = empty(weight, dtype=torch.float32) if needs_grad[1] else None  # FSDP2's weight may have a shorter dtype
    d_bias = torch.zeros_like(bias) if needs_grad[2] else None
    with torch.autocast(device, enabled=False):
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            states, has_loss = hidden[rows], targets[rows, None] != IGNORED_LABEL
            operands = states.to(dtype), tiles, bias, targets[rows, None].clamp_min(0)
            log_probability, d_logits, factors = compute(*operands, **options)
            nll[rows] = (-log_probability * has_loss).squeeze(1)
            for i, gradient in enumerate(d_logits):
                factor = factors[:, i : i + 1] * (has_loss * scale)
                columns = slice(i * tile, (i + 1) * tile)
                if d_hidden is not None:
                    d_hidden[rows].addcmul_(gradient @ tiles[i], factor)
                if d_weight is not None:
                    _add_product(d_weight[columns], gradient, (states * factor).to(dtype), start == 0, device)
                if d_bias is not None:
                    d_bias[columns] += (gradient * factor).sum(0)
            gradient = d_logits.clear()  # None: no reference is left, so that two chunks never exist at once
    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
    return nll, *(None if gradient is None else gradient.to(of.dtype) for gradient, of in gradients)


def _add_product(
    total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor, is_first: bool, device: str
) -> None:
    """Add ``gradient.T @ states`` to ``total``, which is float32, or overwrite it if ``is_first``."""
    if device == "cuda":  # addmm does not round the product before it is added
        torch.addmm(total, gradient.T, states, out_dtype=torch.float32, beta=0 if is_first else 1, out=total)
    else:
        (total.copy_ if is_first else total.add_)(gradient.T @ states)


def _by_rows(
    compiled: bool,
    states: torch.Tensor,
    tiles: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    target: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Do as `_by_tiles` with one tile, the whole vocabulary."""
    (weight,) = tiles
    if states.device.type == "cuda":  # its kernels are fast if each row begins at a multiple of ALIGNMENT
        aligned = -(-len(weight) // ALIGNMENT) * ALIGNMENT
        logits = torch.mm(states, weight.T, out=states.new_empty(len(states), aligned)[:, : len(weight)])
    else:
        logits = states @ weight.T
    log_probability = (_compiled() if compiled else _replace_by_gradient)(logits, bias, target, **options)
    return log_probability, [logits] * options["keeps_gradient"], torch.ones_like(log_probability)


def _replace_by_gradient(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    cap: float | None,
    loss_scale: torch.Tensor | None,
    keeps_gradient: bool,
) -> torch.Tensor:
    """Return the log-probability of the targets, and replace ``logits`` by the gradient of its negative.

    logits is (chunk, vocabulary), target (chunk, 1) int64, log_probability (chunk, 1) float32.
    """
    values = transform_logits(logits if bias is None else logits + bias, scale, cap).float()
    logsumexp = values.logsumexp(1, keepdim=True)
    log_probability = values.gather(1, target) - logsumexp
    if keeps_gradient:
        # If the model is sure, probability - 1 is tiny. So compute it before rounding.
        is_target = torch.arange(logits.shape[1], device=logits.device) == target
        gradient = torch.where(is_target, torch.expm1(log_probability), (values - logsumexp).exp())
        logits.copy_(_scale_gradient(gradient, values, cap, loss_scale))
    return log_probability


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Return compiled `_replace_by_gradient`. The compiler takes a second to import."""
    return torch.compile(_replace_by_gradient)


def _by_tiles(
    states: torch.Tensor,
    tiles: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    cap: float | None,
    loss_scale: torch.Tensor | None,
    keeps_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return the log-probability of the targets of one chunk, and the gradient of its negative tile by tile.

    states is (chunk, width), each tile (columns, width), target (chunk, 1) int64. Return log_probability (chunk, 1)
    float32, for each tile the gradient of its logits (chunk, columns), and factors (chunk, number of tiles). The
    caller must multiply each gradient by its factor. Without ``keeps_gradient`` there are no gradients.
    """
    tile, target_logit = len(tiles[0]), torch.zeros((), device=states.device)
    gradients, targets_in_tiles, maxima, sums = [], [], [], []
    for i, columns in enumerate(tiles):
        logits = states @ columns.T  # (chunk, columns)
        if bias is not None:
            logits += bias[i * tile : (i + 1) * tile]
        place = (target - i * tile).clamp(0, len(columns) - 1)
        is_here = target == place + i * tile
        targets_in_tiles.append((place, is_here))
        at_target = transform_logits(logits.gather(1, place), scale, cap).float()
        target_logit = torch.where(is_here, at_target, target_logit)
        for part in logits.split(CACHED_ROWS * torch.get_num_threads()):  # a part's float32 numbers fit in the cache
            values = transform_logits(part, scale, cap).float()
            softmax = values.softmax(1)
            maxima.append(values.amax(1, keepdim=True))
            sums.append(1 / softmax.amax(1, keepdim=True))  # of exp(values - maximum)
            if keeps_gradient:
                part.copy_(_scale_gradient(softmax, values, cap, loss_scale))
        if keeps_gradient:
            gradients.append(logits)
    maxima, sums = (torch.cat(parts).view(len(tiles), -1).T for parts in (maxima, sums))  # (chunk, number of tiles)
    maximum = maxima.amax(1, keepdim=True)
    tile_logsumexp = maxima - maximum + sums.log()  # relative to the maximum
    logsumexp = tile_logsumexp.logsumexp(1, keepdim=True)
    factors = (tile_logsumexp - logsumexp).clamp_min(-60).exp()  # a divisor too; below exp(-60) nothing counts
    log_probability = target_logit - maximum - logsumexp
    # If the model is sure, probability - 1 is tiny. So compute it before rounding.
    error = _scale_gradient(torch.expm1(log_probability), target_logit, cap, loss_scale)
    for i, (gradient, (place, is_here)) in enumerate(zip(gradients, targets_in_tiles, strict=False)):
        corrected = (error / factors[:, i : i + 1]).to(gradient.dtype)
        gradient.scatter_(1, place, torch.where(is_here, corrected, gradient.gather(1, place)))
    return log_probability, gradients, factors


def _scale_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, cap: float | None, loss_scale: torch.Tensor | None
) -> torch.Tensor:
    """Multiply a gradient of logits in place by the slope of their soft cap, and by ``loss_scale``."""
    if cap is not None:
        gradient.addcmul_(gradient, (logits / cap).square_(), value=-1)  # 1 - tanh^2
    return gradient if loss_scale is None else gradient.mul_(loss_scale)
