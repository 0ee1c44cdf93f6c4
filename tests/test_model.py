import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import UserError
from data import TextFiles
from model import (
    ModelConfig,
    autocast,
    check_causal,
    check_model,
    count_predicted,
    load_config,
    load_model,
    load_tokenizer,
    next_token_nll,
    position_limit,
    resolve_precision,
)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 300}


def from_scratch(model_type: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**TINY, **settings}), dtype=torch.float32
    )


def test_nll_is_the_shifted_cross_entropy():
    model = tiny_gpt2(300).eval()
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5], labels[2, 11:] = -100, -100
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = sum(
            -F.log_softmax(logits[row, place - 1].double(), -1)[labels[row, place]].item()
            for row in range(3)
            for place in range(1, 20)
            if labels[row, place] != -100
        )
        assert next_token_nll(model, ids, labels).item() == pytest.approx(expected, rel=1e-6)
    assert count_predicted(labels) == 19 * 3 - 4 - 9


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba"])
def test_causal_models_pass_the_probe(model_type):
    model = from_scratch(model_type).train()
    check_causal(model, 24)
    assert model.training


def test_a_bert_that_looks_ahead_is_refused_and_a_decoder_is_not():
    with pytest.raises(UserError, match="not causal") as error:
        check_causal(from_scratch("bert", is_decoder=False), 24)
    assert "is_decoder" in str(error.value) and error.value.exit_code == 2
    check_causal(from_scratch("bert", is_decoder=True), 24)


def load(config, tokenizer):
    return load_model(config, load_config(config, tokenizer))


def test_position_limits():
    assert position_limit(tiny_gpt2(300)) == 64
    assert position_limit(from_scratch("mamba")) is None
    roberta = from_scratch("roberta", is_decoder=True, max_position_embeddings=40, pad_token_id=1)
    assert position_limit(roberta) == 38  # counts from padding_idx + 1 on
    roberta(input_ids=torch.randint(2, 300, (1, 38)))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.randint(2, 300, (1, 39)))


def test_blocks_and_vocabulary_must_fit(tokenizer):
    model = tiny_gpt2(len(tokenizer))
    check_model(model, tokenizer, 64)
    with pytest.raises(UserError, match="--block_size 65: gpt2 holds at most 64 positions"):
        check_model(model, tokenizer, 65)
    with pytest.raises(UserError, match="embedding has 310 rows"):
        check_model(tiny_gpt2(310), tokenizer, 64)


def test_master_weights_are_float32_whatever_the_checkpoint_holds(tmp_path, tokenizer):
    tiny_gpt2(len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(ModelConfig(model=str(tmp_path)), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_from_scratch_takes_the_tokenizer_and_the_overrides(tmp_path, tokenizer):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64}))
    for source in (tmp_path, path):
        config = ModelConfig(model_config=str(source), model_overrides='{"n_layer": 1}', tokenizer="given")
        model = load(config, tokenizer)
        assert model.config.n_layer == 1 and model.config.eos_token_id == tokenizer.eos_token_id
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    with pytest.raises(UserError, match="no setting n_layers"):
        load(ModelConfig(model_config=str(path), model_overrides='{"n_layers": 1}'), tokenizer)


def test_a_trained_tokenizer_writes_any_text(text_file, tokenizer, tmp_path):
    text = "Grüße, 東京 🙂\r\n\t\x07 never seen \ud7ff"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 320 and tokenizer.unk_token is None and tokenizer.eos_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    documents = TextFiles(((str(text_file), 0, None),))
    assert load_tokenizer(ModelConfig(tokenizer="train:320"), documents).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no model"),
        ({"model": "a", "model_config": "b"}, "exclude each other"),
        ({"model": "a", "tokenizer": "train:256"}, "at least 257"),
        ({"model": "a", "tokenizer": "train:many"}, "at least 257"),
        ({"model": "a", "model_overrides": "n_layer=4"}, "JSON object"),
        ({"model": "a", "model_overrides": "[4]"}, "JSON object"),
    ],
)
def test_wrong_model_settings(settings, words):
    broken = [message for holds, message in ModelConfig(**settings).rules() if not holds]
    assert len(broken) == 1 and words in broken[0]


def test_models_that_cannot_be_loaded(tmp_path, tokenizer):
    with pytest.raises(UserError, match="--model no/such-model: no model config"):
        load(ModelConfig(model="no/such-model"), tokenizer)
    tiny_gpt2(300).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(ModelConfig(model=str(tmp_path)), tokenizer)
    with pytest.raises(UserError, match="--tokenizer: a Hub id"):
        load_tokenizer(ModelConfig(model=str(tmp_path)), None)


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
    with pytest.raises(UserError, match="--precision fp16"):
        resolve_precision("fp16", cpu)
    with autocast(cpu, "bf16"):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast(cpu, "fp32"):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
