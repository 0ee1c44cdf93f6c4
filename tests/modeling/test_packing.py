"""Documents in one block: flash attention gets their bounds, FlexAttention a block mask, all others a dense mask."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import from_scratch, gradients, plain_nll
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from benchmarks.contenders import HostSyncs
from cli.errors import UserError
from data import block_item, collate
from distributed.world import World
from generate import SamplingConfig, generate
from modeling.checks import check_isolated, check_model
from modeling.compile import uncompiled
from modeling.loss import next_token_nll
from modeling.packing import describe_isolation, isolate_with, isolated_output, packed_as, ways_to_isolate
from training.plan import Plan

WINDOW = {"num_key_value_heads": 1, "sliding_window": 8}
MODELS = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": {"num_key_value_heads": 1},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": WINDOW | {"head_dim": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": WINDOW | {"head_dim": 16, "num_hidden_layers": 6},
}
VARLEN = ["cu_seq_lens", "position_ids"]


def model_of(kind):
    model = from_scratch(kind, pad_token_id=0, **MODELS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so the result depends on which token attends to which
    return model


def batch_of(*lengths, rows=0, length=0):
    """Return a batch of blocks, given the lengths of the documents of each block."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(1, 300, sum(block)) for block in lengths]
    positions = [np.concatenate([np.arange(n) for n in block]) for block in lengths]
    return collate([block_item(*block) for block in zip(ids, positions, strict=True)], rows, length, True)


BATCH = ((20, 1, 9), (30,), (3, 19))  # documents longer than a window, a document of one token, a short block


def attend(query, key, value, visible, scaling=None, softcap=None):
    """Attend in plain torch. Shapes are (batch, heads, tokens, width)."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


@pytest.fixture
def flash(monkeypatch):
    """Replace the flash kernels by attention inside of cu_seq_lens. Return the arguments of each call."""
    calls = []

    def attention(
        module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **arguments
    ):
        calls.append(SimpleNamespace(mask=attention_mask, rows=len(query), window=sliding_window, **arguments))
        bounds = calls[-1].cu_seq_lens_q.numpy() if hasattr(calls[-1], "cu_seq_lens_q") else [0, query.shape[2]]
        parts = []
        for first, end in pairwise(bounds):
            distance = torch.arange(end - first)[:, None] - torch.arange(end - first)
            visible = (distance >= 0) & (distance < (sliding_window or torch.inf))
            part = (each[:, :, first:end] for each in (query, key, value))
            parts.append(attend(*part, visible, scaling, softcap))
        return torch.cat(parts, 2).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "varlen_stand_in", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "varlen_stand_in", flash_attention_mask)
    return calls


@pytest.fixture
def flex(monkeypatch):
    """Replace FlexAttention by one with a backward pass on the CPU. Let `ways_to_isolate` see a CUDA device."""

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **_):
        if dropout:
            raise ValueError("`flex_attention` does not support `dropout`.")
        tokens = query.shape[2]
        visible = create_mask(attention_mask.mask_mod, len(query), 1, tokens, tokens, device="cpu")
        return attend(query, key, value, visible, scaling, softcap).transpose(1, 2), None

    def ways(model, keep_attention):
        seen = SimpleNamespace(
            config=model.config, device=torch.device("cuda"), _supports_flex_attn=model._supports_flex_attn
        )
        return ways_to_isolate(seen, keep_attention)

    monkeypatch.setattr("modeling.checks.ways_to_isolate", ways)
    with uncompiled(True):
        yield lambda **fixed: monkeypatch.setitem(
            AttentionInterface._global_mapping, "flex_attention", lambda *tensors, **k: attention(*tensors, **k | fixed)
        )


def compare(model, batch, attention, names, tolerance=1e-4):
    """Assert that loss and gradients equal those of the dense mask."""
    isolate_with(model, model.config._attn_implementation, ["position_ids"])
    dense = next_token_nll(model, **batch)
    wanted = gradients(model, dense)
    isolate_with(model, attention, names)
    nll = next_token_nll(model, **batch)
    torch.testing.assert_close(nll, dense, rtol=1e-5, atol=1e-5)
    found = gradients(model, nll)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("kind", MODELS)
def test_flash_attention_gets_the_bounds_of_the_documents_of_one_row(kind, flash):
    """Loss and gradients equal those of the dense mask. The batch is padded with blocks and with tokens."""
    model, batch = model_of(kind).train(), batch_of(*BATCH, rows=4, length=32)
    starts = [0, 20, 21, 30, 31, 32, 62, 63, 64, 67, *range(86, 128)]
    assert batch["cu_seq_lens"].tolist() == starts + [128] * (64 - len(starts))
    compare(model, batch, "varlen_stand_in", VARLEN)
    assert len(flash) == model.config.num_hidden_layers
    for call in flash:
        assert call.rows == 1 and call.mask is None and call.max_length_q == call.max_length_k == 32
        assert call.cu_seq_lens_q is call.cu_seq_lens_k is batch["cu_seq_lens"]
        assert call.cu_seq_lens_q.dtype is torch.int32
    assert any(call.window == 8 for call in flash) == ("sliding_window" in MODELS[kind])
    # Documents alone have the same loss. So no token is predicted across a border of documents or blocks.
    with torch.no_grad():
        parts = [row.split(lengths) for row, lengths in zip(batch["input_ids"], [(20, 1, 9, 2), (30, 2)], strict=False)]
        alone = sum(plain_nll(model, part[None], part[None]) for row in parts for part in row[:-1] if len(part) > 1)
        two = {key: tensor[:2] for key, tensor in batch.items() if key != "cu_seq_lens"}
        torch.testing.assert_close(next_token_nll(model, **two), alone, rtol=1e-4, atol=1e-4)


def test_the_bounds_of_documents_matter(flash):
    model, batch = model_of("llama"), batch_of(*BATCH)
    isolate_with(model, "varlen_stand_in", VARLEN)
    with torch.no_grad():
        right = next_token_nll(model, **batch)
        derived = next_token_nll(model, **{key: tensor for key, tensor in batch.items() if key != "cu_seq_lens"})
        wrong = next_token_nll(model, **batch | {"cu_seq_lens": torch.tensor([0, 30, 60, 90], dtype=torch.int32)})
    assert torch.equal(right, derived) and abs(wrong - right) > 1e-2


def test_a_step_with_documents_reads_nothing_back_from_the_device(flash):
    model, batch = model_of("gemma2"), batch_of(*BATCH)
    isolate_with(model, model.config._attn_implementation, ["position_ids"])
    with torch.no_grad():
        searched = isolated_output(model, batch["input_ids"], batch["position_ids"]).logits
        with HostSyncs(facts := {}):
            isolated_output(model, batch["input_ids"], batch["position_ids"])
        assert facts["syncs"] > 0  # the search, which is skipped on other devices than a CPU
        with HostSyncs(facts := {}), packed_as((batch["position_ids"] == 0).cumsum(1)):
            known = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        assert facts["syncs"] == 0 and torch.equal(known, searched)
    isolate_with(model, "varlen_stand_in", VARLEN)
    next_token_nll(model, **batch)
    with HostSyncs(facts := {}):
        next_token_nll(model, **batch).backward()
    assert facts["syncs"] == 0


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "gpt2"])
def test_flex_attention_has_the_loss_of_the_dense_mask(kind, flex):
    """Evaluation uses the real FlexAttention, not compiled. Training uses a stand-in with its masks."""
    model, batch = model_of(kind), batch_of(*BATCH, rows=4, length=32)
    plain = model.config._attn_implementation
    with torch.no_grad():
        losses = []
        for attention in (plain, "flex_attention"):
            isolate_with(model.eval(), attention, ["position_ids"])
            losses.append(next_token_nll(model, **batch, reduction="none"))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="CPU"):
        next_token_nll(model.train(), **batch)
    flex()
    model.set_attn_implementation(plain)
    compare(model, batch, "flex_attention", ["position_ids"])


@pytest.mark.slow
def test_compiled_flex_attention_has_the_loss_of_the_dense_mask():
    model, losses = model_of("gemma2").eval(), []
    with torch.no_grad():
        for attention in ("eager", "flex_attention"):
            isolate_with(model, attention, ["position_ids"])
            losses.append(next_token_nll(model, **batch_of(*BATCH), reduction="none"))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_fastest_attention_is_tried_first():
    """Flash attention comes first if the user names it, FlexAttention on CUDA. The user's choice can be kept."""
    dense = [["position_ids"], ["attention_mask"], ["attention_mask", "position_ids"]]

    def ways(attention, device="cuda", supports=True, keep=False):
        config = SimpleNamespace(_attn_implementation=attention)
        stub = SimpleNamespace(config=config, device=torch.device(device), _supports_flex_attn=supports)
        return list(ways_to_isolate(stub, keep))

    for attention in ("sdpa", "eager", "flex_attention"):
        fallback = [(attention, names) for names in dense]
        assert ways(attention) == [("flex_attention", ["position_ids"]), *fallback]
        assert ways(attention, "cpu") == ways(attention, supports=False) == ways(attention, keep=True) == fallback
    for attention in ("flash_attention_2", "flash_attention_3"):
        assert ways(attention, keep=True) == [(attention, VARLEN), *((attention, names) for names in dense)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_probe_verifies_flash_attention(kind, flash):
    model = model_of(kind)
    model.set_attn_implementation("varlen_stand_in")
    check_isolated(model, 64, keep_attention=True)
    assert model.isolated_by == VARLEN and describe_isolation(model) == "varlen_stand_in with cu_seq_lens"
    assert any(hasattr(call, "cu_seq_lens_q") for call in flash)


def test_flash_attention_is_refused_if_the_model_ignores_the_bounds(flash, monkeypatch):
    model = model_of("llama")
    model.set_attn_implementation("varlen_stand_in")
    forward = model.forward
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    monkeypatch.setattr(
        model, "forward", lambda input_ids, position_ids=None, attention_mask=None, **inputs: forward(
            input_ids, position_ids=position_ids, **{k: v for k, v in inputs.items() if k not in names}
        ),
    )  # fmt: skip
    with pytest.raises(UserError, match="--pack documents: llama attends across document boundaries"):
        check_isolated(model, 64, keep_attention=True)


def test_flex_attention_is_used_on_cuda_but_not_to_generate(flex, tokenizer):
    """The probe verifies isolation, windows and caps with it. Generation uses the previous attention."""
    flex()
    model = from_scratch("gemma2", pad_token_id=0, **MODELS["gemma2"] | {"vocab_size": len(tokenizer)})
    check_model(model, tokenizer, 64, isolate_documents=True)
    assert model.config._attn_implementation == describe_isolation(model) == "flex_attention"
    used = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: used.append(model.config._attn_implementation))
    generate(model, tokenizer, ["the loss"], SamplingConfig(max_new_tokens=2))
    assert set(used) == {"eager"} and model.config._attn_implementation == "flex_attention"
    model.set_attn_implementation("eager")
    check_isolated(model, 64, keep_attention=True)
    assert describe_isolation(model) == "a dense mask for eager"


def test_without_a_backward_pass_or_dropout_flex_attention_is_not_used(flex, capsys):
    model = model_of("llama")
    check_isolated(model, 64)  # the real FlexAttention, which does not train on a CPU
    assert describe_isolation(model) == "a dense mask for sdpa" and model.attentions == ("sdpa", "sdpa")
    assert "llama does not train with flex_attention (" in (warning := capsys.readouterr().err) and "CPU" in warning
    flex()
    model = from_scratch("llama", pad_token_id=0, attention_dropout=0.1)
    check_isolated(model, 64)
    assert describe_isolation(model) == "a dense mask for sdpa" and "dropout" in capsys.readouterr().err
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_a_model_that_needs_a_mask_keeps_its_attention(kind, flex):
    flex()
    model = from_scratch(kind, **{"is_decoder": True} if kind == "bert" else {})
    check_isolated(model, 24)
    assert "attention_mask" in model.isolated_by and describe_isolation(model) == "a dense mask for sdpa"


def test_an_attention_that_drops_caps_is_not_used(flex):
    flex(softcap=None)
    model = model_of("gemma2")
    check_isolated(model, 64)
    assert describe_isolation(model) == "a dense mask for eager"


class Text(list):
    counted_documents, total = "1 document", 1


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_plan_names_the_attention(pack):
    model = model_of("llama")
    isolate_with(model, "sdpa", ["position_ids"])
    model.is_compiled = False
    settings = {"model": "a", "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "output_dir": "b"}
    settings |= {"schedule": "linear", "min_learning_rate": 0.0}
    config = SimpleNamespace(**settings, dry_run=False, pack=pack)
    data, held_out = SimpleNamespace(blocks="9 blocks", steps_per_epoch=lambda _: 2), Text()
    held_out.stream = held_out
    plan = Plan(config, World(), model.device, "fp32", model, None, data, held_out, 2, 0)
    isolation = ", documents isolated by a dense mask for sdpa" if pack == "documents" else ""
    assert f"\ntraining  9 blocks{isolation}\n" in str(plan)
