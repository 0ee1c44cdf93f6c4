import copy
import gzip
import json

import datasets
import numpy as np
import pytest
from conftest import make_text
from test_data import scored_text, texts

from cli.errors import UserError
from cli.hub import split_revision
from corpus import streaming
from corpus.chat import CHAT_TEMPLATE, render
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


# ---------------------------------------------------------------------------------------------------------------------
# Which text of a record, and which records


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


def test_the_record_is_named_as_it_is_counted_in_the_file():
    rows = read_rows(TABLE, TextConfig(text_column="r", filter=["n=2"]))
    with pytest.raises(UserError, match="--text_column r: record 3 contains None"):
        texts(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def turns(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = [("system", system)] * (system is not None)
    roles += [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [{"role": role, "content": content} for role, content in roles]


CHATS = [turns("the model", "learns", "a text", "of loss"), turns("x = 1", "def", system="in"), turns("the")]
END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What answers look like depends on what follows: the last one is behind a thought.
THINKING = CHATML.replace("{{ m.content }}", "{{ '<think></think>' if loop.last else '' }}{{ m.content | trim }}")


def chats(conversations=CHATS[:2], **settings):
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in conversations])
    return read_rows(table, TextConfig(text_column="chat.messages", **settings))


@pytest.fixture
def speaker(tokenizer):
    """A tokenizer of our own to give a template to."""
    return copy.deepcopy(tokenizer)


def test_a_tokenizer_without_a_template_gets_ours(speaker, tmp_path, capsys):
    stream = tokenize(chats(), speaker)
    assert speaker.chat_template == CHAT_TEMPLATE and "no chat template" in capsys.readouterr().err
    said = f"user:\nthe model{END}assistant:\nlearns{END}user:\na text{END}assistant:\nof loss{END}"
    assert (
        speaker.decode([max(i, ~i) for i in stream[:]])
        == said + f"system:\nin{END}user:\nx = 1{END}assistant:\ndef{END}"
    )
    assert scored_text(stream, speaker) == f"learns{END}of loss{END}def{END}"
    assert texts(chats())[1] == "inx = 1def"  # what a new tokenizer is trained on
    speaker.save_pretrained(tmp_path)
    again = type(speaker).from_pretrained(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    assert tokenize(chats(), again).sha256 == stream.sha256 and "template" not in capsys.readouterr().err
    both = tokenize(chats(CHATS, loss_on="all"), again)
    assert both.num_loss_tokens == len(both) > len(stream)


def test_turns_end_as_the_template_ends_them(speaker):
    """ChatML, whose turns end with a token that is not, or is, the end of the text, and with a newline."""
    speaker.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    speaker.chat_template = CHATML
    stream = tokenize(chats(), speaker)
    assert scored_text(stream, speaker) == "learns<|im_end|>of loss<|im_end|>def<|im_end|>"
    speaker.eos_token = "<|im_end|>"
    stream = tokenize(chats(), speaker)
    assert scored_text(stream, speaker) == "learns<|im_end|>of loss<|im_end|>def<|im_end|>"
    assert speaker.decode([max(i, ~i) for i in stream[:]]).count("<|im_end|>") == 7


def test_a_template_with_a_beginning_has_one_beginning(speaker):
    speaker.add_special_tokens({"bos_token": "<|s|>"})
    speaker.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    text = speaker.decode([max(i, ~i) for i in tokenize(chats(), speaker)[:]])
    assert text.count("<|s|>") == 2 and text.startswith("<|s|>user:")


def test_an_answer_is_found_where_the_template_puts_it(speaker):
    speaker.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    speaker.chat_template = THINKING
    said = [*CHATS[:2], turns(" assistant\n ", "assistant\n", "user", "  x  ")]
    stream = tokenize(chats(said), speaker)
    learnt = ["learns", "<think></think>of loss", "<think></think>def", "assistant", "<think></think>x"]
    assert scored_text(stream, speaker) == "".join(text + "<|im_end|>" for text in learnt)
    speaker.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(UserError, match=r"--text_column chat\.messages: record 1: .* changes the contents"):
        tokenize(chats(), speaker)
    both = tokenize(chats(loss_on="all"), speaker)
    assert both.num_loss_tokens == len(both) and "OF LOSS" in speaker.decode(both[:])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": None}], "record 2: message 1 lacks a role or content"),
        ([*CHATS[0], {"role": None, "content": "a"}], "record 2: message 5 lacks"),
        (turns("the", "</s>", "a")[1:], "record 2 does not fit the chat template .*the user first"),
        (CHATS[2], "record 2 has no message of the assistant"),
        ([], "record 2 has no messages"),
        (turns("a\0", "b"), "record 2: message 1 lacks"),
    ],
)
def test_malformed_conversations_are_named(messages, words, speaker):
    ordered = "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user first') }}{% endif %}"
    speaker.chat_template = ordered + CHATML
    with pytest.raises(UserError, match=words) as error:
        tokenize(chats([CHATS[0], messages]), speaker)
    assert "\n" not in str(error.value)


def test_conversations_and_plain_text_mix(speaker, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": turns("the", "model")}) + "\n" for _ in range(4)))
    (tmp_path / "b.txt").write_text("a text of loss " * 20)
    config = DataConfig(mix=[f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.txt:1"])
    train, _ = load_documents(config, 0)
    learnt = scored_text(tokenize(train, speaker), speaker).removesuffix(END).split(END)
    assert learnt == ["model"] * 3 + [texts(train)[-1]]
    with pytest.raises(UserError, match="cannot hold out a part of a single record"):
        load_documents(DataConfig(train_files=[f"{tmp_path}/a.jsonl"], max_documents=1), 0)


def test_an_answer_that_no_token_ends_is_ended_by_its_document(tokenizer):
    """In templates without special tokens, else a model would never learn to stop."""
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = (
        "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant\n{% endif %}"
    )
    turns = [("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "last")]
    pieces = render([{"role": role, "content": content} for role, content in turns], twin)
    assert [text for text, has_loss in pieces if has_loss] == ["first", "last\n\n"] and pieces[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# Revisions and formats


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


def test_messages_in_braces_are_messages():
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in CHATS[:2]])
    assert read_rows(table, TextConfig(text_column="{chat.messages}")).has_messages
    template = read_rows(table, TextConfig(text_column="{chat.messages}!"))
    with pytest.raises(UserError, match=r"record 1 contains .*, not text\. Remove the record"):
        texts(template)
