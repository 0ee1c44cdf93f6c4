"""Files, tables and Hub datasets as documents: formats, columns, templates, filters, revisions."""

import gzip
import json

import datasets
import numpy as np
import pytest
from conftest import make_text
from texts import texts

from cli.errors import UserError
from cli.hub import split_revision
from corpus import streaming
from corpus.flags import DataConfig, TextConfig
from corpus.formats import FORMATS
from corpus.records import read_rows
from corpus.sources import load_documents
from corpus.tokenize import tokenize


def test_every_format_gives_the_same_documents(tmp_path):
    documents = [make_text(30, seed) for seed in range(12)]
    table = datasets.Dataset.from_dict({"text": documents})
    table.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in documents]), encoding="utf-8")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "other": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for i, text in enumerate(documents):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
        (tmp_path / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    names = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.gz", "*.txt", "*.txt.gz"]
    configs = [DataConfig(train_files=[str(tmp_path / name)]) for name in names]
    configs += [DataConfig(dataset=str(tmp_path / name)) for name in ("saved", "splits")]
    for config in configs:
        config.eval_files = [str(tmp_path / "a.jsonl")]
        train, evaluation = load_documents(config, 0)
        assert texts(train) == documents, config
        assert texts(evaluation) == documents
    for name, split in (("saved", "test"), ("splits", "test")):
        with pytest.raises(UserError, match=r"split test does not exist\. Use one of"):
            load_documents(DataConfig(dataset=str(tmp_path / name), dataset_eval_split=split), 0)
    config = DataConfig(dataset=str(tmp_path / "splits"), dataset_eval_split="other", max_documents=5)
    assert [texts(part) for part in load_documents(config, 0)] == [documents[:5], documents[:3]]


def test_nested_columns_are_joined(rows, jsonl_file):
    answers = [json.loads(line)["answers"]["text"] for line in jsonl_file.read_text().splitlines()]
    assert texts(rows) == [" ".join(answer) for answer in answers]  # the guide's way
    config = DataConfig(
        train_files=[str(jsonl_file)], text_column="answers.text", text_separator="\n\n", max_documents=3
    )
    config.eval_files = [str(jsonl_file)]
    assert texts(load_documents(config, 0)[0]) == ["\n\n".join(answer) for answer in answers[:3]]


def test_lists_of_records_are_joined():
    table = datasets.Dataset.from_list([{"turns": [{"say": "a"}, {"say": "b"}]}, {"turns": [{"say": "c"}]}])
    config = TextConfig(text_column="turns.say", text_separator="|")
    assert texts(read_rows(table, config)) == ["a|b", "c"]


def test_held_out_by_document_and_seed(jsonl_file):
    config = DataConfig(train_files=[str(jsonl_file)], text_column="answers.text", eval_fraction=0.2)
    train, evaluation = load_documents(config, 1)
    whole = [" ".join(json.loads(line)["answers"]["text"]) for line in jsonl_file.read_text().splitlines()]
    assert len(evaluation) == 12 and sorted(texts(train) + texts(evaluation)) == sorted(whole)
    assert texts(evaluation) == texts(load_documents(config, 1)[1]) != texts(load_documents(config, 2)[1])


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_single_document_is_held_out_from_its_end(kind, text_file, tokenizer, tmp_path):
    text = text_file.read_text(encoding="utf-8")
    path = text_file
    if kind == "jsonl":
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"text": text}))
    parts = load_documents(DataConfig(train_files=[str(path)], eval_fraction=0.25), 0)
    (head,), (tail,) = map(texts, parts)
    assert head + tail == text and 0.7 < len(head) / len(text) <= 0.75
    streams = [tokenize(part, tokenizer) for part in parts]
    # Cut between words, and not ended in the middle: together they are the tokens of the whole.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert np.concatenate([streams[0][:], streams[1][:]]).tolist() == ids


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 20 + b'{"text": null}\n', ["record 21 ", "None"]),
        ("a.jsonl", b'{"other": "a"}\n', ["--text_column text", "Use one of other"]),
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz", "cannot be read"]),
        ("a.doc", b"x", ["a.doc", "unknown format"]),
        ("a.jsonl", b'{"text": \n', ["a.jsonl", "not readable as json"]),
    ],
)
def test_unreadable_text_says_why(name, content, words, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        config = DataConfig(train_files=[str(tmp_path / name)], eval_files=[str(tmp_path / name)])
        tokenize(load_documents(config, 0)[0], tokenizer)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


TABLE = datasets.Dataset.from_list(
    [
        {"title": "one", "n": 1, "yes": True, "answers": {"text": ["a", "b"]}, "r": "askscience"},
        {"title": "two", "n": 2, "yes": False, "answers": {"text": ["c"]}, "r": "a=b"},
        {"title": "three", "n": 2, "yes": True, "answers": {"text": []}, "r": None},
    ]
)


def test_a_template_fills_in_columns():
    def of(template):
        return texts(read_rows(TABLE, TextConfig(text_column=template, text_separator="+")))

    assert of(r"{title}\n{answers.text}") == of("{title}\n{answers.text}") == ["one\na+b", "two\nc", "three\n"]
    assert of("{{x}} {title}!") == ["{x} one!", "{x} two!", "{x} three!"]
    column = read_rows(TABLE, TextConfig(text_column="answers.text"))
    assert column.fingerprint == read_rows(TABLE, TextConfig(text_column="{answers.text}")).fingerprint


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["n=2"], ["two", "three"]),
        (["n!=2"], ["one"]),
        (["n=2", "yes=True"], ["three"]),
        (["r=askscience"], ["one"]),
        (["r!=askscience"], ["two", "three"]),
        (["r=a=b"], ["two"]),
        (["answers.text=a b"], ["one"]),
        (["answers.text="], ["three"]),
    ],
)
def test_a_filter_keeps_records_whose_column_is_that_text(rules, kept, capsys):
    documents = read_rows(TABLE, TextConfig(text_column="title", filter=rules))
    assert texts(documents) == kept
    assert (
        f"filter    {rules[-1]}: {len(kept)} of {len(TABLE) + 1 - len(rules)} records kept" in capsys.readouterr().out
    )


def test_errors_count_records_as_the_file_does():
    rows = read_rows(TABLE, TextConfig(text_column="r", filter=["n=2"]))
    with pytest.raises(UserError, match="--text_column r: record 3 contains None"):
        texts(rows)


def test_a_revision_follows_the_last_at_sign_unless_the_path_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_revision("someone/answers", "--dataset") == ("someone/answers", None)
    assert split_revision("someone/answers@refs/pr/1", "--dataset") == ("someone/answers", "refs/pr/1")
    assert split_revision("someone/a@b@main", "--dataset") == ("someone/a@b", "main")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk("saved@home")
    (tmp_path / "rows@home").mkdir()
    (tmp_path / "rows@home/train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    for name in ("saved@home", "rows@home"):
        train, held_out = load_documents(DataConfig(dataset=name), 0)
        assert sorted(texts(train) + texts(held_out)) == ["a", "b"]
        with pytest.raises(UserError, match=rf"--dataset {name}@v1: {name} is local and has no revisions. Remove @v1"):
            load_documents(DataConfig(dataset=f"{name}@v1"), 0)
    mixed, _ = load_documents(DataConfig(mix=["saved@home:1", "rows@home:2"]), 0)
    assert len(texts(mixed)) == 2


@pytest.mark.parametrize(
    ("suffix", "entry", "content"),
    [
        (".md", "text", "some text\n"),
        (".ndjson", "json", '{"text": "some text\\n"}\n'),
        (".tsv", ("csv", {"sep": "\t"}), 'n\ttext\n1\t"some text\n"\n'),
    ],
)
def test_a_new_format_is_one_entry(suffix, entry, content, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, suffix, entry)
    (tmp_path / f"a{suffix}").write_text(content)
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(content.encode()))
    config = DataConfig(
        train_files=[f"{tmp_path}/*{suffix}*"], eval_files=[f"{tmp_path}/a{suffix}"], text_column="text"
    )
    assert texts(load_documents(config, 0)[0]) == ["some text\n"] * 2
    assert texts(streaming.load_documents(config, 0)[0]) == ["some text\n"] * 2
    config = DataConfig(mix=[f"{tmp_path}/a{suffix}:1"], eval_files=config.eval_files)
    assert texts(load_documents(config, 0)[0]) == ["some text\n"]
