"""Check that a model fits the blocks and the vocabulary, works in the precision, and is causal."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError, out_of_memory, require, root_cause
from modeling.architectures import position_limit
from modeling.loss import evaluating, isolation_inputs, next_token_nll
from modeling.precision import autocast

# Attributes that loading and checking set on a model. Ranks that load no weights copy them from rank 0.
PROBED_ATTRIBUTES = ("has_linear_head", "isolated_by", "generation_config")


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    isolate_documents: bool = False,
    precision: str = "fp32",
) -> None:
    """Raise UserError if the model cannot be trained with these settings.

    It must hold blocks of ``block_size`` tokens and every id of the tokenizer, work in ``precision`` and be causal.
    If ``isolate_documents`` is true, no document of a block may attend to another.
    """
    limit, rows = position_limit(model), model.get_input_embeddings().num_embeddings
    largest, kind = max(tokenizer.get_vocab().values()), model.config.model_type
    too_long = f"--block_size {block_size}: {kind} holds at most {limit} positions. Lower --block_size."
    require(limit is None or block_size <= limit, too_long)
    too_large = f"its largest id is {largest}, but the embedding has {rows} rows"
    fix = "Use the tokenizer that belongs to the model."
    require(largest < rows, f"tokenizer {tokenizer.name_or_path}: {too_large}. {fix}")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), evaluating(model), autocast(model.device, precision):
            next_token_nll(model, ids, ids)
    except RuntimeError as error:
        if precision == "fp32" or out_of_memory(error):
            raise
        problem = f"--precision {precision}: {kind} fails ({root_cause(error)})"
        raise UserError(f"{problem}. Use --precision fp32.") from error
    check_causal(model, block_size)
    if isolate_documents:
        check_isolated(model, block_size)


@torch.no_grad()
def check_causal(model: PreTrainedModel, block_size: int) -> None:
    """Raise UserError if a later token changes the logits of an earlier one.

    A model that attends to the token that it predicts reaches a low loss and learns nothing.
    """
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (1, block_size), generator=generator)
    half = max(1, block_size // 2)
    other = ids.clone()
    other[:, half:] = (ids[:, half:] + torch.randint(1, rows, (1, block_size - half), generator=generator)) % rows
    with evaluating(model):
        before, after = (
            model(input_ids=probe.to(model.device), use_cache=False).logits[:, :half].float() for probe in (ids, other)
        )
    leak = (before - after).abs().max() / before.abs().max().clamp_min(1e-6)
    if not leak <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
        fix = {
            "cpmant": "Use another architecture; this one has no causal switch.",
            "reformer": "Use --model_config to train it from scratch; its hashing attends to later tokens.",
        }.get(
            model.config.model_type,
            "Use a causal architecture, or set is_decoder in the model's config (train.py: --model_overrides).",
        )
        raise UserError(
            f"{model.config.model_type} is not causal: a change of later tokens moves earlier logits by {leak:.1e} "
            f"of their size, so its loss would be worthless. {fix}"
        )


@torch.no_grad()
def check_isolated(model: PreTrainedModel, block_size: int) -> None:
    """Find the inputs that isolate the documents of a block, and store their names as ``model.isolated_by``.

    These are position ids that restart at 0, a block-diagonal attention mask, or both. Raise UserError if a change of
    one document moves the logits of the next one with any of them.
    """
    half, rows = max(1, block_size // 2), model.get_input_embeddings().num_embeddings
    ids, other = (torch.randint(rows, (1, 2 * half), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other[:, half:] = ids[:, half:]
    positions = torch.arange(half, device=model.device).repeat(2, 2)  # flash kernels pack only a batch of one row
    # Both come last, because RoBERTa's positions do not begin with 0.
    for model.isolated_by in (["position_ids"], ["attention_mask"], ["attention_mask", "position_ids"]):
        inputs = isolation_inputs(model, positions)
        try:
            with evaluating(model):
                before, after = (
                    model(input_ids=probe.expand(2, -1).to(model.device), use_cache=False, **inputs).logits
                    for probe in (ids, other)
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):  # the model takes no such input
            continue
        if (before - after)[:, half:].abs().max() <= 1e-5 * before.abs().max():
            return
    raise UserError(
        f"--pack documents: {model.config.model_type} attends across document boundaries. Use --pack stream."
    )


def has_unused_weights(model: PreTrainedModel, ids: torch.Tensor, precision: str) -> bool:
    """Return whether a backward pass leaves a trained weight without a gradient. DDP would wait for it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with autocast(ids.device, precision):
        nll = next_token_nll(model, ids, ids)
    return any(gradient is None for gradient in torch.autograd.grad(nll, trained, allow_unused=True))
