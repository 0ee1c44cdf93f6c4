"""Train every architecture through train.py, from a tiny random config: it learns, is causal, is saved, generates.

WRITE_TABLE=1 python -m pytest tests/modeling/test_architectures.py     # writes docs/architectures.md
"""

import json
import os
import re
import signal
import sys

import pytest
import torch
from architectures import GUIDE, TODAY
from conftest import ROOT, read_jsonl, write_jsonl

import train
from cli.errors import UserError
from generate import SamplingConfig, generate
from modeling.architectures import recompute_activations
from modeling.checks import check_isolated, check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import count_predicted, linear_head, next_token_nll

NAMES = {**GUIDE, **TODAY}
TABLE = ROOT / "docs" / "architectures.md"
HEAD = """\
# Architectures

`tests/modeling/test_architectures.py` trains each of these models from a tiny random config through `train.py`, and
writes this table. It checks that the loss falls, that the probe finds the model causal, and that the saved model has
the same logits. Greedy text must follow from the logits.

- logits: "in parts" if the loss is computed in chunks, without all logits in memory.
- checkpointing: "yes" if `--gradient_checkpointing` works and gives the same gradients.
- isolated by: the inputs with which `--pack documents` isolates documents, or "no" if it is refused.
- bf16: "yes" if the model works with `--precision bf16`.

| | architecture | `model_type` | made causal with | logits | checkpointing | isolated by | bf16 |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
ROWS: dict[str, str] = {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("architectures")
    write_jsonl(path / "text.jsonl", 20)
    return path


@pytest.fixture
def trained(directory, monkeypatch):
    """Return a function that trains an architecture with train.main and returns (model, run directory)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("training.atomic.lock_directory", lambda run_dir: None)
    built, build_model = [], train.build_model

    def remember(*given):
        built.append(build_model(*given))
        return built[-1]

    monkeypatch.setattr(train, "build_model", remember)

    def run(name: str):
        kind, sizes = NAMES[name]
        run_dir = directory / kind
        (directory / f"{kind}.json").write_text(json.dumps({"model_type": kind, **sizes}))
        arguments = ["--model_config", directory / f"{kind}.json", "--tokenizer", "train:300"]
        arguments += ["--train_files", directory / "text.jsonl", "--text_column", "answers.text", "--block_size", 32]
        arguments += ["--max_steps", 20, "--learning_rate", 1e-2, "--precision", "fp32", "--output_dir", run_dir]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()
        return built.pop().eval(), run_dir

    return run


def gradients(model, ids):
    model.zero_grad()
    torch.manual_seed(0)
    (next_token_nll(model.train(), ids, ids) / count_predicted(ids)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name, trained, capsys):
    kind, _ = NAMES[name]
    row = f"| {'guide' if name in GUIDE else 'today'} | {name} | `{kind}` |"
    try:
        model, run_dir = trained(name)
    except UserError as error:
        has_switch = kind not in ("cpmant", "prophetnet")
        assert ("4.57.6 was its last release with it" if has_switch else "this one has no causal switch") in str(error)
        reason = "dropped by transformers" if has_switch else "no causal switch"
        ROWS[name] = f"{row} refused: {reason} | | | | |"
        return
    losses = [record["loss"] for record in read_jsonl(run_dir / "metrics.jsonl") if record["split"] == "eval"]
    assert losses[-1] < losses[0] - 0.2

    loaded = load_pretrained(str(run_dir / "model")).eval()
    tokenizer = load_tokenizer_by_name(str(run_dir / "model"), "--model")
    ids = torch.randint(len(tokenizer), (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (each(input_ids=ids, use_cache=False).logits for each in (model, loaded))
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        prompt = text = tokenizer("the model")["input_ids"]
        for _ in range(4):
            scores = loaded(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            text = [*text, scores.argmax().item()]
            if text[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(text, skip_special_tokens=True)[len(tokenizer.decode(prompt)) :]
    sampling, others = SamplingConfig(max_new_tokens=4, greedy=True), ["a", "token text of loss"]
    alone = [expected, *(generate(loaded, tokenizer, [prompt], sampling)[0] for prompt in others)]
    assert generate(loaded, tokenizer, ["the model", *others], sampling) == alone
    assert generate(loaded, tokenizer, ["the model"], sampling) == [expected]

    once, fused = gradients(model, ids), linear_head(model) is not None
    try:
        for choice in ("selective", "full"):
            recompute_activations(model, choice)
            for first, second in zip(once, gradients(model, ids), strict=True):
                torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)
        recomputes = "yes"
    except UserError:
        recomputes = "no"
    try:
        check_isolated(model, 32)
        isolated_by = " and ".join(model.isolated_by)
    except UserError:
        isolated_by = "no"
    try:
        check_model(model, tokenizer, 32, precision="bf16")
        bf16 = "yes"
    except UserError as error:
        assert "Use --precision fp32" in str(error)
        bf16 = "no"
    causal = re.search(r"is made causal with (.*)", capsys.readouterr().err)
    logits = "in parts" if fused else "whole"
    ROWS[name] = f"{row} {causal[1] if causal else ''} | {logits} | {recomputes} | {isolated_by} | {bf16} |"


def test_the_table_is_what_was_seen():
    if len(ROWS) < len(NAMES):
        pytest.skip("not all architectures were run")
    table = HEAD + "\n".join(ROWS[name] for name in NAMES) + "\n"
    if os.environ.get("WRITE_TABLE"):
        TABLE.write_text(table, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table
    assert sum("refused" not in ROWS[name] for name in GUIDE) == 46 and len(TODAY) >= 30
