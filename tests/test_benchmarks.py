"""The benchmarks: their arithmetic, their tables, and the computation of each contender."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_gpt2, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import bench, contenders, gpu, guide, quality
from corpus.flags import TextConfig
from corpus.sources import read_documents
from corpus.tokenize import tokenize
from data import group_texts
from modeling.loss import next_token_nll

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


class Enough(Exception):
    pass


class FewTurns(contenders.Turns):
    """A stand-in for the driver that lets a contender do a number of units of work."""

    def __init__(self, units: int):
        self.left, self.facts, self.syncs = units, {}, []

    def boundary(self) -> None:
        self.left -= 1
        self.syncs.append(self.facts.get("syncs"))
        if self.left < 0:
            raise Enough


@pytest.fixture(autouse=True)
def as_before():
    """Undo the settings that a contender makes for its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def options(jsonl_file, model_dir, tokenizer, tmp_path):
    shape = {**TINY, "vocab_size": len(tokenizer)}
    text = {"text": str(jsonl_file), "text_column": "answers.text", "tokenizer": str(model_dir)}
    return {**text, "block_size": 16, "work": str(tmp_path), "shape": shape}


class Replies:
    """A stand-in for a contender with known seconds per turn."""

    def __init__(self, *seconds: float):
        self.seconds, self.units = list(seconds), []

    def turn(self, units: int = 1) -> float:
        self.units.append(units)
        return self.seconds.pop(0)


def test_turns_become_ratios_and_a_row():
    ours, peer = Replies(1.0, 2.0, 1.0), Replies(2.0, 6.0, 2.5)
    pairs = bench.take_turns(ours, peer, rounds=3, units=2)
    assert pairs == [(1.0, 2.0), (2.0, 6.0), (1.0, 2.5)] and ours.units == peer.units == [2, 2, 2]
    row = bench.speed_row("a step", pairs, 1000, (">=", 2.8))
    assert str(row) == "| a step | 1,000 tokens/s | 400 tokens/s | 2.50x (2.00-3.00) | >= 2.8x | **missed** |"
    row = bench.time_row("a start", pairs, ("<=", 0.5))
    assert str(row) == "| a start | 1 s | 2.5 s | 0.40x (0.33-0.50) | <= 0.5x | met |"
    assert str(bench.Row("a part", "failed", "")) == "| a part | failed |  |  |  |  |"
    assert {line.count("|") for line in f"{bench.HEADER}\n{row}".splitlines()} == {7}


def test_the_heading_names_what_made_it_and_no_directory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--full", "--text", "/home/me/a.jsonl"])
    heading = bench.heading("bench", "a device")
    assert "command: `python -m benchmarks.bench --full --text a.jsonl`" in heading
    assert all(part in heading for part in ("commit: ", "device: a device", "torch 2", "UTC"))


def test_results_have_a_file_for_each_device():
    names = {"AMD EPYC AVX512-BF16, 2 cores": "amd-epyc-avx512-bf16-2-cores.md", "NVIDIA H200": "nvidia-h200.md"}
    assert {device: bench.results_file(device).name for device in names} == names
    assert bench.results_file("NVIDIA H200", "-quality").name == "nvidia-h200-quality.md"
    assert bench.processor().endswith("cores")


def test_nanogpt_computes_what_gpt2_computes():
    config = GPT2Config(**TINY, vocab_size=101, activation_function="gelu", bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    nano = contenders.NanoGPT(config, bias=True).eval()
    names = {"attn.c_attn": "c_attn", "attn.c_proj": "c_proj", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    weights = {}
    for name, weight in theirs.transformer.state_dict().items():
        for before, after in names.items():
            if f".{before}.weight" in name:
                weight = weight.T  # GPT-2's Conv1D stores its matrix transposed
            name = name.replace(f".{before}.", f".{after}.")
        weights[name] = weight
    nano.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]})
    ids = torch.randint(101, (3, 20))
    expected = next_token_nll(theirs, ids, ids) / (3 * 19)
    assert nano(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), abs=1e-5)
    defaults = contenders.NanoGPT(config)
    assert not any(name.endswith("bias") for name, _ in defaults.named_parameters())


@pytest.mark.parametrize("contender", [contenders.ours, contenders.bare, contenders.nanogpt])
def test_contenders_step(contender, options):
    with pytest.raises(Enough):
        contender(FewTurns(11), {**options, "bf16": True})


def test_ours_waits_for_its_device_at_a_log_step_alone(options):
    """The first and the 10th step are logged. Without a text the tokens are random."""
    turns = FewTurns(11)
    synthetic = {"block_size": 16, "work": options["work"], "count_syncs": True}
    with pytest.raises(Enough):
        contenders.ours(turns, {**synthetic, "shape": {**TINY, "vocab_size": 400}})
    waits = [after - before for before, after in zip(turns.syncs, turns.syncs[1:], strict=False)]
    assert waits[2:9] == [0] * 7 and waits[9] > 0


def test_the_trainer_stops_at_steps_and_evaluates_as_ours(options):
    options["shape"] |= {"resid_pdrop": 0.0}
    with pytest.raises(Enough):
        contenders.trainer(FewTurns(2), options)
    ours, theirs = FewTurns(1), FewTurns(1)
    with pytest.raises(Enough):
        contenders.our_evaluation(ours, {**options, "blocks": 16})
    with pytest.raises(Enough):
        contenders.trainer_evaluation(theirs, {**options, "blocks": 16})
    assert ours.facts["loss"] == pytest.approx(theirs.facts["loss"], abs=1e-2)


def test_products_are_those_of_a_step():
    config = GPT2Config(n_layer=6)
    found = contenders.step_products(config, 8, 128)
    flops = sum(2 * count * batch * m * k * n for count, batch, m, k, n in found)
    per_token = 6 * (12 * 6 * 768**2 + 50257 * 768) + 12 * 6 * 768 * 128  # PaLM's formula, without norms and biases
    assert flops == 8 * 128 * per_token
    for turned in ((False, False), (True, True)):
        a, b, out = contenders.operands(2, 3, 4, 5, *turned, torch.device("cpu"))
        assert (a.shape, b.shape, out.shape) == ((2, 3, 4), (2, 4, 5), (2, 3, 5))


def test_the_guides_maps(tokenizer, tmp_path):
    """In one map batch, the tokens are ours without the ends of documents. The remainder is dropped."""
    path = write_jsonl(tmp_path / "rows.jsonl", 20)
    options = {"text": str(path), "text_column": "answers.text", "block_size": 16}
    made = guide.text_to_blocks(options, tokenizer, num_proc=None)
    assert made["labels"] == made["input_ids"]
    texts = [" ".join(json.loads(line)["answers"]["text"]) for line in path.read_text().splitlines()]
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert [token for block in made["input_ids"] for token in block] == ids[: len(ids) // 16 * 16]
    documents = read_documents(TextConfig(text_column="answers.text"), "--text", [str(path)])
    stream = group_texts(tokenize(documents, tokenizer), 16).stream
    assert len(stream) - stream.num_documents == len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def run_gpu(monkeypatch, capsys, *arguments: str) -> tuple[int, list[list[str]], str]:
    """Run benchmarks.gpu. Return the exit code, the cells of each row, and stderr."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    code, output = gpu.main(), capsys.readouterr()
    rows = [line for line in output.out.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in [gpu.HEADER, *rows]} == {gpu.HEADER.count("|")}
    return code, [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows], output.err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    code, rows, error = run_gpu(monkeypatch, capsys)
    assert (code, rows, len(error.splitlines())) == (2, [], 1) and "needs a GPU" in error


@pytest.mark.slow
def test_heads_and_packed_gradients_in_tiny(monkeypatch, capsys):
    """On a CPU FlexAttention has no backward pass. Its row says so, and nothing else fails."""
    code, rows, _ = run_gpu(monkeypatch, capsys, "--tiny", "--only", "gradients", "head")
    assert code == 0 and len(rows) == 4 + 3 * 2
    found = {row[1]: row for row in rows}
    assert found["flex_attention"][2].startswith("failed: NotImplementedError")
    assert float(found["eager"][-1].split()[-1]) < 0.05
    assert all(float(row[3].replace(",", "")) > 0 for row in rows if row[0] == "head")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["gpt2", "flags", "llama"])
def test_steps_in_tiny(monkeypatch, capsys, part):
    code, rows, _ = run_gpu(monkeypatch, capsys, "--tiny", "--only", part)
    assert code == 0 and [row[1] for row in rows] == [label for name, label, *_ in gpu.STEPS if name == part]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows), rows
    syncs = [row[-1] for row in rows if row[1] == "host syncs"]
    assert syncs == ["0 host syncs in 6 steps without a log"] * (part == "flags")  # packed steps have another row


@pytest.mark.slow
def test_quality_compares_on_each_text(tokenizer, jsonl_file, tmp_path, monkeypatch, capsys):
    for part in (tokenizer, tiny_gpt2(len(tokenizer), n_positions=128)):
        part.save_pretrained(tmp_path)
    texts = ["--text", str(jsonl_file), str(jsonl_file)]
    rest = ["--model", str(tmp_path), "--max_steps", "2", "--max_documents", "20", "--learning_rates", "1e-4", "2e-4"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *texts, *rest, "--recipe", "--block_size 32 --eval_every 1"])
    monkeypatch.setattr(quality, "results_file", None)  # with --max_steps nothing is written
    quality.main()
    report = capsys.readouterr().out
    assert report.count(f"## {Path(jsonl_file).name}") == 2 and report.count("| Trainer, learning rate 0.0002 |") == 2
    assert report.count("| ours, --block_size 32 --eval_every 1 |") == 2
