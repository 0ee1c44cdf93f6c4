"""Conversations: chat templates, and loss on the answers."""

import copy
import json

import datasets
import pytest
from texts import loss_text, texts

from cli.errors import UserError
from corpus.chat import CHAT_TEMPLATE, render
from corpus.flags import DataConfig, TextConfig
from corpus.records import read_rows
from corpus.sources import load_documents
from corpus.tokenize import tokenize


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


# The form of an answer depends on its place: only the last one follows a thought.
THINKING = CHATML.replace("{{ m.content }}", "{{ '<think></think>' if loop.last else '' }}{{ m.content | trim }}")


def chats(conversations=CHATS[:2], **settings):
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in conversations])
    return read_rows(table, TextConfig(text_column="chat.messages", **settings))


@pytest.fixture
def chat_tokenizer(tokenizer):
    """A copy of the tokenizer whose template may change."""
    return copy.deepcopy(tokenizer)


def test_a_tokenizer_without_a_template_gets_ours(chat_tokenizer, tmp_path, capsys):
    stream = tokenize(chats(), chat_tokenizer)
    assert chat_tokenizer.chat_template == CHAT_TEMPLATE and "no chat template" in capsys.readouterr().err
    said = f"user:\nthe model{END}assistant:\nlearns{END}user:\na text{END}assistant:\nof loss{END}"
    assert (
        chat_tokenizer.decode([max(i, ~i) for i in stream[:]])
        == said + f"system:\nin{END}user:\nx = 1{END}assistant:\ndef{END}"
    )
    assert loss_text(stream, chat_tokenizer) == f"learns{END}of loss{END}def{END}"
    assert texts(chats())[1] == "inx = 1def"  # what a new tokenizer is trained on
    chat_tokenizer.save_pretrained(tmp_path)
    again = type(chat_tokenizer).from_pretrained(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    assert tokenize(chats(), again).sha256 == stream.sha256 and "template" not in capsys.readouterr().err
    both = tokenize(chats(CHATS, loss_on="all"), again)
    assert both.num_loss_tokens == len(both) > len(stream)


def test_turns_end_with_the_token_of_the_template(chat_tokenizer):
    """ChatML, whose turns end with a token that is not, or is, the end of the text, and with a newline."""
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat_tokenizer.chat_template = CHATML
    stream = tokenize(chats(), chat_tokenizer)
    assert loss_text(stream, chat_tokenizer) == "learns<|im_end|>of loss<|im_end|>def<|im_end|>"
    chat_tokenizer.eos_token = "<|im_end|>"
    stream = tokenize(chats(), chat_tokenizer)
    assert loss_text(stream, chat_tokenizer) == "learns<|im_end|>of loss<|im_end|>def<|im_end|>"
    assert chat_tokenizer.decode([max(i, ~i) for i in stream[:]]).count("<|im_end|>") == 7


def test_a_template_with_bos_adds_one_bos(chat_tokenizer):
    chat_tokenizer.add_special_tokens({"bos_token": "<|s|>"})
    chat_tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    text = chat_tokenizer.decode([max(i, ~i) for i in tokenize(chats(), chat_tokenizer)[:]])
    assert text.count("<|s|>") == 2 and text.startswith("<|s|>user:")


def test_an_answer_is_found_where_the_template_puts_it(chat_tokenizer):
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat_tokenizer.chat_template = THINKING
    said = [*CHATS[:2], turns(" assistant\n ", "assistant\n", "user", "  x  ")]
    stream = tokenize(chats(said), chat_tokenizer)
    with_loss = ["learns", "<think></think>of loss", "<think></think>def", "assistant", "<think></think>x"]
    assert loss_text(stream, chat_tokenizer) == "".join(text + "<|im_end|>" for text in with_loss)
    chat_tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(UserError, match=r"--text_column chat\.messages: record 1: .* changes the contents"):
        tokenize(chats(), chat_tokenizer)
    both = tokenize(chats(loss_on="all"), chat_tokenizer)
    assert both.num_loss_tokens == len(both) and "OF LOSS" in chat_tokenizer.decode(both[:])


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
def test_malformed_conversations_are_named(messages, words, chat_tokenizer):
    ordered = "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user first') }}{% endif %}"
    chat_tokenizer.chat_template = ordered + CHATML
    with pytest.raises(UserError, match=words) as error:
        tokenize(chats([CHATS[0], messages]), chat_tokenizer)
    assert "\n" not in str(error.value)


def test_conversations_and_plain_text_mix(chat_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": turns("the", "model")}) + "\n" for _ in range(4)))
    (tmp_path / "b.txt").write_text("a text of loss " * 20)
    config = DataConfig(mix=[f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.txt:1"])
    train, _ = load_documents(config, 0)
    with_loss = loss_text(tokenize(train, chat_tokenizer), chat_tokenizer).removesuffix(END).split(END)
    assert with_loss == ["model"] * 3 + [texts(train)[-1]]
    with pytest.raises(UserError, match="cannot hold out a part of a single record"):
        load_documents(DataConfig(train_files=[f"{tmp_path}/a.jsonl"], max_documents=1), 0)


def test_end_of_text_ends_an_answer_without_an_end_token(tokenizer):
    """Without this, a template without special tokens would never teach a model to stop."""
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = (
        "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant\n{% endif %}"
    )
    turns = [("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "last")]
    pieces = render([{"role": role, "content": content} for role, content in turns], twin)
    assert [text for text, has_loss in pieces if has_loss] == ["first", "last\n\n"] and pieces[-1][1]


def test_messages_in_braces_are_messages():
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in CHATS[:2]])
    assert read_rows(table, TextConfig(text_column="{chat.messages}")).has_messages
    template = read_rows(table, TextConfig(text_column="{chat.messages}!"))
    with pytest.raises(UserError, match=r"record 1 contains .*, not text\. Remove the record"):
        texts(template)
