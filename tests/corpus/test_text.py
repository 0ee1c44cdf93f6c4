"""Files, tables and Hub datasets as documents: formats, columns, templates, filters, revisions."""

import gzip
import json
from functools import partial

import datasets
import pytest
from conftest import make_text
from texts import all_ids, read_rows, texts

from cli.errors import UserError
from cli.hub import split_revision
from corpus.flags import DataConfig, TextConfig
from corpus.readers import READERS, read_csv, read_json
from corpus.tokenize import tokenize
from data import load_data, load_documents


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


def test_held_out_by_document_and_seed(jsonl_file, tokenizer):
    config = DataConfig(train_files=[str(jsonl_file)], text_column="answers.text", eval_fraction=0.2)
    whole = [" ".join(json.loads(line)["answers"]["text"]) for line in jsonl_file.read_text().splitlines()]
    parts = {}
    for seed in (1, 2):
        train, evaluation = load_data(config, *load_documents(config, seed), tokenizer, seed)
        ids = (train.blocks.stream[:], evaluation.stream[:])
        parts[seed] = [tokenizer.decode(part).split(tokenizer.eos_token)[:-1] for part in ids]
        assert len(parts[seed][1]) == 12 and sorted(parts[seed][0] + parts[seed][1]) == sorted(whole)
        assert texts(load_documents(config, seed)[0]) == parts[seed][0]  # the text that trains a new tokenizer
    assert parts[1][1] != parts[2][1]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_single_document_is_held_out_from_its_end(kind, text_file, tokenizer, tmp_path, capsys):
    text = text_file.read_text(encoding="utf-8")
    path = text_file
    if kind == "jsonl":
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"text": text}))
    config = DataConfig(train_files=[str(path)], eval_fraction=0.25)
    training, evaluation = load_documents(config, 0)
    (head,) = texts(training)
    assert text.startswith(head) and len(head) == int(len(text) * 0.75)  # the text that trains a new tokenizer
    train, held_out = load_data(config, training, evaluation, tokenizer, 0)
    # No end-of-text is in the middle: together the parts have the tokens of the whole.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert all_ids(train.blocks) + all_ids(held_out) == ids and len(train.blocks.stream) == int(len(ids) * 0.75)
    assert "twice" not in capsys.readouterr().out  # the two parts are no copies


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 20 + b'{"text": null}\n', ["record 21 ", "None"]),
        ("a.jsonl", b'{"other": "a"}\n', ["--text_column text", "The record has other. Use --text_column other."]),
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz", "cannot be read"]),
        ("a.doc", b"x", ["a.doc", "unknown format"]),
        ("a.jsonl", b'{"text": \n', ["a.jsonl", "cannot be read (line 1"]),
    ],
)
def test_unreadable_text_says_why(name, content, words, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        config = DataConfig(train_files=[str(tmp_path / name)], eval_files=[str(tmp_path / name)])
        tokenize(load_documents(config, 0)[0].sources[0], tokenizer)
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
        (["yes=true", "n=2.0"], ["three"]),
        (["yes!=true", "n!=1"], ["two"]),
    ],
)
def test_a_filter_keeps_records_whose_column_is_that_text(rules, kept):
    documents = read_rows(TABLE, TextConfig(text_column="title", filter=rules))
    assert texts(documents) == kept


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
        training, _ = load_documents(DataConfig(dataset=name), 0)
        assert texts(training.sources[0]) == ["a", "b"]
        with pytest.raises(UserError, match=rf"--dataset {name}@v1: {name} is local and has no revisions. Remove @v1"):
            load_documents(DataConfig(dataset=f"{name}@v1"), 0)
    mixed, _ = load_documents(DataConfig(mix=["saved@home:1", "rows@home:2"]), 0)
    assert len(texts(mixed)) == 2


@pytest.mark.parametrize(
    ("suffix", "entry", "content"),
    [
        (".rst", None, "some text\n"),
        (".ndjson", read_json, '{"text": "some text\\n"}\n'),
        (".tsv", partial(read_csv, delimiter="\t"), 'n\ttext\n1\t"some text\n"\n'),
    ],
)
def test_a_new_format_is_one_entry(suffix, entry, content, tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, suffix, entry)
    (tmp_path / f"a{suffix}").write_text(content)
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(content.encode()))
    config = DataConfig(
        train_files=[f"{tmp_path}/*{suffix}*"], eval_files=[f"{tmp_path}/a{suffix}"], text_column="text"
    )
    assert texts(load_documents(config, 0)[0]) == ["some text\n"] * 2
    config = DataConfig(mix=[f"{tmp_path}/a{suffix}:1"], eval_files=config.eval_files)
    assert texts(load_documents(config, 0)[0]) == ["some text\n"]
