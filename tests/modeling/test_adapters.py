"""Save, load and merge adapters of every architecture, with the same logits."""

import json

import pytest
import torch
from architectures import GUIDE, TODAY

from model import ModelConfig, load_config, load_model
from modeling.adapters import merge_adapter, save_adapter
from modeling.architectures import DROPPED
from modeling.loading import load_pretrained
from modeling.trained import LoraConfig, add_lora

NAMES = {name: given for name, given in {**GUIDE, **TODAY}.items() if given[0] not in (*DROPPED, "cpmant")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_adapters(name, tokenizer, tmp_path):
    kind, sizes = NAMES[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    config = ModelConfig(model_config=str(tmp_path / "config.json"), tokenizer="train:320")
    torch.manual_seed(0)
    load_model(config, load_config(config, tokenizer, 32), tokenizer).save_pretrained(tmp_path / "base")
    model = load_pretrained(str(tmp_path / "base"))
    ids = torch.randint(len(tokenizer), (2, 32), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(model):
        return model.eval()(input_ids=ids, use_cache=False).logits

    plain = logits(model)
    add_lora(model, LoraConfig(lora_rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    for directory, tolerance in (("adapter", 1e-6), ("merged", 1e-4)):
        again = logits(load_pretrained(str(tmp_path / directory)))
        torch.testing.assert_close(again, adapted, rtol=tolerance, atol=tolerance)
