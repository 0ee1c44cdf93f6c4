"""Readers of files: every format gives the text as it is written, and reading resumes exactly after any record."""

import csv
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import make_text
from texts import texts

from cli.errors import UserError
from corpus import files as files_module
from corpus.files import Files, find_files
from corpus.flags import TextConfig
from corpus.readers import READERS, open_file
from corpus.sources import read_documents

LONG = ("a long cell, é 東京, " * 400 + "\r\n") * 1200  # 10 MB
RECORDS = [{"n": str(i), "text": make_text(5 + i, i) + '\n"quoted", and\r\nmore\n'} for i in range(7)]
RECORDS += [
    {"n": "007", "text": LONG},
    {"n": "1.50", "text": "NA"},
    {"n": "null", "text": ""},
    {"n": "", "text": "None"},
]


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_csv(records):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, records[0])
    writer.writeheader()
    writer.writerows(records)
    return table.getvalue().encode()


def as_arrow(records, new_file):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(records)
    with new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def as_parquet(records):
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(records), sink, row_group_size=4)
    return sink.getvalue()


FORMATS = {
    "lines.jsonl": as_lines,
    "lines.json": as_lines,
    "list.json": lambda records: json.dumps(records, ensure_ascii=False, indent=1).encode(),
    "table.csv": as_csv,
    "bom.csv": lambda records: b"\xef\xbb\xbf" + as_csv(records),
    "bom.jsonl": lambda records: b"\xef\xbb\xbf" + as_lines(records),
    "bom.json": lambda records: b"\xef\xbb\xbf" + json.dumps(records).encode(),
    "file.arrow": lambda records: as_arrow(records, pa.ipc.new_file),
    "stream.arrow": lambda records: as_arrow(records, pa.ipc.new_stream),
    "table.parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", ["", pytest.param(".gz", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_text_and_goes_on_after_any_record(name, suffix, tmp_path):
    content = FORMATS[name](RECORDS)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix else content)
    files = Files("--train_files", (str(path), str(path)))  # also from one file into the next
    found = list(files.read())
    assert [record for record, _ in found] == RECORDS * 2
    for i in (0, 6, 7, 12):
        place = json.loads(json.dumps(found[i][1]))
        assert list(files.read(place)) == found[i + 1 :]
    shards = [list(files.read(None, None, index, 3)) for index in range(3)]
    assert sorted((p["file"], p["record"]) for shard in shards for _, p in shard) == [
        (p["file"], p["record"]) for _, p in found
    ]
    rest = list(files.read(shards[1][2][1], None, 1, 3))
    assert rest == shards[1][3:]
    if not suffix:  # like an HTTP server without ranges
        with open_file(str(path)) as whole:
            stream = io.BufferedReader(Unseekable(whole.read()))
        if "parquet" not in name and name != "file.arrow":
            records = [record for record, _ in READERS[path.suffix](stream, found[6][1]["at"], **columns(name))]
            assert records == RECORDS[7:]


def columns(name):
    return {"columns": None} if "arrow" in name else {}


class Unseekable(io.RawIOBase):
    def __init__(self, content):
        self._content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._content.readinto(buffer)


def documents(path, **settings):
    return read_documents(TextConfig(**settings), "--train_files", [str(path)])


def test_json_lines_may_have_optional_nested_keys(tmp_path):
    """With `datasets`, a key of only one record was an error, even far into the text or in a later file."""
    early = [{"text": "a", "meta": {"x": 1}}, {"text": "b", "meta": {"x": None, "name": "n"}}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(early + [{"text": "x" * 100_000}] * 130))
    (tmp_path / "b.jsonl").write_bytes(as_lines([{"text": "d", "late": [{"tool_calls": []}], "meta": "text"}]))
    found = texts(documents(tmp_path / "*.jsonl"))
    assert found[:3] + found[-1:] == ["a", "b", "c", "d"] and len(found) == 134
    assert texts(documents(tmp_path / "*.jsonl", filter=["meta.name=n"])) == ["b"]
    nested = [{"c": [{"args": {"city": "Rome", "x": None}}]}, {"c": [{"args": {"day": 1}}]}]
    (tmp_path / "n.jsonl").write_bytes(as_lines(nested))
    assert [record for record, _ in find_files("--files", [f"{tmp_path}/n.jsonl"]).read()] == nested
    # An Arrow table has the keys of all rows in each row. Keys without a value were never written.
    (tmp_path / "n.parquet").write_bytes(as_parquet([{"c": [{"args": {"city": "Rome"}}]}, nested[1], {"c": None}]))
    found = [record for record, _ in find_files("--files", [f"{tmp_path}/n.parquet"]).read()]
    assert found == [{"c": [{"args": {"city": "Rome"}}]}, nested[1], {"c": None}]


def test_a_text_file_may_begin_with_a_mark_and_hold_a_nul(tmp_path):
    text = make_text(30_000) + "\0" + "end\r\n"
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts(documents(tmp_path / "a.md")) == [text]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\0b", "answers.text": "literal"}))
    assert texts(documents(tmp_path / "a.jsonl")) == ["a\0b"]
    assert texts(documents(tmp_path / "a.jsonl", text_column="answers.text")) == ["literal"]
    assert texts(documents(tmp_path / "a.jsonl", text_column="{answers.text}!")) == ["literal!"]


def test_a_directory_is_read_recursively(tmp_path, capsys):
    names = ("a.txt", "b/c.md", "b/d/e.txt.gz", ".hidden.txt", ".git/f.txt", "b/page.html", "Makefile", "empty.md")
    for name in names:
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = name.encode() * (name != "empty.md")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(documents(tmp_path / "notes")) == ["a.txt", "b/c.md", "b/d/e.txt.gz"]
    said = f"skipped   5 files of {tmp_path}/notes: 1 *, 1 *.html, 1 empty, 2 hidden\n"
    assert capsys.readouterr().out == said
    assert texts(documents(tmp_path / "notes" / "**" / "[a-d].*")) == ["a.txt", "b/c.md"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has 1 cells, and the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 2: unexpected end of data"),
        ("a.csv", b"a,b\n1,caf\xe9\n", "not UTF-8"),
        ("a.json", b'[{"a": "1"},\n{"a": "2"}\n', "line 3: Expecting ',' delimiter"),
        ("a.json", b'[{"a": "1"},\n{"a" 2}]\n', "line 2: Expecting ':' delimiter"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "record 2 is no object"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1 names a column twice"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "record 2 has half a surrogate pair"),
    ],
)
def test_broken_files_say_where(name, content, words, tmp_path, tokenizer):
    from corpus.tokenize import tokenize

    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenize(documents(tmp_path / name, text_column="a" if b'"text' not in content else "text"), tokenizer)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_shape_is_shown_with_the_flags_that_read_it(tmp_path):
    record = {
        "instruction": "a",
        "input": "",
        "output": "b",
        "meta": {"page": "c", "n": 1},
        "turns": [{"from": "gpt", "value": "d"}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        documents(tmp_path / "a.jsonl")
    said = "--text_column text: column text does not exist. "
    said += "The record has instruction, input, output, meta.page, meta.n, turns. "
    use = r"Use --prompt_column '{instruction}\n{input}\n' --completion_column output or --text_column instruction or "
    assert str(error.value).startswith(said + use)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": 7, "turns": record["turns"]}))
    with pytest.raises(UserError, match=r"record 1 contains 7, not text.* Use --text_column turns\."):
        texts(documents(tmp_path / "b.jsonl"))


def test_a_lost_connection_is_opened_again(tmp_path, site, monkeypatch, capsys):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)
    (tmp_path / "a.jsonl").write_bytes(as_lines([*RECORDS[:3], {"n": "8", "text": LONG}, *RECORDS[:3]]))
    url = f"{site}/a.jsonl"  # this server knows no ranges, and the file is larger than one read
    files = find_files("--train_files", [url], allow_urls=True)
    found = list(files.read())
    assert [record["n"] for record, _ in found] == ["0", "1", "2", "8", "0", "1", "2"]
    assert list(files.read(found[4][1])) == found[5:]
    assert f"--train_files {url}: " in capsys.readouterr().err
    monkeypatch.setattr(files_module, "open_file", lambda *_, **__: 1 / 0)
    for place, retries in ((found[4][1], 5), (None, 0)):  # a file that was never readable is not tried again
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(division by zero\)"):
            list(files.read(place))
        assert capsys.readouterr().err.count("Reading goes on in") == retries


@pytest.mark.parametrize("name", ["cells.parquet", "file.arrow"])
def test_few_large_cells_are_in_memory_at_once(name, tmp_path):
    """A hundred rows at once took 2.5 GB for cells of 10 MB. The cells are equal, so the file is small."""
    table = pa.table({"text": [LONG] * 24})
    if name == "file.arrow":
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    else:
        pa.parquet.write_table(table, tmp_path / name)
    files = find_files("--files", [f"{tmp_path}/{name}"])
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    number = 0
    for record, _ in files.read():
        number += 1
        assert record == {"text": LONG} and pa.total_allocated_bytes() - before < 10 * len(LONG)
    assert number == 24 and tracemalloc.get_traced_memory()[1] < 10 * len(LONG)
    tracemalloc.stop()


def test_the_first_record_that_is_kept_decides_the_shape(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for first in ({"text": []}, {"text": "plain", "n": 1}, {"n": 1, "text": None}):
        (tmp_path / "a.jsonl").write_text(json.dumps(first) + "\n" + json.dumps({"text": talk, "n": 2}))
        assert documents(tmp_path / "a.jsonl", filter=["n!=1"]).has_messages
    rows = [{"text": "a"}] * 200 + [{"text": "b", "lang": "en"}]  # only a late record has this column
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    assert texts(documents(tmp_path / "a.jsonl", filter=["lang=en"])) == ["b"]
    for rule in ("lange=en", "lange!=en"):
        with pytest.raises(UserError, match=f"--filter {rule}: column lange does not exist"):
            texts(documents(tmp_path / "a.jsonl", filter=[rule]))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 3}\n{"text": null, "n": 12345678901234567}\n')
    assert texts(documents(tmp_path / "a.jsonl", text_column="{n}: {text}", max_documents=1)) == ["3: a"]
    with pytest.raises(UserError, match=r"record 2 contains None, not text, in column text\. Use --filter text!=None"):
        texts(documents(tmp_path / "a.jsonl"))
    assert texts(documents(tmp_path / "a.jsonl", filter=["text!=None"])) == ["a"]
    assert texts(documents(tmp_path / "a.jsonl", text_column="{n}!", filter=["n=12345678901234567"])) == [
        "12345678901234567!"
    ]


def test_shards_share_the_first_documents(tmp_path):
    for name, count in (("a", 3), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_bytes(as_lines([{"text": f"{name}{i}", "n": i % 2} for i in range(count)]))
    source = documents(tmp_path / "*.jsonl", max_documents=20, filter=["n=1"])
    whole = ["".join(text for text, _ in document.pieces) for document in source.read()]
    assert len(whole) == 20
    for count in (2, 3):
        shards = [list(source.read(None, None, index, count)) for index in range(count)]
        found = [["".join(text for text, _ in document.pieces) for document in shard] for shard in shards]
        assert sorted(text for shard in found for text in shard) == sorted(whole) and found[0] == whole[::count]
        rest = source.read(None, shards[1][2].place, 1, count)
        assert ["".join(text for text, _ in document.pieces) for document in rest] == found[1][3:]


def test_a_url_has_a_known_format_and_links_are_counted(tmp_path, capsys):
    with pytest.raises(UserError, match=r"--train_files https://example\.org/a\.tsv: unknown format\. Use one of"):
        find_files("--train_files", ["https://me:pw@example.org/a.tsv"], allow_urls=True)
    for path in (tmp_path / "far" / "b.txt", tmp_path / "near" / "a.txt"):
        path.parent.mkdir()
        path.write_text(path.name)
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    assert texts(documents(tmp_path / "near")) == ["a.txt"]
    assert "1 links to directories" in capsys.readouterr().out
    url = f"file://{tmp_path}/far/b.txt"
    before = Files("--train_files", (url,)).identity
    (tmp_path / "far" / "b.txt").write_text("c.txt")
    assert Files("--train_files", (url,)).identity != before  # same length, another text
