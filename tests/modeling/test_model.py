import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cli.errors import UserError
from corpus.flags import TextConfig
from corpus.sources import read_documents
from model import ModelConfig, load_config, load_model, load_tokenizer
from modeling.architectures import flops_per_token, position_limit
from modeling.checks import check_causal, check_isolated, check_model
from modeling.linear_cross_entropy import linear_cross_entropy
from modeling.loading import load_pretrained
from modeling.loss import attention_kernel, count_predicted, linear_head, next_token_nll
from modeling.precision import autocast, peak_flops, resolve_precision

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


@pytest.mark.parametrize(
    ("model_type", "settings", "is_plain"),
    [
        ("gpt2", {}, True),  # tied
        ("llama", {"tie_word_embeddings": False}, True),
        ("phi", {}, True),  # with a bias
        ("bert", {"is_decoder": True}, True),  # with a transform before the head
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}, False),
        ("cohere", {"logit_scale": 0.5}, False),
    ],
)
def test_gradients_without_the_logits_are_those_of_cross_entropy(model_type, settings, is_plain):
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
    assert (linear_head(model) is not None) is is_plain
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


def test_of_a_model_that_is_sure_bf16_gives_what_cross_entropy_gives():
    """Probability - 1 is tiny there. It must not be the difference of two rounded numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 64, generator=generator)
    targets = torch.randint(3000, (50,), generator=generator)
    for scale in (0.1, 0.2, 0.4):  # the mean loss is about 2.5, 1e-2 and 1e-8
        hidden = (scale * weight[targets]).requires_grad_()
        exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
        (wanted,) = torch.autograd.grad(exact, hidden)
        with autocast(torch.device("cpu"), "bf16"):
            plain = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
            nll, d_hidden, *_ = linear_cross_entropy(hidden, weight, None, targets, (True, True, False), tile=512)
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


@pytest.mark.parametrize(("chunk", "tile"), [(1, 300), (7, 64), (64, 7), (1000, 1000)])
def test_any_chunk_and_tile_size(chunk, tile):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).mul_(2).requires_grad_() for shape in ((100, 16), (300, 16), (300,))
    )
    targets = torch.randint(300, (100,), generator=generator)
    targets[::3] = -100
    F.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum").backward()
    nll, *found = linear_cross_entropy(hidden, weight, bias, targets, (True, True, True), chunk, tile)
    assert nll.allclose(F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    for gradient, operand in zip(found, (hidden, weight, bias), strict=True):
        assert (gradient - operand.grad).norm() <= 1e-5 * operand.grad.norm()
    assert linear_cross_entropy(hidden, weight, bias, targets, (True, False, False), chunk, tile)[2:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_in_float16_the_head_is_left_to_the_loss_scale(dtype):
    """Its gradient is a sum over many tokens. It fits in float16 only after it is scaled."""
    model, ids = tiny_gpt2(300), torch.randint(300, (1, 8))
    found = []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: found.append("forward" in vars(head)))
    linear_head(model)
    found.clear()
    with torch.autocast("cpu", dtype=dtype):
        next_token_nll(model, ids, ids)
    assert found == [dtype is torch.bfloat16]


def test_a_head_with_hooks_is_not_plain():
    model = tiny_gpt2(300)
    assert linear_head(model) is model.lm_head
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.tanh())
    assert linear_head(model) is None


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_step_reads_nothing_back_from_the_device(model_type):
    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            self.number += operation is torch.ops.aten._local_scalar_dense.default
            return operation(*arguments, **(options or {}))

    model, ids = from_scratch(model_type), torch.randint(300, (2, 9))
    linear_head(model)
    with Reads() as reads:
        next_token_nll(model, ids, ids).backward()
    assert reads.number == 0


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

    model, ids = tiny_gpt2(20_000, n_positions=256), torch.randint(300, (16, 256))
    linear_head(model)
    with Sizes() as sizes, autocast(torch.device("cpu"), "bf16"):
        loss = next_token_nll(model, ids, ids)
        loss.backward()
    assert sizes.largest <= 1024 * 8192 < ids.numel() * 20_000 / 9
    logits_nll = plain_nll(model, ids, ids).item()
    assert loss.item() == pytest.approx(logits_nll, rel=2e-3)


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
    assert flops_per_token(wide, 10) == 6 * wide.num_parameters() + 12 * 2 * (4 * 32) * 10
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    no_attention = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    assert flops_per_token(no_attention, 10) == 6 * no_attention.num_parameters()
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


def load(config, tokenizer):
    return load_model(config, load_config(config, tokenizer, 32), tokenizer)


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


# The inputs that isolate documents. The other architectures of the guide need no others.
ISOLATED_BY = {"gpt2": "position_ids", "llama": "position_ids", "gemma2": "position_ids"}
ISOLATED_BY |= {"gpt_neox": "position_ids", "qwen3": "position_ids", "bert": "attention_mask"}
ISOLATED_BY |= {"opt": "attention_mask and position_ids"}


GROUPED = {"head_dim": 16, "num_key_value_heads": 1}


@pytest.mark.parametrize(("kind", "way"), ISOLATED_BY.items())
def test_a_document_does_not_see_the_one_before_it_in_its_block(kind, way):
    """A change of one document moves no logit of the next. Loss and gradients equal those of separate documents."""
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
    """It is added once a predicted token, because the sum is divided by their number; in training only."""
    model = from_scratch("mixtral", num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=0.5)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()
    expected = 0.5 * model(input_ids=ids).aux_loss
    trained = next_token_nll(model, ids, ids)
    model.eval()
    torch.testing.assert_close(trained - next_token_nll(model, ids, ids), expected * 30)
