import math
from itertools import pairwise

import datasets
import pytest
import torch
import torch.nn.functional as F
from chat_families import CHATML, IM, make_tokenizer
from conftest import run_script, talk, tiny_gpt2
from texts import FAMILIES, plain, read_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corpus.flags import TextConfig
from corpus.tokenize import num_text_bytes, tokenize
from corpus.tokens import token_ids
from data import group_texts, make_loader
from modeling.loading import load_pretrained
from perplexity import evaluate, perplexity


@pytest.fixture(scope="module")
def model(model_dir):
    return load_pretrained(str(model_dir)).train()


@pytest.fixture
def blocks(rows, tokenizer):
    blocks = group_texts(tokenize(rows, tokenizer), 64)
    assert len(blocks.stream) % 64 != 0  # the last block is short
    return blocks


def test_equals_a_plain_loop_and_does_not_depend_on_the_batch_size(model, blocks):
    nll, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for i in range(len(blocks)):
            ids = blocks[i]["input_ids"][None]
            logits = model(input_ids=ids).logits.double()
            nll += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    model.train()
    random_state = torch.get_rng_state()
    for batch_size in (1, 3, 8, 100):
        loss, num_tokens = evaluate(model, make_loader(blocks, batch_size))
        assert num_tokens == count
        assert math.exp(loss) == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)


def test_a_loss_beyond_what_a_float_can_hold():
    assert perplexity(2.5) == pytest.approx(math.exp(2.5), rel=1e-12)
    assert perplexity(1000.0) == math.inf


def test_sliding_window_scores_each_token_with_what_stands_before_it(model, blocks):
    stream, block_size, stride = blocks.stream, 32, 12
    ids = torch.from_numpy(stream[:])
    nll = 0.0
    model.eval()
    with torch.no_grad():
        for place in range(1, len(ids)):
            # The first window that includes the token scores it.
            start = max(0, math.ceil((place + 1 - block_size) / stride)) * stride
            logits = model(input_ids=ids[None, start:place]).logits[0, -1].double()
            nll -= F.log_softmax(logits, -1)[ids[place]].item()
            if place == 400:
                break

    class Head:
        def __len__(self):
            return 401

        def __getitem__(self, place):
            return stream[:401][place]

    windows = group_texts(Head(), block_size, stride)
    loss, num_tokens = evaluate(model, make_loader(windows, 5))
    assert num_tokens == 400
    assert loss * num_tokens == pytest.approx(nll, rel=1e-6)


def test_command(model_dir, text_file, model, tokenizer, tmp_path):
    flags = ("--model", model_dir, "--files", text_file, "--block_size", 32)
    done = run_script("perplexity.py", *flags, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    values = {name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines())}
    ids = tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"] + [0]
    assert list(values) == ["tokens", "loss", "perplexity", "bits_per_byte"]
    assert values["tokens"] == len(ids) - math.ceil(len(ids) / 32)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-4)
    num_bytes = len(text_file.read_bytes()) - sum(len(tokenizer.decode([id]).encode()) for id in ids[::32] if id)
    bits = values["loss"] * values["tokens"] / math.log(2) / num_bytes
    assert values["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert done.stderr == ""


def test_an_evaluation_that_fails_leaves_the_model_in_its_mode(blocks, tokenizer):
    """Memory may run out in an evaluation, and the run goes on. Its dropout must be on again."""
    model = tiny_gpt2(len(tokenizer)).train()

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        evaluate(model, make_loader(blocks, 2), between_batches=fail)
    assert model.training


@pytest.mark.parametrize("family", ["byte-level", "metaspace", "wordpiece"])
def test_bits_per_byte_do_not_depend_on_the_block_size(family, rows, tokenizer):
    """If each token costs its bytes, the cost of a byte does not depend on the tokens that are not predicted."""
    if family != "byte-level":
        tokenizer = FAMILIES[family]()
        tokenizer.eos_token = "</s>"
    stream = tokenize(rows, tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    ids = [tokenizer.eos_token_id, *token_ids(stream[:]).tolist()]
    whole = [num_text_bytes(tokenizer, b, a) for a, b in pairwise(ids) if b not in ends]
    assert sum(whole) == pytest.approx(stream.num_bytes, rel=0 if family == "byte-level" else 0.05)
    found = []
    for size, stride, isolated in ((4, None, False), (16, None, True), (64, None, False), (64, 16, False)):
        blocks = group_texts(stream, size, stride, isolated)
        cost = 0
        for ids, labels in (
            (blocks[i]["input_ids"].tolist(), blocks[i]["labels"].tolist()) for i in range(len(blocks))
        ):
            pairs = zip(pairwise(ids), labels[1:], strict=True)
            cost += sum(num_text_bytes(tokenizer, b, a) for (a, b), label in pairs if label != -100 and b not in ends)
        found.append(cost / blocks.num_predicted_bytes(tokenizer))
    assert max(found) / min(found) <= (1 + 1e-9 if family == "byte-level" else 1.03), found


def test_bytes_of_a_conversation_have_its_ends_of_turns():
    """They are special tokens with bytes. Only the end-of-text after a document has no bytes."""
    tokenizer = make_tokenizer(CHATML, *IM)
    tokenizer.add_special_tokens({"additional_special_tokens": [*IM]})
    table = datasets.Dataset.from_list([{"said": talk("ab", "c" * i) + talk("d", "é" * i)} for i in range(1, 20)])
    stream = tokenize(read_rows(table, TextConfig(text_column="said")), tokenizer)
    assert set(IM) <= set(tokenizer.all_special_tokens)
    for size in (2, 3, 4, 64):
        blocks = group_texts(stream, size)
        labels = [label for i in range(len(blocks)) for label in blocks[i]["labels"][1:].tolist() if label >= 0]
        text = [label for label in labels if label != tokenizer.eos_token_id]
        assert sum(num_text_bytes(tokenizer, label) for label in text) == blocks.num_predicted_bytes(tokenizer)


def test_bytes_with_a_tokenizer_that_has_no_decoder():
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "the": 2, "of": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    blocks = group_texts(tokenize(plain(["the of the of the"]), tokenizer), 4)
    assert blocks.num_predicted_bytes(tokenizer) == len(" of the of")
