"""Check that a model fits the blocks and the vocabulary, works in the precision, and is causal."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import UserError, as_user_error, require, root_cause, warn
from modeling.architectures import num_rows, position_limit, smallest_window
from modeling.loss import evaluating, next_token_nll
from modeling.packing import isolate_with, isolated_output, ways_to_isolate
from modeling.precision import DTYPES, autocast

# Attributes that loading and checking set on a model. Ranks that load no weights copy them from rank 0.
PROBED_ATTRIBUTES = ("logit_transform", "isolated_by", "attentions", "generation_config")

SHORT_PROBE, LONG_PROBE = 32, 256  # tokens
PROBE_BYTES = 2**28  # the largest size of a batch of logits in float32


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    isolate_documents: bool = False,
    precision: str = "fp32",
    keep_attention: bool = False,
) -> None:
    """Raise UserError if the model cannot be trained with these settings.

    It must hold blocks of ``block_size`` tokens and every id of the tokenizer, work in ``precision`` and be causal.
    If ``isolate_documents`` is true, no document of a block may attend to another. This may change the model's
    attention implementation, unless ``keep_attention`` is true.
    """
    limit, rows = position_limit(model), num_rows(model)
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
        check_causal(model, block_size, precision)
        if isolate_documents:
            check_isolated(model, block_size, precision, keep_attention)
    except (RuntimeError, ValueError) as error:
        if as_user_error(error):
            raise
        fix = f"Use --precision {'bf16' if precision == 'fp32' else 'fp32'}, or train.py's --attn_implementation"
        raise UserError(f"--precision {precision}: {kind} fails ({root_cause(error)}). {fix}.") from error


def check_causal(model: PreTrainedModel, block_size: int, precision: str = "fp32") -> None:
    """Raise UserError if a later token changes the logits of an earlier one.

    A model that attends to the token that it predicts reaches a low loss and learns nothing.
    """
    short, *long = probe_lengths(model, block_size)
    with probing(model, precision):
        leaks = [leak(model, short, range(1, short))]
        leaks += [leak(model, length, [length * ninth // 9 for ninth in range(1, 9)]) for length in long]
    largest, kind = torch.stack(leaks).max(), model.config.model_type
    fix = "Use another precision or other weights."
    require(bool(largest.isfinite()), f"--precision {precision}: the logits of {kind} are not finite. {fix}")
    if largest > tolerance(model, precision):
        fix = "Use a causal architecture, or set is_decoder in the model's config (train.py: --model_overrides)."
        if kind in ("cpmant", "prophetnet"):
            fix = "Use another architecture; this one has no causal switch."
        elif kind == "reformer":
            fix = "Use --model_config to train it from scratch; its hashing attends to later tokens."
        moves = f"a change of later tokens moves earlier logits by {largest:.1e} of their size"
        raise UserError(f"{kind} is not causal: {moves}, so its loss would be worthless. {fix}")


def leak(model: PreTrainedModel, length: int, cuts: Sequence[int]) -> torch.Tensor:
    """Return how far logits before a cut move, relative to their size, if all tokens from the cut on change."""
    draw, rows = torch.Generator().manual_seed(0), num_rows(model)
    ids = torch.randint(rows, (length,), generator=draw)
    other = (ids + torch.randint(1, rows, (length,), generator=draw)) % rows
    leaks = []  # each batch has a row of unchanged tokens, so that all rows run on the same kernels and experts
    for some in torch.tensor(cuts).split(max(1, PROBE_BYTES // (4 * length * rows) - 1)):
        probes = torch.where(torch.arange(length) < some[:, None], ids, other)
        first, *others = model(input_ids=torch.cat([ids[None], probes]).to(model.device), use_cache=False).logits
        for cut, logits in zip(some, others, strict=True):
            move = (logits - first).abs()
            leaks.append(move[:cut].max() / size(first, move[cut:]))
    return torch.stack(leaks).max()


def check_isolated(
    model: PreTrainedModel, block_size: int, precision: str = "fp32", keep_attention: bool = False
) -> None:
    """Find the attention and the inputs that isolate the documents of a block, and use them (see `ways_to_isolate`).

    The names of the inputs become ``model.isolated_by``: position ids that restart at 0, a block-diagonal attention
    mask, or both; flash attention takes bounds. Raise UserError if every way fails. A way fails if it moves the logits
    of the first document, or if a change of that document moves the next one's.
    """
    half, rows = probe_lengths(model, block_size)[-1] // 2, num_rows(model)
    ids = torch.randint(rows, (2, 2 * half), generator=torch.Generator().manual_seed(0))
    ids[1, half:] = ids[0, half:]
    ids = ids.to(model.device)  # two rows, because flash kernels pack only a batch of one row
    positions = torch.arange(half, device=model.device).repeat(2, 2)
    plain, kind = model.config._attn_implementation, model.config.model_type
    with probing(model, precision):
        whole = model(input_ids=ids, use_cache=False).logits
        for attention, names in ways_to_isolate(model, keep_attention):
            if "attention_mask" in names and (smallest_window(model) or math.inf) < block_size:
                break  # the mask would replace the masks of the windows, which may be too long for a probe
            if not signature(model.forward).parameters.keys() >= {*names} - {"cu_seq_lens"}:
                continue  # Marian ignores unknown inputs, and no probe shows that if it ignores its tokens, too
            try:
                isolate_with(model, attention, names)
                logits = isolated_output(model, ids, positions).logits.view(*ids.shape, -1)
                if attention != plain:
                    check_backward(model, ids, positions)
            except Exception as error:  # the model takes no such input, or a compiler fails, with any exception
                if attention == plain and as_user_error(error):
                    raise  # such as memory that runs out
                if attention != plain:
                    warn(f"--pack documents: {kind} does not train with {attention} ({root_cause(error)})")
                continue
            move = (logits[0] - logits[1]).abs()
            largest = tolerance(model, precision) * size(whole, move[:half])
            is_same = (logits - whole)[:, :half].abs().max() <= 4 * largest  # other kernels round differently
            if is_same and move[half:].max() <= largest:
                model.attentions = plain, attention
                return
    raise UserError(f"--pack documents: {kind} attends across document boundaries. Use --pack stream.")


def check_backward(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Raise an error if a training pass fails. Some kernels have no dropout, or no backward pass on a device."""
    embedded: list[torch.Tensor] = []  # gradients of these alone, because gradients of weights take memory
    embed = model.get_input_embeddings().register_forward_hook(
        lambda layer, inputs, output: embedded.append(output.detach().requires_grad_()) or embedded[-1]
    )
    try:
        with torch.enable_grad():
            output = isolated_output(model.train(), ids, positions)
            torch.autograd.grad(output.logits.float().sum(), embedded[-1])
    finally:
        embed.remove()
        model.eval()


def probe_lengths(model: PreTrainedModel, block_size: int) -> list[int]:
    """Return the numbers of tokens to probe: 32, and up to 256 if blocks are longer than an attention window."""
    limit, rows = position_limit(model) or math.inf, num_rows(model)
    short, window = min(SHORT_PROBE, limit), smallest_window(model) or math.inf
    long = min(LONG_PROBE, block_size, limit, PROBE_BYTES // (8 * rows))  # two rows fit
    return [short, long] if window < block_size and long > short else [short]


@contextmanager
def probing(model: PreTrainedModel, precision: str) -> Iterator[None]:
    """Compute as in evaluation, with small weights amplified. With fresh weights, attention hardly moves the logits.

    Powers of two scale the output of each matrix up to the size of its input. At the end, weights have the same bits.
    Larger factors would make deep models chaotic.
    """
    head = model.get_output_embeddings()
    tables = {id(getattr(m, "weight", None)) for m in model.modules() if m is head or isinstance(m, torch.nn.Embedding)}
    with torch.no_grad(), evaluating(model), autocast(model.device, precision), ExitStack() as stack:
        for weight in model.parameters():
            if weight.ndim > 1 and id(weight) not in tables and type(weight) is torch.nn.Parameter:  # no shard
                scale = (weight.norm() / math.sqrt(len(weight))).log2().round().clamp(-10, 0).exp2().nan_to_num(1)
                if scale != 1:  # leave the weights of most pretrained models untouched
                    stack.callback(weight.mul_, scale)
                    weight.div_(scale)
        yield


def size(logits: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """Return the size to compare a move with: the largest expected ``move``, at least a quarter of the logits."""
    return torch.maximum(move.max(), logits.abs().max() / 4).clamp_min(1e-6)


def tolerance(model: PreTrainedModel, precision: str) -> float:
    """Return how far rounding moves logits, relative to their size: about 4 eps for 24 layers in bf16."""
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in (model.dtype, DTYPES[precision])))
