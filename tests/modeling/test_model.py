import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import GUIDE, TODAY
from conftest import ROOT, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.integrations import hub_kernels

from cli.errors import UserError
from corpus.flags import TextConfig
from corpus.sources import read_documents
from model import ModelConfig, load_config, load_model, load_tokenizer
from modeling.architectures import make_causal, position_limit, smallest_window
from modeling.checks import check_causal, check_isolated, check_model, probing
from modeling.linear_cross_entropy import _add_product, linear_cross_entropy
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import attention_kernel, count_predicted, linear_head, next_token_nll
from modeling.packing import isolation_inputs
from modeling.precision import autocast, resolve_precision
from modeling.trained import LoraConfig, add_lora
from training.flops import flops_per_token, peak_flops

OLD = transformers.__version__.startswith("5.17.")
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


def plain_nll(model, ids, labels):
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum", ignore_index=-100)


def gradients(model, nll):
    model.zero_grad()
    nll.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


HEADS = [
    ("gpt2", {}),  # tied
    ("llama", {"tie_word_embeddings": False}),
    ("phi", {}),  # with a bias
    ("bert", {"is_decoder": True}),  # with a transform before the head
    ("gemma2", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}),
    ("gemma3_text", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}),
    ("recurrent_gemma", {"logits_soft_cap": 2.0, "num_key_value_heads": 1, "lru_width": 32, "num_hidden_layers": 3}),
    ("cohere", {"logit_scale": 0.5}),
    ("cohere2", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 8.0}),
    ("granitemoe", {"logits_scaling": 4.0}),
    (
        "falcon_h1",
        {
            "lm_head_multiplier": 0.3,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "num_key_value_heads": 2,
        },
    ),
]


@pytest.mark.parametrize(("model_type", "settings"), HEADS, ids=[name for name, _ in HEADS])
def test_gradients_without_the_logits_are_those_of_cross_entropy(model_type, settings):
    model = from_scratch(model_type, pad_token_id=0, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that biases and soft caps matter
    ids = torch.randint(300, (3, 20))
    labels = ids.clone()
    labels[0, :5], labels[2, :] = -100, -100
    expected = plain_nll(model, ids, labels)
    wanted = gradients(model, expected)
    nll = next_token_nll(model, ids, labels)
    assert linear_head(model) is model.get_output_embeddings()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(model, nll)
    assert found.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * max(wanted[name].norm(), 1e-2 * largest), name
    with torch.no_grad():
        each = next_token_nll(model, ids, labels, reduction="none")
    assert each.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert int((each != 0).sum()) == count_predicted(labels)


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_model_that_is_sure_bf16_gives_what_cross_entropy_gives(compiled):
    """Probability - 1 is tiny for such a model. It must not be the difference of two rounded numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 64, generator=generator)
    targets = torch.randint(3000, (50,), generator=generator)
    for scale in (0.1, 0.2, 0.4):  # the mean loss is about 2.5, 1e-2 and 1e-8
        hidden = (scale * weight[targets]).requires_grad_()
        exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
        (wanted,) = torch.autograd.grad(exact, hidden)
        with autocast(torch.device("cpu"), "bf16"):
            plain = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
            with torch.compiler.set_stance("force_eager"):
                nll, d_hidden, *_ = linear_cross_entropy(
                    hidden, weight, None, targets, compiled=compiled, needs_grad=(True, True, False), tile=512
                )
            (theirs,) = torch.autograd.grad(plain.sum(), hidden)
        assert (nll >= -1e-6).all() and (nll - plain).abs().max() <= 1e-3 * plain.abs().max() + 1e-6
        assert (d_hidden - wanted).norm() <= 2 * (theirs - wanted).norm() + 1e-7


def test_a_frozen_head_gets_no_gradient():
    model = from_scratch("llama", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    ids = torch.randint(300, (2, 9))
    wanted = gradients(model, plain_nll(model, ids, ids))
    found = gradients(model, next_token_nll(model, ids, ids))
    assert found.keys() == wanted.keys() and "lm_head.weight" not in found
    assert all((found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm() for name in found)


def test_short_blocks_take_the_plain_attention_kernel_in_bf16_training_alone():
    short, long = torch.zeros(1, 128), torch.zeros(1, 129)
    kernels, model = torch.backends.cuda, tiny_gpt2(100)
    with autocast(torch.device("cpu"), "bf16"):
        for ids, plain in ((short, True), (long, False)):
            with attention_kernel(model, ids):
                assert kernels.flash_sdp_enabled() is not plain
        with torch.no_grad(), attention_kernel(model, short):
            assert kernels.flash_sdp_enabled()
    with attention_kernel(model, short):
        assert kernels.flash_sdp_enabled()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("chunk", "tile"), [(1, 300), (7, 64), (64, 7), (1000, 1000)])
def test_any_chunk_and_tile_size(chunk, tile, compiled):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).mul_(2).requires_grad_() for shape in ((100, 16), (300, 16), (300,))
    )
    targets = torch.randint(300, (100,), generator=generator)
    targets[::3] = -100
    F.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum").backward()
    with torch.compiler.set_stance("force_eager"):
        nll, *found = linear_cross_entropy(
            hidden, weight, bias, targets, compiled=compiled, needs_grad=(True, True, True), chunk=chunk, tile=tile
        )
    assert nll.allclose(F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    for gradient, operand in zip(found, (hidden, weight, bias), strict=True):
        assert (gradient - operand.grad).norm() <= 1e-5 * operand.grad.norm()
    sizes = {"chunk": chunk, "tile": tile}
    assert (
        linear_cross_entropy(hidden, weight, bias, targets, needs_grad=(True, False, False), **sizes)[2:] == (None,) * 2
    )


@pytest.mark.parametrize("settings", [{}, {"final_logit_softcapping": 2.0}], ids=["plain", "capped"])
def test_in_float16_gradients_of_chunks_have_the_loss_scale(settings):
    """They are as near to float32's as the gradients of whole logits, and infinite if the scale is too large."""
    model = from_scratch("gemma2", head_dim=16, num_key_value_heads=2, **settings).eval()
    ids = torch.randint(300, (4, 20))
    exact = gradients(model, next_token_nll(model, ids, ids))
    errors = []
    for in_chunks, scale in ((True, 2.0**6), (False, 2.0**6), (True, 2.0**30)):
        loss_scale = torch.tensor(scale)
        with torch.autocast("cpu", dtype=torch.half):
            nll = next_token_nll(model, ids, ids, loss_scale=loss_scale) if in_chunks else plain_nll(model, ids, ids)
        found = gradients(model, nll * loss_scale)
        errors.append(max((found[n] / scale - exact[n]).norm() / (exact[n].norm() + 1e-3) for n in exact))
    assert errors[0] <= 1.5 * errors[1] < 0.05 and not errors[2] < torch.inf
    # float16 holds no probability below 6e-8. It holds the probability times the scale.
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator) for size in (4, 5000))
    targets, needs = torch.zeros(4, dtype=torch.int64), (False, True, False)
    hidden *= 2
    exact = linear_cross_entropy(hidden, weight, None, targets, needs_grad=needs)[2][1:]
    with torch.autocast("cpu", dtype=torch.half):
        scaled, unscaled = (
            linear_cross_entropy(hidden, weight, None, targets, loss_scale=torch.tensor(scale), needs_grad=needs)[2][1:]
            / scale
            for scale in (2.0**15, 1.0)
        )
    missed = [((found == 0) & (exact.abs() > 1e-10)).float().mean() for found in (scaled, unscaled)]
    assert 5 * missed[0] < missed[1] > 0.1, missed


@pytest.mark.parametrize("label", [300, 10**6, -1, -101])
def test_a_label_out_of_range_is_an_error(label):
    model, ids = tiny_gpt2(300), torch.randint(300, (2, 8))
    labels = ids.clone()
    labels[1, 3] = label
    with pytest.raises(IndexError):
        next_token_nll(model, ids, labels)
    with torch.no_grad(), pytest.raises(IndexError):
        next_token_nll(model, ids, labels, reduction="none")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_trained_tokens_stays_in_chunks(tied):
    """peft wraps the head. The gradients of the trained rows equal those of cross-entropy."""
    model = from_scratch("llama", tie_word_embeddings=tied)
    add_lora(model, LoraConfig(lora_rank=2), [298, 299])
    ids = torch.randint(290, 300, (2, 20))
    wanted = gradients(model, plain_nll(model, ids, ids))
    nll = next_token_nll(model, ids, ids)
    assert linear_head(model) is model.lm_head and type(model.lm_head) is not torch.nn.Linear
    found = gradients(model, nll)
    assert sum("trainable_tokens" in name for name in found) == 2 - tied and found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


DBRX = {"d_model": 32, "n_heads": 2, "n_layers": 2, "output_router_logits": True}
DBRX["attn_config"] = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
DBRX["ffn_config"] = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("mixtral", EXPERTS), ("jetmoe", EXPERTS | {"kv_channels": 16}), ("dbrx", DBRX), ("granitemoe", EXPERTS)],
)
def test_the_router_loss_is_added_in_training(model_type, settings):
    if model_type != "mixtral" and OLD:
        pytest.skip("transformers 5.17 returns no router loss of it")
    model, ids = from_scratch(model_type, **settings), torch.randint(300, (2, 8))
    losses = [next_token_nll(mode(model), ids, ids) for mode in (lambda m: m.eval(), lambda m: m.train())]
    assert losses[1] > losses[0]
    losses[1].backward()


def test_a_head_with_hooks_is_not_plain():
    model = tiny_gpt2(300)
    assert linear_head(model) is model.lm_head
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.tanh())
    assert linear_head(model) is None


def test_without_gradients_a_sum_makes_none():
    model, ids = from_scratch("llama", tie_word_embeddings=False), torch.randint(300, (2, 9))
    with torch.no_grad():
        each, whole = (next_token_nll(model, ids, ids, reduction=reduction) for reduction in ("none", "sum"))
    assert not whole.requires_grad and whole.item() == pytest.approx(each.sum().item(), rel=1e-6)


def test_logits_never_exist_as_a_whole():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    sizes = {"vocab_size": 20_000, "head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
    for model in (tiny_gpt2(20_000, n_positions=256), from_scratch("gemma2", **sizes)):
        ids = torch.randint(300, (16, 256))
        linear_head(model)
        with Sizes() as found, autocast(torch.device("cpu"), "bf16"):
            loss = next_token_nll(model, ids, ids)
            loss.backward()
        assert found.largest <= 1024 * 8192 < ids.numel() * 20_000 / 9
        assert loss.item() == pytest.approx(plain_nll(model, ids, ids).item(), rel=2e-3)


def test_freed_memory_is_not_given_back_to_the_system():
    code = """
import resource, torch
from modeling.precision import keep_freed_memory
keep_freed_memory()
for _ in range(20):  # the heap takes up to 5 allocations to reach its final size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB, 16,384 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(faults.split()[-1]) < 1000, faults


def test_flops_are_those_of_palm_and_peaks_those_of_datasheets():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))  # 124 M parameters, 12 layers of 768
    assert flops_per_token(model, 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA A10") == 125e12
    unknown = ("NVIDIA A10G", "CPU (2 threads)", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert [peak_flops(name) for name in unknown] == [None] * 3
    wide = from_scratch("llama", head_dim=32, num_attention_heads=4)
    multiplied = wide.num_parameters() - wide.get_input_embeddings().weight.numel()  # not tied to the head
    assert flops_per_token(wide, 10) == 6 * multiplied + 12 * 2 * (4 * 32) * 10
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    no_attention = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    assert flops_per_token(no_attention, 10) == 6 * no_attention.num_parameters()  # the embedding is tied to the head
    assert flops_per_token(from_scratch("mixtral", num_key_value_heads=2), 10) is None
    sizes = {"hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    unknown = AutoModelForCausalLM.from_config(AutoConfig.for_model("prophetnet", vocab_size=300, **sizes))
    assert flops_per_token(unknown, 10) is None  # its config has no number of layers


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


def of_the_suite(name, **more):
    """Return a tiny model of an architecture of the suite, made causal for blocks of 64 tokens."""
    kind, sizes = {**GUIDE, **TODAY}[name]
    settings = AutoConfig.for_model(kind, **{**sizes, "vocab_size": 300, "pad_token_id": 0, **more})
    make_causal(settings, new_block_size=64)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", [2, 4])
def test_prophetnet_whose_first_position_sees_the_second_token_is_refused(layers, precision):
    """Its relative positions mix positions and heads. Fresh weights hide that, and so does a late cut."""
    model = of_the_suite("ProphetNet", num_decoder_layers=layers)
    for block_size in (2, 32):  # generate.py passes 2
        with pytest.raises(UserError, match=r"prophetnet is not causal.*Use another architecture"):
            check_causal(model, block_size, precision)


class LeakyGPT2(GPT2LMHeadModel):
    """A GPT-2 with a leak: the logits at one position see one later token."""

    position, token = 0, 1

    def forward(self, input_ids, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        if input_ids.shape[1] > max(self.position, self.token):
            output.logits[:, self.position] += 10 * self.transformer.wte.weight[input_ids[:, self.token], :1]
        return output


@pytest.mark.parametrize(("position", "token"), [(0, 1), (0, 31), (30, 31), (14, 17)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_leak_at_any_cut_is_found(position, token, precision):
    torch.manual_seed(0)
    model = LeakyGPT2(tiny_gpt2(300).config)
    model.position, model.token = position, token
    with pytest.raises(UserError, match="gpt2 is not causal"):
        check_causal(model, 64, precision)


def test_a_leak_beyond_32_tokens_is_found_if_the_config_names_a_window():
    torch.manual_seed(0)
    model = LeakyGPT2(tiny_gpt2(300).config)
    model.position, model.token = 5, 60
    check_causal(model, 64)
    model.config.sliding_window = 40
    with pytest.raises(UserError, match="gpt2 is not causal"):
        check_causal(model, 64)
    check_causal(model, 32)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_gpt2(300)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(UserError, match=r"the logits of gpt2 are not finite. Use another precision"):
        check_causal(model, 32)


@pytest.mark.parametrize("name", ["GPT-2", "LLaMA", "Mixtral", "XLNet"])
def test_the_probes_leave_mode_and_weights_as_they_were(name):
    """The probes amplify small weights, but not the weights of the embeddings and the head."""
    model = of_the_suite(name).train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with probing(model, "fp32"):
        changed = [weight for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert len(changed) >= 8 and tables.isdisjoint(map(id, changed))
    check_causal(model, 64, "bf16")
    with pytest.raises(ZeroDivisionError), probing(model, "fp32"):
        raise ZeroDivisionError
    assert model.training and all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_logits_of_a_batch_of_probes_stay_below_256_mb(monkeypatch):
    """Every vocabulary is probed at every cut, in as many batches as necessary."""
    model, shapes = tiny_gpt2(300), []
    model.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    monkeypatch.setattr("modeling.checks.num_rows", lambda _: 262_144)  # only the choice of random ids depends on it
    model.get_input_embeddings().forward = lambda ids: F.embedding(ids % 300, model.transformer.wte.weight)
    check_causal(model, 64)
    assert {length for _, length in shapes} == {32} and sum(rows - 1 for rows, _ in shapes) == 31
    assert all(rows * length * 262_144 * 4 <= 2**28 for rows, length in shapes)


def test_the_probes_run_in_the_precision_of_the_run_on_short_blocks(tokenizer):
    """Flash attention does not take float32, and blocks of 16k tokens need much memory."""
    model, seen = tiny_gpt2(len(tokenizer), n_positions=16384), []
    forward = model.transformer.h[0].attn.forward

    def takes_half_precision(hidden_states, **inputs):
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only supports fp16 and bf16")
        seen.append(hidden_states.shape)
        return forward(hidden_states, **inputs)

    model.transformer.h[0].attn.forward = takes_half_precision
    check_model(model, tokenizer, 16384, isolate_documents=True, precision="bf16")
    assert max(length for _, length, _ in seen) == 32
    with pytest.raises(UserError, match=r"--precision fp32: gpt2 fails .FlashAttention only.*Use --precision bf16, or"):
        check_model(model, tokenizer, 16384)


def load(config, tokenizer):
    return load_model(config, load_config(config, tokenizer, 32), tokenizer)


LEARNED = ["BART", "BERT", "BioGpt", "CodeGen", "CTRL", "Data2VecText", "GPT-2", "GPT-J", "GPT Neo", "Marian", "MPT"]
LEARNED += ["OPT", "Pegasus", "ProphetNet", "Reformer", "RemBERT", "RoBERTa", "TrOCR", "XLM", "XLM-RoBERTa-XL", "X-MOD"]


@pytest.mark.parametrize("name", LEARNED)
def test_position_limits(name):
    """A block of the largest length works, and one more token fails. Rotary positions have no limit."""
    model = of_the_suite(name, **({"pad_token_id": 1} if "RoBERTa" in name else {}))
    limit = position_limit(model)
    assert 60 < limit <= 64
    with torch.no_grad():
        model(input_ids=torch.randint(2, 300, (1, limit)), use_cache=False)
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.randint(2, 300, (1, limit + 1)), use_cache=False)


def test_some_architectures_have_no_position_limit():
    assert position_limit(from_scratch("mamba")) is None and position_limit(of_the_suite("BLOOM")) is None


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
    documents = read_documents(TextConfig(), "--files", [str(text_file)])
    assert load_tokenizer(ModelConfig(tokenizer="train:320"), documents).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--model: missing"),
        ({"model": "a", "model_config": "b"}, "exclude each other"),
        ({"model": "a", "tokenizer": "train:256"}, "between 257"),
        ({"model": "a", "tokenizer": "train:many"}, "between 257"),
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
    with pytest.raises(UserError, match="Use a directory or Hub id with tokenizer"):
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


# The inputs that isolate documents. Other architectures of the guide need the same ones.
ISOLATED_BY = {"gpt2": "position_ids", "llama": "position_ids", "gemma2": "position_ids"}
ISOLATED_BY |= {"gpt_neox": "position_ids", "qwen3": "position_ids", "bert": "attention_mask"}
ISOLATED_BY |= {"opt": "attention_mask and position_ids"}


GROUPED = {"head_dim": 16, "num_key_value_heads": 1}


@pytest.mark.parametrize(("kind", "way"), ISOLATED_BY.items())
def test_a_document_does_not_see_the_one_before_it_in_its_block(kind, way):
    """Changing one document changes no logit of the next. Loss and gradients equal those of separate documents."""
    more = {"bert": {"is_decoder": True}, "qwen3": GROUPED, "gemma2": GROUPED}
    model = from_scratch(kind, **more.get(kind, {}))
    check_isolated(model, 24)
    assert " and ".join(model.isolated_by) == way
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(3))
    lengths = [7, 1, 12, 4]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    labels = ids.masked_fill(positions == 0, -100)
    changed = ids.clone()
    changed[:, :8] = (ids[:, :8] + 1) % 50
    model.eval()
    with torch.no_grad():
        first, second = (
            next_token_nll(model, each, labels, positions, reduction="none").reshape(2, -1) for each in (ids, changed)
        )
    torch.testing.assert_close(first[:, 8:23], second[:, 8:23], rtol=1e-6, atol=1e-6)
    assert (first[:, :7] - second[:, :7]).abs().max() > 1e-3
    if "position_ids" in way:
        packed = gradients(model, next_token_nll(model, ids, labels, positions))
        parts = ids.split(lengths, dim=1)
        alone = gradients(model, sum(next_token_nll(model, part, part) for part in parts if part.shape[1] > 1))
        for name in alone:
            torch.testing.assert_close(packed[name], alone[name], rtol=1e-4, atol=1e-5)


def test_an_input_that_the_model_ignores_isolates_nothing():
    model = of_the_suite("Marian")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-6)  # positions hide its tokens, as after a few steps
    check_isolated(model, 24)
    assert model.isolated_by == ["attention_mask"]


WINDOWED = {"Cohere2": "sliding_window", "EXAONE 4": "sliding_window", "Gemma 2": "sliding_window"}
WINDOWED |= {
    "Gemma 3": "sliding_window",
    "gpt-oss": "sliding_window",
    "GPT Neo": "window_size",
    "AFMoE": "sliding_window",
}
WINDOWED |= {"Llama 4": "attention_chunk_size", "Mistral": "sliding_window", "ModernBERT Decoder": "sliding_window"}
WINDOWED |= {"OLMo 3": "sliding_window", "RecurrentGemma": "attention_window_size", "Mixtral": "sliding_window"}


@pytest.mark.parametrize(("name", "window"), WINDOWED.items())
def test_isolated_documents_keep_their_windows(name, window, monkeypatch):
    """A document that is longer than the window has the same logits in its block as alone, or it is refused."""
    monkeypatch.setitem(
        TODAY, "AFMoE", ("afmoe", {**TODAY["Mistral"][1], "moe_intermediate_size": 32, "num_experts": 8})
    )
    if name == "Llama 4" and OLD:
        pytest.skip("transformers 5.17 counts chunks from the start of the block")
    model = of_the_suite(name, **{window: 8})
    assert smallest_window(model) == 8
    try:
        check_isolated(model, 64)
    except UserError as error:
        assert "Use --pack stream" in str(error) and name in ("AFMoE", "gpt-oss", "RecurrentGemma")
        if name == "AFMoE":  # only its mask isolates documents, and the mask replaces the windows
            check_isolated(of_the_suite(name, sliding_window=64), 64)
        return
    ids = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)
    with torch.no_grad():
        packed = model(input_ids=ids, use_cache=False, **isolation_inputs(model, positions)).logits
        for part in (slice(0, 20), slice(20, 50)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_documents_that_cannot_be_isolated_are_refused(kind):
    with pytest.raises(UserError, match=f"--pack documents: {kind} attends across .*Use --pack stream"):
        check_isolated(from_scratch(kind), 24)


def test_added_tokens_begin_at_the_mean(model_dir, text_file):
    config = ModelConfig(model=str(model_dir), add_tokens=["<note>", "<end>"])
    tokenizer = load_tokenizer(config, read_documents(TextConfig(), "--files", [str(text_file)]))
    before = load_pretrained(str(model_dir)).get_input_embeddings().weight
    model = load(config, tokenizer)
    weight = model.get_input_embeddings().weight
    assert tokenizer.convert_tokens_to_ids(["<note>", "<end>"]) == [len(before), len(before) + 1]
    assert torch.equal(weight[:-2], before) and weight.shape[0] == model.config.vocab_size == len(before) + 2
    torch.testing.assert_close(weight[-2:], before.mean(0).expand(2, -1))
    assert model.get_output_embeddings().weight is weight
    with pytest.raises(UserError, match=r"--add_tokens <.endoftext.>: the tokenizer has it already"):
        load_tokenizer(ModelConfig(model=str(model_dir), add_tokens=["<|endoftext|>"]), None)


def test_attention_of_ones_choice(model_dir, tokenizer):
    model = load(ModelConfig(model=str(model_dir), attn_implementation="eager"), tokenizer)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"nonsense") as error:
        load(ModelConfig(model=str(model_dir), attn_implementation="nonsense"), tokenizer)
    assert "--attn_implementation" in str(error.value)


def test_a_mixture_of_experts_keeps_its_router_loss():
    """It is added once per predicted token, because the sum is divided by their number. It is for training only."""
    model = from_scratch("mixtral", num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=0.5)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()
    expected = 0.5 * model(input_ids=ids).aux_loss
    trained = next_token_nll(model, ids, ids)
    model.eval()
    torch.testing.assert_close(trained - next_token_nll(model, ids, ids), expected * 30)


@pytest.mark.parametrize("name", ["someone/kernel:func", "flash_attention_2", "unknown"])
def test_an_attention_that_the_config_names_is_not_used(name, model_dir, tmp_path, monkeypatch):
    """A kernel of the Hub would run code, and other kernels may be missing. Without the flag, transformers chooses."""
    shutil.copytree(model_dir, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(settings | {"attn_implementation": name}))
    monkeypatch.setattr(
        hub_kernels, "load_and_register_attn_kernel", lambda *_, **__: pytest.fail("a kernel was loaded")
    )
    model = load_pretrained(str(tmp_path / "model"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_pretrained(str(model_dir))(ids).logits)
    kind, sizes = GUIDE["RoBERTa"]  # RoBERTa is tried without a padding id
    scratch = {"model_type": kind, **sizes, "vocab_size": 320, "pad_token_id": None, "attn_implementation": name}
    (tmp_path / "scratch.json").write_text(json.dumps(scratch))
    config = ModelConfig(model_config=str(tmp_path / "scratch.json"))
    load_config(config, load_tokenizer_by_name(str(model_dir), "--model"), 16)
    (fault,) = [words for holds, words in ModelConfig(model="a", attn_implementation="a/b").rules() if not holds]
    assert fault.startswith("--attn_implementation a/b: a kernel of the Hub runs code of its own. Use sdpa")


def test_gradients_of_weights_are_added_in_float32_on_cuda(monkeypatch):
    """The shapes, strides and dtypes of the products need no GPU."""
    seen, original = [], torch.addmm

    def addmm(total, left, right, **options):
        shapes = original(*(x.to("meta") for x in (total, left, right)), out_dtype=options["out_dtype"])
        seen.append((shapes.dtype, options["beta"], left.stride()))
        options["out"].copy_(left.float() @ right.float() + options["beta"] * total.nan_to_num())

    monkeypatch.setattr(torch, "addmm", addmm)
    total = torch.full((5, 4), math.nan)
    for is_first in (True, False):
        gradient, states = torch.ones(3, 64, dtype=torch.bfloat16)[:, :5], torch.ones(3, 4, dtype=torch.bfloat16)
        _add_product(total, gradient, states, is_first, "cuda")
    assert total.eq(6).all() and seen == [(torch.float32, 0, (1, 64)), (torch.float32, 1, (1, 64))]
