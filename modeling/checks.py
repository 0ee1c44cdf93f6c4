"""Check that a model fits the blocks and the vocabulary, and that it is causal."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError, out_of_memory, require, root_cause
from modeling.architectures import position_limit
from modeling.loss import evaluating, isolated, next_token_nll
from modeling.precision import autocast

FOUND = ("has_linear_head", "isolated_by", "generation_config")  # attributes that loading and checking a model leave


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    isolate_documents: bool = False,
    precision: str = "fp32",
) -> None:
    """Raises UserError unless the model can hold the blocks and the vocabulary, works in the precision, is causal, and
    keeps documents ``isolate_documents`` where it has to."""
    limit, rows = position_limit(model), model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    fits, largest_fits = limit is None or block_size <= limit, largest < rows
    require(fits, f"--block_size {block_size}: {model.config.model_type} holds at most {limit} positions; lower it")
    held = f"its largest id is {largest}, but the model's embedding has {rows} rows"
    require(largest_fits, f"tokenizer {tokenizer.name_or_path}: {held}; use the tokenizer that belongs to the model")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), evaluating(model), autocast(model.device, precision):
            next_token_nll(model, ids, ids)
    except RuntimeError as error:
        if precision == "fp32" or out_of_memory(error):
            raise
        fix = "give --precision fp32"
        raise UserError(
            f"--precision {precision}: {model.config.model_type} fails ({root_cause(error)}); {fix}"
        ) from error
    check_causal(model, block_size)
    if isolate_documents:
        check_isolated(model, block_size)


@torch.no_grad()
def check_causal(model: PreTrainedModel, block_size: int) -> None:
    """Raises UserError if a later token changes the logits of an earlier one.

    A model that sees the token it has to predict trains to a beautiful and worthless loss.
    """
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (1, block_size), generator=generator)
    half = max(1, block_size // 2)
    other = ids.clone()
    other[:, half:] = (ids[:, half:] + torch.randint(1, rows, (1, block_size - half), generator=generator)) % rows
    with evaluating(model):
        earlier, same = (
            model(input_ids=probe.to(model.device), use_cache=False).logits[:, :half].float() for probe in (ids, other)
        )
    leak = (earlier - same).abs().max() / earlier.abs().max().clamp_min(1e-6)
    if not leak <= max(1e-4, 4 * torch.finfo(model.dtype).eps):
        fix = {
            "cpmant": "it has no causal switch; choose another architecture",
            "reformer": "its hashing looks ahead; train it from scratch, with --model_config",
        }.get(
            model.config.model_type,
            "make it a decoder with --model_overrides '{\"is_decoder\": true}', or choose a causal architecture",
        )
        raise UserError(
            f"{model.config.model_type} is not causal here: changing later tokens moves earlier logits by {leak:.1e} "
            f"of their size, so its loss would be worthless; {fix}"
        )


@torch.no_grad()
def check_isolated(model: PreTrainedModel, block_size: int) -> None:
    """Finds what keeps documents in a block apart: position ids that begin again, or else a block-diagonal mask.

    Raises UserError where a change to one document moves the logits of the next one either way.
    """
    half, rows = max(1, block_size // 2), model.get_input_embeddings().num_embeddings
    ids, other = (torch.randint(rows, (1, 2 * half), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other[:, half:] = ids[:, half:]
    positions = torch.arange(half, device=model.device).repeat(2, 2)  # flash kernels pack where there is one row alone
    # Both only last: RoBERTa's positions do not begin with 0.
    for model.isolated_by in (["position_ids"], ["attention_mask"], ["attention_mask", "position_ids"]):
        try:
            with evaluating(model):
                later, same = (
                    model(
                        input_ids=probe.expand(2, -1).to(model.device), use_cache=False, **isolated(model, positions)
                    ).logits
                    for probe in (ids, other)
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):  # it takes nothing of the kind
            continue
        if (later - same)[:, half:].abs().max() <= 1e-5 * later.abs().max():
            return
    raise UserError(
        f"--pack documents: {model.config.model_type} sees the document before, be it with position ids that begin "
        f"again or with a block-diagonal mask; give --pack stream"
    )
