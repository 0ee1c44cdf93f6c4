"""The benchmark's arithmetic and its table; and the peers written there must be what they stand for."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import bench, contenders, guide
from corpus.flags import TextConfig
from corpus.sources import read_documents
from corpus.tokenize import tokenize
from data import group_texts
from modeling.loss import next_token_nll

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


class Enough(Exception):
    pass


class FewTurns(contenders.Turns):
    """Lets a contender work a number of units, without a driver."""

    def __init__(self, units: int):
        self.left, self.facts, self.between = units, {}, lambda: None

    def boundary(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.between()
            raise Enough


@pytest.fixture(autouse=True)
def as_before():
    """What a contender switches on for its process."""
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
    """Stands where the pipe of a contender is: seconds of turn after turn."""

    def __init__(self, *seconds: float):
        self.seconds, self.units = list(seconds), []

    def turn(self, units: int = 1) -> float:
        self.units.append(units)
        return self.seconds.pop(0)


def test_turns_become_ratios_and_a_row():
    ours, peer = Replies(1.0, 2.0, 1.0), Replies(2.0, 6.0, 2.5)
    pairs = bench.take_turns(ours, peer, rounds=3, units=2)
    assert pairs == [(1.0, 2.0), (2.0, 6.0), (1.0, 2.5)] and ours.units == peer.units == [2, 2, 2]
    assert bench.speeds(pairs) == [2.0, 3.0, 2.5] and bench.shares(pairs) == [0.5, 1 / 3, 0.4]
    assert bench.medians(pairs) == (1.0, 2.5)
    row = bench.Row("a step", "1 s", "2.5 s", bench.speeds(pairs), (">=", 2.8))
    assert str(row) == "| a step | 1 s | 2.5 s | 2.50x (2.00-3.00) | >= 2.8x | **missed** |"
    assert bench.Row("memory", "", "", [0.4], ("<=", 0.5)).verdict == "met"
    assert str(bench.Row("a GPU", "none", "")) == "| a GPU | none |  |  |  |  |"
    assert len({line.count("|") for line in bench.table([row]).splitlines()}) == 1


def test_the_heading_names_what_made_it_and_no_directory():
    assert bench.shown(["--full", "--text", "/home/me/a.jsonl"]) == "python -m benchmarks.bench --full --text a.jsonl"
    assert all(name in bench.heading("c", "d") for name in ("command: `c`", "commit: ", "device: d", "torch 2", "UTC"))


def test_nanogpt_computes_what_gpt2_computes():
    config = GPT2Config(**TINY, vocab_size=101, activation_function="gelu", bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    nano = contenders.NanoGPT(config, bias=True).eval()
    names = {"attn.c_attn": "c_attn", "attn.c_proj": "c_proj", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    weights = {}
    for name, weight in theirs.transformer.state_dict().items():
        for before, after in names.items():
            if f".{before}.weight" in name:
                weight = weight.T  # GPT-2's Conv1D holds its matrix the other way round
            name = name.replace(f".{before}.", f".{after}.")
        weights[name] = weight
    nano.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]})
    ids = torch.randint(101, (3, 20))
    expected = next_token_nll(theirs, ids, ids) / (3 * 19)
    assert nano(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), abs=1e-5)
    defaults = contenders.NanoGPT(config)
    assert not any(name.endswith("bias") for name, _ in defaults.named_parameters())


@pytest.mark.parametrize("contender", [contenders.ours, contenders.bare, contenders.no_trainer, contenders.nanogpt])
def test_contenders_step(contender, options):
    with pytest.raises(Enough):
        contender(FewTurns(11), {**options, "bf16": True})


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


def test_a_checkpoint_is_as_many_bytes_as_the_plain_file(options):
    tensors = contenders.trained_state(options)
    plain = FewTurns(1)
    with pytest.raises(Enough):
        contenders.plain_checkpoint(plain, options)
    assert plain.facts["bytes"] == sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with pytest.raises(Enough):
        contenders.our_checkpoint(FewTurns(1), options)


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
    """One map batch: the same tokens as ours without the ends of documents, and the remainder dropped."""
    path = write_jsonl(tmp_path / "rows.jsonl", 20)
    made = guide.text_to_blocks(str(path), "answers.text", tokenizer, 16, num_proc=None)
    chained = guide.text_to_blocks(str(path), "answers.text", tokenizer, 16, num_proc=None, chained=True)
    assert made["input_ids"] == chained["input_ids"] and made["labels"] == made["input_ids"]
    texts = [" ".join(json.loads(line)["answers"]["text"]) for line in path.read_text().splitlines()]
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert [token for block in made["input_ids"] for token in block] == ids[: len(ids) // 16 * 16]
    documents = read_documents(TextConfig(text_column="answers.text"), "--text", [str(path)])
    stream = group_texts(tokenize(documents, tokenizer), 16).stream
    assert len(stream) - stream.num_documents == len(ids)
