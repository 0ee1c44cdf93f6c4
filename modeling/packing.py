"""Several documents in one block: the attention that isolates them, and its inputs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AttentionMaskInterface, PreTrainedModel, masking_utils

FLEX = "flex_attention"


def ways_to_isolate(model: PreTrainedModel, keep_attention: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield (attention implementation, names of inputs) for each way that may isolate documents, the fastest first.

    Flash attention takes all documents as one row. FlexAttention skips the empty parts of a mask, and has no backward
    pass on a CPU. All other kinds get a dense mask. If ``keep_attention`` is true, the implementation does not change.
    """
    plain, masks = model.config._attn_implementation, AttentionMaskInterface()
    if masks.get(plain) is masks["flash_attention_2"]:  # any version of flash attention, even one from the Hub
        yield plain, ["cu_seq_lens", "position_ids"]
    elif not keep_attention and model._supports_flex_attn and model.device.type == "cuda":
        yield FLEX, ["position_ids"]
    # Both inputs together come last, because RoBERTa's positions do not begin with 0.
    for names in (["position_ids"], ["attention_mask"], ["attention_mask", "position_ids"]):
        yield plain, names


def isolate_with(model: PreTrainedModel, attention: str, names: list[str]) -> None:
    """Isolate documents with an attention implementation and the inputs ``names`` (see `isolation_inputs`)."""
    if attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    model.isolated_by = names


def describe_isolation(model: PreTrainedModel) -> str:
    """Return a few words on how the documents of a block are isolated."""
    attention, names = model.config._attn_implementation, model.isolated_by
    if "cu_seq_lens" in names:
        return f"{attention} with cu_seq_lens"
    return FLEX if attention == FLEX and "attention_mask" not in names else f"a dense mask for {attention}"


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the starts of all documents in the flattened batch and its end, int32, on the CPU.

    position_ids is (batch, sequence) int64. Each row and each 0 in it begin a document. The number of bounds is a power
    of two, so that compiled code meets few shapes. For that, the last documents may be empty.
    """
    begins = (position_ids == 0).cpu().numpy()
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    bounds = np.full(2 ** len(starts).bit_length(), begins.size, np.int32)
    bounds[: len(starts)] = starts
    return torch.from_numpy(bounds)


def with_document_bounds(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the bounds of documents to a batch on the CPU. Counting them on a device would make the host wait."""
    return batch | ({"cu_seq_lens": document_bounds(batch["position_ids"])} if "position_ids" in batch else {})


def isolation_inputs(
    model: PreTrainedModel, position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the keyword arguments with which no document of a block attends to another.

    position_ids is (batch, sequence) int64, with a 0 at the start of each document. None returns no arguments. For
    flash attention the arguments describe one row with all blocks.
    """
    if position_ids is None:
        return {}
    if "cu_seq_lens" in model.isolated_by:
        bounds = document_bounds(position_ids).to(position_ids.device) if cu_seq_lens is None else cu_seq_lens
        longest = position_ids.shape[1]  # an upper limit, so that the host does not wait for the longest document
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {"position_ids": position_ids.reshape(1, -1), **lengths}
    positions = {"position_ids": position_ids} if "position_ids" in model.isolated_by else {}
    if "attention_mask" not in model.isolated_by:  # transformers makes the mask from the position ids
        return positions
    document = (position_ids == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (batch, 1, sequence, sequence)
    return positions | {"attention_mask": torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)}


def isolated_output(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> Any:
    """Return the model's output for (batch, sequence) ids. With flash attention the output is one row of all blocks."""
    inputs = isolation_inputs(model, position_ids, cu_seq_lens)
    ids = input_ids.reshape(1, -1) if "cu_seq_lens_q" in inputs else input_ids
    document = None if position_ids is None or ids is not input_ids else (position_ids == 0).cumsum(-1)
    # On a CPU the search of transformers is cheap, and a block that holds one document then needs no mask.
    is_searched = document is not None and document.device.type == "cpu"
    with nullcontext() if is_searched else packed_as(document):
        return model(input_ids=ids, use_cache=False, **inputs)


@contextmanager
def packed_as(document: torch.Tensor | None) -> Iterator[None]:
    """Tell transformers the number of each token's document in its row, or None. Its own search waits for the device.

    transformers has no argument for this. If a new version renames its function, a step becomes slower.
    """
    detect = getattr(masking_utils, "find_packed_sequence_indices", None)
    masking_utils.find_packed_sequence_indices = lambda *_, **__: document
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = detect


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the attention that the model was loaded with. FlexAttention would compile each new length of a text.

    If `check_isolated` has chosen an implementation, the model has ``attentions``: the implementation that it was
    loaded with, and the one that isolates documents.
    """
    plain, packed = vars(model).get("attentions", ("", ""))
    if plain == packed:
        yield
        return
    model.set_attn_implementation(plain)
    try:
        yield
    finally:
        model.set_attn_implementation(packed)
