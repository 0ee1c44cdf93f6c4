"""The arithmetic of a token, and the peak arithmetic of a device."""

from transformers import PreTrainedModel

# Dense bfloat16 FLOP/s from the datasheets, by the words in a device's name. The first match counts.
PEAK_FLOPS = {
    "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip


def flops_per_token(model: PreTrainedModel, block_size: int) -> float | None:
    """Return the FLOPs per token of a forward and backward pass, or None if the formula does not apply.

    They are 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B): N parameters, L layers, H heads of width Q,
    blocks of T tokens. N leaves out an input embedding that is not tied to the head: it is looked up, not multiplied.
    The formula does not apply to mixtures of experts, sliding windows or frozen weights.
    """
    config = model.config.get_text_config(decoder=True)
    values = config.to_dict()
    layers, heads, width, head_width = (
        values.get(config.attribute_map.get(name, name))
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim")
    )
    mixed = set(values.get("layer_types") or ()) - {"full_attention"} or any("experts" in name for name in values)
    if mixed or not isinstance(layers, int) or not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    attention = 12 * layers * heads * (head_width or width / heads) * block_size if isinstance(heads, int) else 0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is embedding
    return 6 * (model.num_parameters() - (0 if is_tied else embedding.numel())) + attention


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device by PyTorch's name for it, or None if unknown, as for a MIG slice."""
    words = set(device_name.replace("-", " ").split())
    fitting = (peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split()) and "MIG" not in words)
    return next(fitting, None)
