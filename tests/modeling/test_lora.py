"""Adapters, frozen weights, and runs that begin with the weights of another run."""

import json
import shutil

import pytest
import torch
from conftest import load_shards, read_jsonl, run_script, tiny_gpt2
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from cli.errors import UserError
from distributed.empty import frozen_digest
from modeling.adapters import merge_adapter, save_adapter
from modeling.loading import load_pretrained
from modeling.trained import LoraConfig, add_lora, freeze

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 64}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits


def train_adapters(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("make", [lambda: tiny_gpt2(100), llama, mixtral])
def test_an_adapter_is_saved_loaded_and_merged_with_the_same_logits(make, tmp_path):
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = load_pretrained(str(tmp_path / "base"))
    plain = logits(model)
    add_lora(model, LoraConfig(lora_rank=4))
    torch.testing.assert_close(logits(model), plain)  # a new adapter changes nothing
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained) and not any("head" in name for name in trained)
    train_adapters(model)
    adapted, before = logits(model), frozen_digest(model)
    assert (adapted - plain).abs().max() > 1e-2

    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "adapter/model.safetensors").exists()
    torch.testing.assert_close(logits(load_pretrained(str(tmp_path / "adapter"))), adapted, rtol=0, atol=1e-6)
    assert frozen_digest(model) == before
    merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
    assert {*merged.state_dict()} == {*base.state_dict()}


def test_layers_by_name_and_their_scale():
    model = llama()
    add_lora(model, LoraConfig(lora_rank=2, lora_alpha=6, lora_targets=["q_proj"]))
    layers = {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    layer = model.model.layers[0].self_attn.q_proj
    train_adapters(model)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * product)
    with pytest.raises(UserError, match=r"--lora_targets nothing: .*Use names from"):
        add_lora(llama(), LoraConfig(lora_rank=2, lora_targets=["nothing"]))


def test_an_adapter_of_one_of_two_tied_matrices_is_refused():
    for target in ("lm_head", "wte"):
        with pytest.raises(UserError, match=f"--lora_targets c_attn {target}: embedding and head share one matrix"):
            add_lora(tiny_gpt2(100), LoraConfig(lora_rank=2, lora_targets=["c_attn", target]))


def test_rules():
    assert [holds for holds, _ in LoraConfig(lora_rank=8, lora_alpha=8).rules()] == [True, True, True]
    (holds, words), *_ = LoraConfig(lora_alpha=8, lora_targets=["a"]).rules()
    assert not holds and words == "--lora_alpha, --lora_targets: no effect without --lora_rank. Pass --lora_rank 8."
    assert not LoraConfig(lora_rank=8, freeze=["*"]).rules()[1][0]


def test_frozen_parameters():
    model = tiny_gpt2(100)
    assert frozen_digest(model) == 0
    freeze(model, ["transformer.wte*", "*.bias"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n == "transformer.wte.weight" or n.endswith(".bias")}
    for patterns, words in (
        (["wte"], "no parameter matches. Use a name such as transformer.wte.weight"),
        (["*"], "no parameter is left to train"),
    ):
        with pytest.raises(UserError, match=words):
            freeze(model, patterns)


@pytest.fixture(scope="module")
def arguments(model_dir, jsonl_file):
    given = ["--model", model_dir, "--train_files", jsonl_file, "--text_column", "answers.text", "--block_size", 32]
    return [*given, "--max_documents", 20, "--save_every", 4, "--eval_every", 4, "--precision", "fp32"]


def test_runs_with_adapters(arguments, model_dir, tmp_path):
    """A resumed run ends with the same bits. Its checkpoints hold no frozen weight."""
    lora = ["--lora_rank", 4, "--lora_dropout", 0.1, "--learning_rate", 1e-2, "--gradient_checkpointing"]
    flags = [*arguments, *lora, "--max_steps", 8, "--keep", "last", "--resume"]
    done = run_script("train.py", *flags, "--output_dir", "whole", cwd=tmp_path)
    assert done.returncode == 0 and "M of them trained" in done.stdout, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-000008")
    done = run_script("train.py", *flags, "--output_dir", "parts", cwd=tmp_path)
    assert done.returncode == 0 and "resuming from parts/checkpoints/step-000004" in done.stdout, done.stderr
    weights, again = (load_shards(tmp_path / run / "checkpoints/step-000008/weights") for run in ("whole", "parts"))
    assert weights and all(".lora_" in name and torch.equal(weights[name], again[name]) for name in weights)
    losses = [record["loss"] for record in read_jsonl(tmp_path / "whole/metrics.jsonl") if record["split"] == "eval"]
    assert losses[-1] < losses[0]
    adapter = tmp_path / "whole/model/adapter_config.json"
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == str(model_dir)

    for command, words in (
        (
            ["train.py", *arguments, *lora, "--output_dir", "x", "--model_overrides", '{"n_layer": 1}'],
            "--lora_rank 4: an adapter belongs to --model as it is. Remove --model_overrides.",
        ),
        (
            ["train.py", *arguments, "--model", "whole/model", "--output_dir", "x"],
            "is an adapter, and no model by itself",
        ),
    ):
        done = run_script(*command, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_another_base_is_no_way_to_resume(arguments, model_dir, tmp_path):
    """The settings are equal, but the frozen weights differ. No checkpoint holds them."""
    shutil.copytree(model_dir, tmp_path / "base")
    flags = [*arguments, "--model", "base", "--freeze", "transformer.wte*", "--output_dir", "run", "--resume"]
    assert run_script("train.py", *flags, "--max_steps", 4, cwd=tmp_path).returncode == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "base")
    done = run_script("train.py", *flags, "--max_steps", 8, cwd=tmp_path)
    assert done.returncode == 2 and "--resume: frozen weights was" in done.stderr, done.stderr


def test_a_run_begins_with_another_ones_weights(arguments, tmp_path):
    """A saved model is a --model like any other."""
    assert run_script("train.py", *arguments, "--max_steps", 4, "--output_dir", "old", cwd=tmp_path).returncode == 0
    flags = [*arguments, "--model", "old/model", "--max_steps", 4, "--output_dir", "new"]
    done = run_script("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    old, new = (
        [record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl") if record["split"] == "eval"]
        for name in ("old", "new")
    )
    assert new[0] == pytest.approx(old[-1], abs=1e-9) and new[0] < old[0]
