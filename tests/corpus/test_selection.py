"""Repeated text, mixtures and long documents."""

import json
import os
from collections import Counter

import datasets
import pytest
from conftest import make_text, write_jsonl

from cli.errors import UserError
from corpus.flags import DataConfig
from data import load_data, load_documents


def blocks_of(tmp_path, tokenizer, train, evaluation, **settings):
    for name, documents in (("train", train), ("eval", evaluation)):
        datasets.Dataset.from_dict({"text": documents}).to_json(tmp_path / f"{name}.jsonl")
    files = {"train_files": [str(tmp_path / "train.jsonl")], "eval_files": [str(tmp_path / "eval.jsonl")]}
    config = DataConfig(**files, block_size=16, **settings)
    training, eval_blocks = load_data(config, *load_documents(config, 0), tokenizer, 0)
    return training.blocks, eval_blocks


def test_repeated_text_is_reported_and_dropped(tmp_path, tokenizer, capsys):
    known, other = make_text(60, 1), make_text(60, 2)
    train = [known, make_text(60, 3), known, other, known]
    evaluation = [make_text(60, 4), known, make_text(40, 5) + " " + other]
    blocks, eval_blocks = blocks_of(tmp_path, tokenizer, train, evaluation)
    counts = "2 training documents, 1 held-out documents that are also trained on: "
    assert counts + "kept" in capsys.readouterr().out
    assert (blocks.stream.num_documents, eval_blocks.stream.num_documents) == (5, 3)
    blocks, eval_blocks = blocks_of(tmp_path, tokenizer, train, evaluation, deduplicate=True)
    assert counts + "dropped" in capsys.readouterr().out
    assert (blocks.stream.num_documents, eval_blocks.stream.num_documents) == (3, 2)
    for evaluation, settings in (([known], {"deduplicate": True}), ([""], {})):
        with pytest.raises(UserError, match="none of its tokens has a loss"):
            blocks_of(tmp_path, tokenizer, train, evaluation, **settings)
    capsys.readouterr()
    blocks_of(tmp_path, tokenizer, [other], [known])
    assert capsys.readouterr().out == ""


def mixed(config, tokenizer, seed):
    """Return the documents for training and evaluation, as texts and in order."""
    training, eval_blocks = load_data(config, *load_documents(config, seed), tokenizer, seed)
    ids = [part.stream[:] for part in (training.blocks, eval_blocks)]
    return [tokenizer.decode(part).split("<|endoftext|>")[:-1] for part in ids]


@pytest.fixture
def sources(tmp_path):
    """Make three texts, a table of 40 records and a saved data set of 10."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"txt {i}")
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(40)]}).to_json(tmp_path / "rows.jsonl")
    datasets.Dataset.from_dict({"text": [f"saved {i}" for i in range(10)]}).save_to_disk(tmp_path / "saved")
    return [f"{tmp_path}/*.txt:1", f"{tmp_path}/rows.jsonl:2.5", f"{tmp_path}/saved:1"]


def test_a_mixture_holds_out_first_and_then_repeats_small_sources(sources, tokenizer, capsys):
    config = DataConfig(mix=sources, eval_fraction=0.2)
    train, held_out = mixed(config, tokenizer, 3)
    assert f"{sources[0][:-2]}: 2 documents, each 6.50 times per epoch" in capsys.readouterr().out
    assert len(held_out) == len(set(held_out)) == 1 + 8 + 2 and not set(train) & set(held_out)
    whole = {f"{name} {i}" for name, size in (("txt", 3), ("row", 40), ("saved", 10)) for i in range(size)}
    assert set(train) | set(held_out) == whole
    seen = {name: Counter(text for text in train if text.startswith(name)) for name in ("txt", "row", "saved")}
    assert {name: counts.total() for name, counts in seen.items()} == {"txt": 13, "row": 32, "saved": 13}
    for counts in seen.values():  # each pass over a source is complete
        assert max(counts.values()) - min(counts.values()) <= 1
    assert train == mixed(config, tokenizer, 3)[0] != mixed(config, tokenizer, 4)[0]
    assert train != sorted(train)
    config.max_documents = 1
    with pytest.raises(UserError, match="Use more text"):  # a text of a few letters, cut in two
        mixed(config, tokenizer, 3)


def test_a_mixture_repeats_documents_after_deduplication(tmp_path, tokenizer, capsys):
    for name, seeds in (("a", range(4)), ("b", range(1, 40))):
        table = datasets.Dataset.from_dict({"text": [make_text(40, seed) for seed in seeds]})
        table.to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "c.txt").write_text(make_text(50, 99), encoding="utf-8")
    mix = [f"{tmp_path}/{name}.jsonl:1" for name in "ab"]
    config = DataConfig(mix=mix, eval_files=[f"{tmp_path}/c.txt"], deduplicate=True)
    train, _ = mixed(config, tokenizer, 0)
    assert "twice     3 training documents" in capsys.readouterr().out
    assert Counter(Counter(train).values()) == {1: 36, 9: 4}
    config.mix = [mix[1], mix[1]]
    with pytest.raises(UserError, match=r"--mix .*b.jsonl: no document is left"):
        mixed(config, tokenizer, 0)


def test_a_single_text_in_a_mixture_has_an_end_of_text(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text(make_text(200), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", 4)
    config = DataConfig(mix=[f"{tmp_path}/one.txt:1", f"{tmp_path}/rows.jsonl:1"], text_column="answers.text")
    train, held_out = mixed(config, tokenizer, 0)
    (head,) = {text for text in train if make_text(200).startswith(text)}
    assert head + held_out[0] == make_text(200) and len(train) == 6


def test_long_documents_are_split_or_dropped(tmp_path, tokenizer, capsys):
    train, evaluation = ["the text", make_text(90, 2), "a model of text"] * 4, ["a model learns"] * 2
    for way, documents in (("split", 12), ("drop", 8)):
        blocks, _ = blocks_of(tmp_path, tokenizer, train, evaluation, long_documents=way)
        assert blocks.stream.num_documents == documents
        told = "training  " in (out := capsys.readouterr().out)
        assert told == (way == "drop")
    assert "4 of 12 documents are longer than 16 tokens: dropped" in out
    with pytest.raises(UserError, match="--long_documents drop: all 1 documents of the training text"):
        blocks_of(tmp_path, tokenizer, train[1:2], evaluation, long_documents="drop")


@pytest.mark.parametrize("deduplicate", [False, True])
def test_the_parts_of_a_single_document_are_no_copies(tmp_path, tokenizer, capsys, deduplicate):
    (tmp_path / "one.txt").write_text(make_text(300))
    config = DataConfig(train_files=[f"{tmp_path}/one.txt"], block_size=16, deduplicate=deduplicate)
    blocks = load_data(config, *load_documents(config, 0), tokenizer, 0)[1]
    assert len(blocks.stream) > 20 and "twice" not in capsys.readouterr().out


def test_splits_of_a_directory_and_rewritten_files_are_no_stale_tokens(tmp_path, tokenizer):
    """Streamed or stored, the text changes with the directory, the split, and the content at equal size and time."""
    for name in ("d1", "d2"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            rows = "".join(json.dumps({"text": f"{name} {split} {i}"}) + "\n" for i in range(30))
            (tmp_path / name / f"{split}.jsonl").write_text(rows)

    def held_out(name, split, streaming):
        config = DataConfig(dataset=str(tmp_path / name), dataset_eval_split=split, block_size=16, streaming=streaming)
        training, blocks = load_data(config, *load_documents(config, 0), tokenizer, 0)
        return training.identity["training text"], tokenizer.decode(blocks.stream[:20])

    for streaming in (True, False):
        for name in ("d1", "d2"):
            for split in ("validation", "test"):
                said = held_out(name, split, streaming)[1]
                is_rewritten = (name, split, streaming) == ("d1", "test", False)
                assert said.startswith(f"{'D1' if is_rewritten else name} {split} 0")
        before = held_out("d1", "test", streaming)[0]
        assert before != held_out("d2", "test", streaming)[0] and before == held_out("d1", "validation", streaming)[0]
        new = "D1" if streaming else "E1"
        for split in ("test", "train"):
            path = tmp_path / f"d1/{split}.jsonl"
            stat = path.stat()
            path.write_text(path.read_text().replace("d1" if streaming else "D1", new))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after, text = held_out("d1", "test", streaming)
        assert after != before and text.startswith(f"{new} test 0")
