"""Conversations: chat templates, and loss on the answers."""

import copy
import json

import chat_families
import datasets
import numpy as np
import pytest
from texts import loss_text, read_rows, texts
from tokenizers import decoders, processors

from cli.errors import UserError
from corpus.chat import CHAT_TEMPLATE, render
from corpus.flags import DataConfig, TextConfig
from corpus.messages import read_messages
from corpus.sources import read_documents
from corpus.tokenize import tokenize
from corpus.tokens import concatenate
from data import load_documents


def turns(*contents, system=None):
    """Return messages of user and assistant in turn."""
    roles = [("system", system)] * (system is not None)
    roles += [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [{"role": role, "content": content} for role, content in roles]


CHATS = [turns("the model", "learns", "a text", "of loss"), turns("x = 1", "def", system="in"), turns("the")]


END = "<|endoftext|>"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# The form of an answer depends on its place: only the last answer has a thought before it.
THINKING = CHATML.replace("{{ m.content }}", "{{ '<think></think>' if loop.last else '' }}{{ m.content | trim }}")


def chats(conversations=CHATS[:2], **settings):
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in conversations])
    return read_rows(table, TextConfig(text_column="chat.messages", **settings))


@pytest.fixture
def chat_tokenizer(tokenizer):
    """Return a copy of the tokenizer, so that its template may change."""
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
    assert texts(chats())[1] == "inx = 1def"  # the text that trains a new tokenizer
    chat_tokenizer.save_pretrained(tmp_path)
    again = type(chat_tokenizer).from_pretrained(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    assert tokenize(chats(), again).sha256 == stream.sha256 and "template" not in capsys.readouterr().err
    both = tokenize(chats(CHATS, loss_on="all"), again)
    assert both.num_loss_tokens == len(both) > len(stream)


def test_turns_end_with_the_token_of_the_template(chat_tokenizer):
    """In ChatML, turns end with a token and a newline. The token may also be the end-of-text."""
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
        (turns("the", "</s>", "a")[1:], "record 2: does not fit the chat template .*the user first"),
        (CHATS[2], "record 2 has no message of the assistant"),
        ([], "record 2 has no messages"),
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
    assert not train.has_messages
    assert load_documents(DataConfig(train_files=[f"{tmp_path}/a.jsonl"]), 0)[0].has_messages
    streams = [tokenize(source, chat_tokenizer) for source in train.sources]
    with_loss = loss_text(concatenate(streams), chat_tokenizer).removesuffix(END).split(END)
    assert with_loss == ["model"] * 4 + ["a text of loss " * 20]


def test_end_of_text_ends_an_answer_without_an_end_token(tokenizer):
    """Without it, a template without special tokens would never teach a model to stop."""
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = (
        "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant\n{% endif %}"
    )
    turns = [("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "last")]
    pieces = render([{"role": role, "content": content} for role, content in turns], twin)
    assert [text for text, has_loss in pieces if has_loss] == ["first\n\n", "last\n\n"] and pieces[-1][1]


def test_messages_in_braces_are_messages():
    table = datasets.Dataset.from_list([{"chat": {"messages": messages}} for messages in CHATS[:2]])
    assert read_rows(table, TextConfig(text_column="{chat.messages}")).has_messages
    template = read_rows(table, TextConfig(text_column="{chat.messages}!"))
    with pytest.raises(
        UserError, match=r"record 1 contains .*, not text, in column chat.messages.*Use --text_column chat\.messages"
    ):
        texts(template)


@pytest.mark.parametrize("trims", [False, True], ids=["", "trim_offsets"])
@pytest.mark.parametrize("family", [name for name in chat_families.FAMILIES if name != "generation"])
def test_the_tokens_that_are_learnt_are_what_the_assistant_says(family, trims, tmp_path):
    """A token may include the white space behind it (Phi-3). Offsets may leave white space out (GPT-NeoX)."""
    tokenizer, said = chat_families.FAMILIES[family]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    call = {
        "type": "function",
        "id": "call00000",
        "function": {"name": "find", "arguments": {"city": "Rome", "x": None}},
    }
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    talks = [turns("a", "b ", "c\n", "d e"), turns("x", "é 東京\n\ny")]
    if family in ("llama", "mistral", "qwen"):
        rest = [{"role": "tool", "content": "rain", "tool_call_id": "call00000"}, *turns("", "It rains.")[1:]]
        talks.append([*turns("weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}, *rest])
    records = [{"chat": talk} | ({"tools": tools} if i == 2 else {}) for i, talk in enumerate(talks)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stream = tokenize(read_documents(TextConfig(text_column="chat"), "--files", [f"{tmp_path}/a.jsonl"]), tokenizer)
    for i, talk in enumerate(talks):
        answers = [said(message) for message in read_messages(talk, "") if message["role"] == "assistant"]
        learnt = loss_text(stream.select(np.array([i])), tokenizer)
        assert learnt in ("".join(answers), "".join(answers) + tokenizer.eos_token)
    assert family not in ("llama", "mistral", "qwen") or '{"city": "Rome", "x": null}' in learnt


def test_prompts_and_completions_may_be_messages(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = CHATML
    shapes = {
        "prompt": [{"prompt": turns("q", "old", "r"), "completion": turns("", "new")[1:]}] * 3,
        "share": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "new"}]}] * 3,
    }
    for name, records in shapes.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        columns = {"prompt_column": "prompt", "completion_column": "completion"}
        config = TextConfig(**columns) if name == "prompt" else TextConfig(text_column="conversations")
        documents = read_documents(config, "--files", [f"{tmp_path}/{name}.jsonl"])
        assert loss_text(tokenize(documents, chat_tokenizer), chat_tokenizer) == "new<|im_end|>" * 3
    (tmp_path / "alpaca.jsonl").write_text(json.dumps({"instruction": "add", "input": "1 1", "output": "2"}) + "\n")
    columns = {"prompt_column": "{instruction}\\n{input}\\n", "completion_column": "output"}
    documents = read_documents(TextConfig(**columns), "--files", [f"{tmp_path}/alpaca.jsonl"])
    assert texts(documents) == ["add\n1 1\n2"]
    assert loss_text(tokenize(documents, chat_tokenizer), chat_tokenizer) == f"2{END}"
