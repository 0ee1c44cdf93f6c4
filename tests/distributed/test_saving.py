"""A sharded model is saved like `save_pretrained` in one process, but never as a whole on one rank."""

import json

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_distributed import run_ranks

SAVING = """
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

from cli.errors import run_script
from distributed.parallel import full_tensor
from distributed.world import DistributedConfig, World
from distributed import saving
from modeling.loading import weights_on_meta
from modeling.adapters import adapter_of, save_adapter
from modeling.precision import set_dtypes
from modeling.trained import LoraConfig, add_lora

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 101}
MIXTRAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
           "intermediate_size": 48, "num_local_experts": 3, "vocab_size": 101, "max_position_embeddings": 16}
LLAMA = {**MIXTRAL, "tie_word_embeddings": False}
del LLAMA["num_local_experts"]
CASES = {"gpt2": ("gpt2", GPT2), "mixtral": ("mixtral", MIXTRAL), "files": ("mixtral", MIXTRAL),
         "buffers": ("gpt2", GPT2), "lora": ("gpt2", GPT2), "lora and bf16": ("llama", LLAMA)}


def main():
    with World(DistributedConfig(strategy="fsdp", rank_timeout=60)) as world:
        for name, (kind, sizes) in CASES.items():
            torch.manual_seed(0)
            settings = CONFIG_MAPPING[kind](**sizes)
            with nullcontext() if world.is_main else weights_on_meta():
                model = AutoModelForCausalLM.from_config(settings)
            if name == "buffers":
                block = model.transformer.h[0]
                block.register_buffer("count", torch.tensor([3, 4], dtype=torch.int64))
                block.register_buffer("flag", torch.tensor([True, False]))
                model.register_buffer("scale", torch.tensor(2.5))
            saving.FILE_SIZE = "20KB" if name == "files" else "2GB"
            expected, directory = Path("one") / name, Path("ranks") / name
            if "lora" in name:
                add_lora(model, LoraConfig(lora_rank=4), [99, 100])
                set_dtypes(model, torch.bfloat16 if "bf16" in name else torch.float32, only_frozen=True)
                if world.is_main:
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            torch.nn.init.normal_(parameter)
            if world.is_main:
                if adapter_of(model):
                    save_adapter(model, expected)
                else:
                    model.save_pretrained(expected, max_shard_size=saving.FILE_SIZE)
                directory.mkdir(parents=True)
            model = world.parallelize(model, torch.device("cpu"), "bf16" if "bf16" in name else "fp32", 8)
            largest = []

            def counted(tensor):
                full = full_tensor(tensor)
                largest.append(tensor.numel())
                return full

            saving.save_sharded(model, directory, counted, writes=world.is_main)
            world.on_main(lambda: None)


run_script(main)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("saving")
    (cwd / "saving.py").write_text(SAVING)
    options = {"script": cwd / "saving.py", "env": {"PYTHONPATH": str(ROOT)}}
    run_ranks(cwd, size=3, codes=(0,) * 3, **options)
    return cwd


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "files", "buffers", "lora", "lora and bf16"])
def test_a_sharded_model_is_saved_as_in_one_process(saved, name):
    """Several files may divide the tensors differently: in one process, views of one storage count twice."""
    (ours, our_json), (theirs, their_json) = (content(saved / where / name) for where in ("ranks", "one"))
    assert ours.keys() == theirs.keys() and our_json.keys() == their_json.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].equal(tensor), key
    if name == "files":
        assert len(list((saved / "ranks/files").glob("model-*-of-*.safetensors"))) > 5
        index = our_json.pop("model.safetensors.index.json"), their_json.pop("model.safetensors.index.json")
        assert index[0]["metadata"] == index[1]["metadata"]
        for key, file in index[0]["weight_map"].items():
            assert key in load_file(saved / "ranks/files" / file)
    assert our_json == their_json


def content(directory):
    tensors = {key: t for path in directory.glob("*.safetensors") for key, t in load_file(path).items()}
    return tensors, {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")}
