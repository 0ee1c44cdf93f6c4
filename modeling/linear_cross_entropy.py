"""The cross-entropy of a linear head, with the logits of one chunk of tokens in memory at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100  # what F.cross_entropy and every Hugging Face model skip


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of `linear_cross_entropy`, whose gradients are made together with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        nll, *gradients = linear_cross_entropy(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if gradient is None else gradient.mul_(grad) for gradient in ctx.saved_tensors), None


@torch.no_grad()
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    wanted: Sequence[bool] = (False, False, False),
    chunk: int = 1024,
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The cross-entropy (tokens,) in nats of logits ``hidden @ weight.T + bias``, and the gradients of its sum.

    hidden is (tokens, width), weight (vocabulary, width), bias (vocabulary,) or None, targets (tokens,), of which -100
    counts nothing; gradients that are not ``wanted`` are None. Logits exist for ``chunk`` tokens at a time; a CPU makes
    them ``tile`` columns at a time, which are still in its cache when their exponentials are taken. Softmax is a tile's
    softmax times exp(tile_logsumexp - logsumexp); this second factor goes to the narrow operands of the products.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    tile = tile or (8192 if device == "cpu" else len(weight))
    tiles = weight.to(dtype).split(tile)
    nll = torch.empty(len(targets), device=hidden.device)
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    empty = torch.empty_like if len(targets) else torch.zeros_like  # the first chunk writes it, later ones add to it
    d_weight = empty(weight, dtype=torch.float32) if wanted[1] else None  # the weights may be less, as fsdp's copies
    d_bias = torch.zeros_like(bias) if wanted[2] else None
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        states, known, target = hidden[rows], targets[rows, None] != IGNORED_LABEL, targets[rows, None].clamp_min(0)
        operand, target_logit = states.to(dtype), torch.zeros((), device=hidden.device)
        softmaxes, places, tops, totals = [], [], [], []
        for i, columns in enumerate(tiles):
            logits = operand @ columns.T  # (chunk, tile)
            if bias is not None:
                logits += bias[i * tile : (i + 1) * tile]
            place = (target - i * tile).clamp(0, len(columns) - 1)  # of the target, if this tile holds it
            places.append((place, target == place + i * tile))
            target_logit = torch.where(places[-1][1], logits.gather(1, place).float(), target_logit)
            softmax = logits.softmax(1, dtype=torch.float32)
            tops.append(logits.amax(1, keepdim=True).float())
            totals.append(1 / softmax.amax(1, keepdim=True))  # of exp(logits - top)
            if any(wanted):
                softmaxes.append(softmax.to(dtype))
        tops = torch.cat(tops, 1)  # (chunk, number of tiles)
        largest = tops.amax(1, keepdim=True)
        tile_logsumexp = tops - largest + torch.cat(totals, 1).log()
        logsumexp = tile_logsumexp.logsumexp(1, keepdim=True)  # like the tiles', less the largest logit
        log_probability = target_logit - largest - logsumexp
        nll[rows] = (-log_probability * known).squeeze(1)
        if not any(wanted):
            continue
        factors = (tile_logsumexp - logsumexp).clamp_min(-60).exp()  # what is less counts nothing, and divides below
        for i, (columns, softmax, (place, holds)) in enumerate(zip(tiles, softmaxes, places, strict=True)):
            factor = factors[:, i : i + 1]
            # Where a model is sure, probability - 1 is tiny: it has to be made before anything is rounded.
            error = (torch.expm1(log_probability) / factor).to(dtype)
            softmax.scatter_(1, place, torch.where(holds, error, softmax.gather(1, place)))
            factor = factor * known
            if d_hidden is not None:
                d_hidden[rows].addcmul_(softmax @ columns, factor)
            if d_weight is not None:
                part = d_weight[i * tile : (i + 1) * tile]
                (part.add_ if start else part.copy_)(softmax.T @ (states * factor).to(dtype))
            if d_bias is not None:
                d_bias[i * tile : (i + 1) * tile] += (softmax * factor).sum(0)
    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
    return nll, *(None if gradient is None else gradient.to(of.dtype) for gradient, of in gradients)
