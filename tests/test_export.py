"""Export: an adapter is merged, the dtype is chosen, and a revision of the Hub is exported."""

import json
import re
import shutil

import pytest
import torch
from conftest import run_script, tiny_gpt2
from hub_server import HubServer
from huggingface_hub import ModelCard
from processes import prepare
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.errors import UserError
from export import export
from modeling.adapters import save_adapter
from modeling.loading import load_pretrained
from modeling.trained import LoraConfig, add_lora

PROMPT = ["--prompt", "the model", "--greedy", "--max_new_tokens", 8]


@pytest.fixture(scope="module")
def adapter(model_dir, tokenizer, tmp_path_factory):
    """Return the directory of an adapter with random weights."""
    path = tmp_path_factory.mktemp("adapter") / "model"
    model = load_pretrained(str(model_dir))
    add_lora(model, LoraConfig(lora_rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    save_adapter(model, path)
    tokenizer.save_pretrained(path)
    return path


def weights(path):
    return load_file(path / "model.safetensors")


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits


def test_an_adapter_becomes_a_plain_model(adapter, model_dir, tmp_path):
    done = run_script("export.py", "--model", adapter, "--out", "new/merged", cwd=tmp_path, fresh=True)
    assert (done.returncode, done.stderr) == (0, "") and re.fullmatch(
        rf"new/merged: {adapter} in fp32, adapter merged, [\d.,]+ MB\n", done.stdout
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new/merged")
    assert (
        merged.dtype == torch.float32
        and merged.state_dict().keys() == load_pretrained(str(model_dir)).state_dict().keys()
    )
    torch.testing.assert_close(logits(merged), logits(load_pretrained(str(adapter))), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "new/merged").get_vocab()
    said = [run_script("generate.py", "--model", m, *PROMPT, cwd=tmp_path) for m in (adapter, "new/merged")]
    assert said[0].stdout == said[1].stdout and said[0].returncode == said[1].returncode == 0, said[1].stderr


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_dtype_is_that_of_the_merged_weights(name, dtype, adapter, tmp_path):
    """The adapter is merged in float32 and the sum is rounded once."""
    for out, flags in (("exact", ()), ("small", ("--dtype", name))):
        done = run_script("export.py", "--model", adapter, "--out", out, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    exact, small = weights(tmp_path / "exact"), weights(tmp_path / "small")
    assert exact.keys() == small.keys()
    assert all(small[key].dtype == dtype and torch.equal(small[key], exact[key].to(dtype)) for key in exact)
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_plain_model_is_converted(model_dir, tmp_path):
    for out, source, flags in (("copy", model_dir, ()), ("half", "copy", ("--dtype", "bf16")), ("back", "half", ())):
        done = run_script("export.py", "--model", source, "--out", out, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{out}: {source} in {flags[-1] if flags else 'fp32'}, ")
    before, copy, back = (weights(path) for path in (model_dir, tmp_path / "copy", tmp_path / "back"))
    assert before.keys() == copy.keys() and all(torch.equal(before[key], copy[key]) for key in before)
    assert all(torch.equal(back[key], before[key].bfloat16().float()) for key in before)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(adapter, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    done = run_script("export.py", "--model", adapter, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "--out out: exists already. Pass a new one." in done.stderr
    assert list((tmp_path / "out").iterdir()) == []

    def fail(directory):
        raise RuntimeError("interrupted")

    model = tiny_gpt2(len(tokenizer))
    monkeypatch.setattr(tokenizer, "save_pretrained", fail, raising=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        export(model, tokenizer, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_weight_that_float16_cannot_hold(tokenizer, tmp_path):
    model = tiny_gpt2(len(tokenizer))
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = 1e5
    with pytest.raises(
        UserError, match=r"transformer.wte.weight is not finite in it. Use bf16, fp32 or another model."
    ):
        export(model, tokenizer, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_a_revision_of_the_hub(model_dir, tokenizer, text_file, tmp_path):
    """An adapter records the revision of its base model."""
    with HubServer(tmp_path / "hub") as hub:
        sha = hub.add_repo("someone/tiny-gpt2", model_dir)
        other = tiny_gpt2(len(tokenizer))
        with torch.no_grad():
            other.transformer.wte.weight.add_(1)
        other.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        hub.add_repo("someone/tiny-gpt2", tmp_path / "other")
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        name, flags = f"someone/tiny-gpt2@{sha}", ["--train_files", text_file, "--block_size", 16, "--max_steps", 1]
        with prepare(env):
            for script, *arguments in (
                ("export.py", "--model", name, "--out", "old"),
                ("export.py", "--model", "someone/tiny-gpt2", "--out", "new"),
                ("generate.py", "--model", name, *PROMPT),
                ("train.py", "--model", name, *flags, "--lora_rank", 2, "--output_dir", "run"),
                ("export.py", "--model", "run/model", "--out", "merged"),
            ):
                done = run_script(script, *arguments, cwd=tmp_path, env=env)
                assert done.returncode == 0, done.stderr
            unknown = ("--model", "someone/tiny-gpt2@nowhere", "--out", "x")
            refused = run_script("export.py", *unknown, cwd=tmp_path, env=env)
    assert refused.returncode == 2 and "nowhere" in refused.stderr and refused.stderr.count("\n") == 1
    saved = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("someone/tiny-gpt2", sha)
    assert "base_model: someone/tiny-gpt2\n" in (tmp_path / "run/model/README.md").read_text()
    old, new, merged = (weights(tmp_path / name)["transformer.wte.weight"] for name in ("old", "new", "merged"))
    assert torch.equal(old, weights(model_dir)["transformer.wte.weight"]) and not torch.equal(old, new)
    assert torch.equal(merged, old)


def test_size_loss_and_card(adapter, text_file, tmp_path):
    """The loss is that of the written directory, which plain transformers reads."""
    shutil.copytree(adapter, tmp_path / "adapter")
    card = "---\nlicense: mit\nlibrary_name: peft\nbase_model: someone/base\n---\n# Notes\n"
    (tmp_path / "adapter/README.md").write_text(card)
    measured = run_script("perplexity.py", "--model", "adapter", "--files", text_file, "--block_size", 64, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    loss = float(re.search("loss: (.*)", measured.stdout)[1])
    flags = ("--model", "adapter", "--files", text_file, "--dtype", "bf16", "--out", "small")
    done = run_script("export.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) / 1e6
    before, after = map(float, re.search("loss: (.*) before, (.*) after", done.stdout).groups())
    assert f", {size:.1f} MB\n" in done.stdout and before == pytest.approx(loss, abs=1e-6)
    assert 0 < abs(after - before) < 0.1
    saved = ModelCard.load(tmp_path / "small/README.md").data
    assert (saved.library_name, saved.license, saved.base_model) == ("transformers", "mit", "someone/base")
    assert (tmp_path / "small/generation_config.json").exists() and (tmp_path / "small/tokenizer.json").exists()
