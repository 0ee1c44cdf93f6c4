"""Generate token ids with nothing but the settings that are asked for."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from modeling.architectures import num_rows


def generate_ids(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, settings: dict, **options: Any) -> Any:
    """Call model.generate with ``settings`` alone; ids and mask are (batch, width).

    By default it adds settings of the model's files, such as penalties. A router loss would fail with a mask.
    """
    own, options = model.generation_config, options | {"attention_mask": mask.to(model.device)}
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        options["output_router_logits"] = False
    model.generation_config = GenerationConfig(**settings)
    try:
        return model.generate(ids.to(model.device), generation_config=model.generation_config, **options)
    finally:
        model.generation_config = own


def ignores_padding(model: PreTrainedModel) -> bool:
    """Return whether masked tokens on the left leave the logits of four steps unchanged. A model is probed once."""
    if "ignores_padding" not in vars(model):
        rows, tolerance = num_rows(model), max(1e-3, 4 * torch.finfo(model.dtype).eps)
        ids = torch.randint(rows, (1, 4), generator=torch.Generator().manual_seed(0))
        settings = {"max_new_tokens": 4, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
        model.ignores_padding = True
        for prompt in (ids, ids[:, :1]):  # some models differ only if the prompt is one token
            inputs = prompt, torch.ones_like(prompt)
            padded = (torch.nn.functional.pad(tensor, (3, 0)) for tensor in inputs)
            alone, with_padding = (
                torch.stack(generate_ids(model, *each, settings).logits) for each in (inputs, padded)
            )
            model.ignores_padding &= bool((alone - with_padding).abs().max() <= tolerance * alone.abs().max())
    return model.ignores_padding
