"""Adapters of any kind from peft: loaded with the same logits, merged, or refused. Frozen weights in bfloat16."""

import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_gpt2
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
)

from cli.errors import UserError
from distributed.empty import frozen_digest
from modeling.adapters import adapter_of, merge_adapter, save_adapter
from modeling.loading import load_pretrained, stored_dtype
from modeling.loss import next_token_nll
from modeling.precision import set_dtypes
from modeling.trained import LoraConfig, add_lora, freeze

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 64}
ALL = {"r": 4, "target_modules": "all-linear"}
QUERIES = {"target_modules": ["q_proj"]}
KINDS = {
    "modules to save": lambda: peft.LoraConfig(**ALL, modules_to_save=["lm_head", "embed_tokens"]),
    "a norm": lambda: peft.LoraConfig(**ALL, modules_to_save=["norm"]),
    "tokens": lambda: peft.LoraConfig(**ALL, trainable_token_indices=[97, 99]),
    "DoRA": lambda: peft.LoraConfig(**ALL, use_dora=True),
    "biases": lambda: peft.LoraConfig(**ALL, bias="lora_only"),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "both ends": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a larger vocabulary": lambda: peft.LoraConfig(r=4, **QUERIES, modules_to_save=["embed_tokens", "lm_head"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, **QUERIES),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, **QUERIES),
}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(80, 100)[None], use_cache=False).logits


def make_base(path, dtype=torch.float32, **changes):
    llama(**changes).to(dtype).save_pretrained(path)
    return str(path)


def adapt(base, config, path, num_rows=None):
    """Save an adapter with random weights, as peft does. Return the logits with it."""
    config.task_type = config.task_type or "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = base
    if num_rows:
        model.resize_token_embeddings(num_rows)
    wrapper = peft.get_peft_model(model, config)
    randomize(wrapper)
    wrapper.save_pretrained(path)
    return logits(wrapper)


@torch.no_grad()
def randomize(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_are_loaded_and_merged(kind, tied, dtype, tmp_path):
    base = make_base(tmp_path / "base", dtype, tie_word_embeddings=tied)
    num_rows = 104 if kind == "a larger vocabulary" else None
    expected = adapt(base, KINDS[kind](), tmp_path / "adapter", num_rows)
    name = str(tmp_path / "adapter")
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (plain - expected[..., :100]).abs().max() > 1e-4
    assert torch.equal(logits(load_pretrained(name)), expected)
    model = load_pretrained(name, linear=stored_dtype(name))
    assert stored_dtype(name) == dtype
    merge_adapter(model)
    assert type(model) is LlamaForCausalLM and adapter_of(model) is None
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=5e-6)


def test_what_is_no_sum_of_layers_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    adapt(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), tmp_path / "prompt")
    with pytest.raises(UserError, match=r"type PROMPT_TUNING changes more than layers.*Use an adapter of layers"):
        load_pretrained(str(tmp_path / "prompt"))
    adapt(base, peft.LoraConfig(**ALL), tmp_path / "lora")
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    first = next(iter(weights))
    for changed in (
        {key: t for key, t in weights.items() if key != first},
        weights | {"base_model.x": weights[first].clone()},
    ):
        save_file(changed, tmp_path / "lora/adapter_model.safetensors")
        with pytest.raises(UserError, match="missing or left over"):
            load_pretrained(str(tmp_path / "lora"))


def test_a_base_is_found_from_anywhere(tmp_path, monkeypatch):
    """The adapter has a relative path of its base. It is no id of the Hub and not relative to the working directory."""
    for name in ("here", "there"):
        monkeypatch.chdir(tmp_path)
        make_base(f"{name}/bases/small", hidden_size=32 if name == "here" else 64)
        monkeypatch.chdir(tmp_path / name)
        model = load_pretrained("bases/small")
        add_lora(model, LoraConfig(lora_rank=2))
        save_adapter(model, Path("runs/x/model"))
    config = json.loads(Path("runs/x/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./bases/small"
    for place in ("/", tmp_path / "here", tmp_path / "there"):
        monkeypatch.chdir(place)
        assert load_pretrained(str(tmp_path / "here/runs/x/model")).config.hidden_size == 32
    save_adapter(model, tmp_path / "far")
    config = json.loads((tmp_path / "far/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "there/bases/small")
    (tmp_path / "there/bases").rename(tmp_path / "moved")
    for adapter in ("far", "there/runs/x/model"):
        with pytest.raises(UserError, match=r"bases/small does not exist. Set base_model_name_or_path in its adapter_"):
            load_pretrained(str(tmp_path / adapter))


def test_what_has_no_sum_is_not_merged(tmp_path):
    base = make_base(tmp_path / "base")
    adapt(base, peft.LoraConfig(r=4, **QUERIES, lora_bias=True), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--model: an adapter of type LORA cannot be merged .*Use a LoRA adapter."):
        merge_adapter(load_pretrained(str(tmp_path / "adapter")))


def test_what_transformers_keeps_in_float32_is_exported_so():
    """The biases that choose experts are too large for the precision of bfloat16."""
    sizes = SMALL | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, first_k_dense_replace=0, moe_intermediate_size=16))
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    biases[0].copy_(torch.tensor([5.001, 5.002, 5.003, 5.004]))
    merge_adapter(model, torch.bfloat16)
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases[0].tolist() == pytest.approx([5.001, 5.002, 5.003, 5.004], abs=1e-5)
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_trained(tied, tokenizer, tmp_path):
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    model = load_pretrained(base)
    add_lora(model, LoraConfig(lora_rank=2), [98, 99])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    ids = torch.tensor([[98, 99, 5, 98, 99, 5, 98, 99]])
    for _ in range(3):
        optimizer.zero_grad()
        next_token_nll(model, ids, ids).backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    rows = [name for name in changed if "trainable_tokens_delta" in name]
    assert len(rows) == 2 - tied and all(".lora_" in name or name in rows for name in changed)
    assert all((p - before[n]).abs().sum(1).min() > 1e-3 for n, p in model.named_parameters() if n in rows)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(again), expected) and torch.equal(
        logits(load_pretrained(str(tmp_path / "adapter"))), expected
    )
    with pytest.raises(UserError, match=r"--add_tokens: the head of phi is more than a matrix.* Remove one of them."):
        phi = AutoModelForCausalLM.from_config(peft_phi())
        add_lora(phi, LoraConfig(lora_rank=2), [98, 99])


def peft_phi():

    return PhiConfig(**SMALL)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_linear_weights_keep_bfloat16_with_the_same_bits(tied, tmp_path):
    """With LoRA and with --freeze, loss and gradients equal those of float32 weights, in fewer bytes."""
    base = make_base(tmp_path / "base", torch.bfloat16, tie_word_embeddings=tied)
    ids = torch.arange(40, 72)[None]
    for train in (lambda m: add_lora(m, LoraConfig(lora_rank=2)), lambda m: freeze(m, ["model.layers.0.*"])):
        results, num_bytes, digests = [], [], set()
        for linear in (torch.float32, stored_dtype(base)):
            torch.manual_seed(0)
            model = load_pretrained(base, linear=linear)
            train(model)
            set_dtypes(model, linear, only_frozen=True)
            assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
            with torch.autocast("cpu", torch.bfloat16):
                loss = next_token_nll(model, ids, ids)
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
            num_bytes.append(sum(p.nbytes for p in model.parameters()))
            digests.add(frozen_digest(model))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(digests) == 1
        kept = sum(p.nbytes for n, p in model.named_parameters() if p.dtype == torch.bfloat16)
        assert kept and num_bytes[0] == num_bytes[1] + kept
        is_kept = not tied and not model.lm_head.weight.requires_grad
        assert (model.lm_head.weight.dtype == torch.bfloat16) == is_kept


def test_buffers_are_those_of_float32(tmp_path):
    """Gemma's scale of the embeddings is a buffer, and it would be rounded in bfloat16."""
    sizes = SMALL | {"hidden_size": 48, "head_dim": 8}
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).bfloat16().save_pretrained(tmp_path)
    exact, kept = load_pretrained(str(tmp_path)), load_pretrained(str(tmp_path), linear=stored_dtype(str(tmp_path)))
    assert stored_dtype(str(tmp_path)) == torch.bfloat16
    for (name, buffer), (_, other) in zip(exact.named_buffers(), kept.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype and torch.equal(buffer, other), name
    tiny_gpt2(100).save_pretrained(tmp_path / "fp32")
    assert stored_dtype(str(tmp_path / "fp32")) == torch.float32
