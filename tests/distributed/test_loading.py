"""With FSDP2, each rank reads its own rows of a pretrained model. Otherwise rank 0 loads the model for all."""

from unittest.mock import ANY

import pytest
from conftest import ROOT, run_script, start_ranks
from safetensors.torch import load_file, save_file
from test_distributed import cwd, flags, read_jsonl, run_ranks, tiny_gpt2  # noqa: F401 a fixture
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from distributed.empty import find_rows
from modeling.loading import weights_on_meta

READING = """
import sys
import torch
from transformers import AutoModelForCausalLM

from cli.errors import run_script
from distributed.parallel import full_tensor
from distributed.world import DistributedConfig, World
from distributed.empty import find_rows
from modeling.loading import load_pretrained, read_config, weights_on_meta


def main():
    with World(DistributedConfig(strategy="fsdp", rank_timeout=60)) as world:
        for name in sys.argv[1:]:
            with weights_on_meta():
                model = AutoModelForCausalLM.from_config(read_config(name, "--model", {}), dtype=torch.float32)
            read, other = find_rows(model, name), load_pretrained(name)
            assert all(parameter.is_meta for parameter in model.parameters())
            model = world.parallelize(model, torch.device("cpu"), "fp32", 2, [read])
            expected = other.state_dict()
            for key, tensor in model.state_dict().items():
                tensor = full_tensor(tensor)
                assert tensor is None or tensor.equal(expected.pop(key)), key
            assert not (world.is_main and expected)
            assert model.config.to_dict() == other.config.to_dict()
            assert model.generation_config.to_dict() == other.generation_config.to_dict()


run_script(main)
"""
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 2, "vocab_size": 101}
MIXTRAL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
MIXTRAL |= {"intermediate_size": 48, "num_local_experts": 2, "vocab_size": 100}


def make(kind: str, sizes: dict) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))


@pytest.mark.parametrize("ranks", [3])
def test_each_rank_reads_its_rows(tmp_path, ranks):
    """Models are in bfloat16 and several files, a bare GPT2Model without its prefix, or have fewer rows than ranks."""
    make("gpt2", GPT2).bfloat16().save_pretrained(tmp_path / "files", max_shard_size="20KB")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 2
    bare = make("gpt2", GPT2)
    bare.generation_config.max_length = 7
    bare.transformer.save_pretrained(tmp_path / "bare")
    bare.generation_config.save_pretrained(tmp_path / "bare")
    sizes = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}
    make("llama", sizes | {"num_key_value_heads": 1}).save_pretrained(tmp_path / "untied")
    (tmp_path / "reading.py").write_text(READING)
    started = start_ranks(
        ranks, "files", "bare", "untied", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, script=tmp_path / "reading.py"
    )
    try:
        assert [rank.wait(120) for rank in started] == [0] * ranks, [rank.stderr for rank in started]
    finally:
        for rank in started:
            rank.kill()


def test_files_that_do_not_hold_the_weights_as_they_are_go_through_rank_0(tmp_path):
    model = make("gpt2", GPT2)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def found(**changed):
        kept = {key: tensor for key, tensor in (weights | changed).items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        return find_rows(model, str(tmp_path))

    wte = weights["transformer.wte.weight"]
    assert found() is not None
    assert found(**{"transformer.ln_f.bias": None}) is None  # a new bias is initialized
    assert found(**{"lm_head.weight": wte + 1}) is None  # this head is not tied
    assert found(**{"transformer.wte.weight": wte[1:].clone()}) is None  # an error names the shapes
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert find_rows(model, str(tmp_path)) is None
    make("mixtral", MIXTRAL).save_pretrained(tmp_path / "converted")
    with weights_on_meta():
        mixtral = make("mixtral", MIXTRAL)
    assert find_rows(mixtral, str(tmp_path / "converted")) is None


@pytest.mark.slow
def test_no_rank_loads_the_whole_model_and_frozen_shards_are_those_of_one_process(cwd, tokenizer):  # noqa: F811
    tiny_gpt2(len(tokenizer)).save_pretrained(cwd / "base")
    tokenizer.save_pretrained(cwd / "base")
    (cwd / "shards.py").write_text(
        "import train\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained = None\ntrain.run_script(train.main)\n"
    )
    changed = {"tokenizer": None, "max_steps": 3, "save_every": 2}
    options = lambda out, **more: [*flags(out, None, **changed, **more), "--model", "base", "--freeze", "*.wte.*"]  # noqa: E731
    run_ranks(cwd, *options("slices", strategy="fsdp"), script=cwd / "shards.py", env={"PYTHONPATH": str(ROOT)})
    for out, *resume in (["whole"], ["slices", "--resume", "--max_steps", "4"]):
        done = run_script("train.py", *options(out), *resume, cwd=cwd)
        assert done.returncode == 0, done.stderr
    losses = [[r["loss"] for r in read_jsonl(cwd / out / "metrics.jsonl")] for out in ("slices", "whole")]
    assert losses[0][:3] == pytest.approx(losses[1][:3], abs=1e-6, rel=0)
    tensors = load_file(cwd / "base/model.safetensors"), load_file(cwd / "slices/model/model.safetensors")
    assert tensors[0]["transformer.wte.weight"].equal(tensors[1]["transformer.wte.weight"])

    tensors[0]["transformer.wte.weight"][-1] += 1
    save_file(tensors[0], cwd / "base/model.safetensors", {"format": "pt"})
    ranks = run_ranks(cwd, *options("slices", strategy="fsdp"), "--resume", "--max_steps", "5", codes=(2, ANY))
    assert "frozen weights" in ranks[0].stderr


@pytest.mark.parametrize(
    ("broken", "codes", "said"),
    [
        ("PreTrainedModel.save_pretrained = fail", [5, 5], "sharded/model: cannot be saved ([Errno 28] No space left"),
        ("if os.environ['RANK'] == '1': empty.local_rows = fail", [2, 2], "error: rank 1: --model base:"),
    ],
)
def test_a_failure_of_one_rank_is_that_of_all_and_not_a_lost_connection(cwd, tokenizer, broken, codes, said):  # noqa: F811
    tiny_gpt2(len(tokenizer)).save_pretrained(cwd / "base")
    tokenizer.save_pretrained(cwd / "base")
    (cwd / "broken.py").write_text(
        "import errno, os, train\nfrom distributed import empty\nfrom transformers import PreTrainedModel\n"
        "def fail(*args, **options):\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        f"{broken}\ntrain.run_script(train.main)\n"
    )
    changed = {"tokenizer": None, "max_steps": 3, "rank_timeout": 50, "strategy": "fsdp"}
    settings = (*flags("sharded", None, **changed), "--model", "base", "--overwrite")
    ranks = start_ranks(2, *settings, cwd=cwd, script=cwd / "broken.py", env={"PYTHONPATH": str(ROOT)})
    try:
        assert [rank.wait(40) for rank in ranks] == codes, [rank.stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = [line for rank in ranks for line in rank.stderr.splitlines()]
    assert said in line
