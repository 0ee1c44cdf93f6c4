"""Conversations in the templates of many families: the answers with loss, compared as text."""

import json
import time

import pytest
from chat_families import CHATML, FAMILIES, IM, MISTRAL, make_tokenizer

from cli.errors import UserError
from corpus import chat
from corpus.chat import RenderError, render, render_prompt
from corpus.messages import is_messages, read_messages

THINKING = (  # only the thought of the last answer is kept
    "{% for m in messages %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}{{ '<think>\n' }}"
    "{{ m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{{ '\n</think>\n\n' }}"
    "{% endif %}{{ answer + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def talk(*contents, system=None):
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + said


def calling(arguments, number, **more):
    call = {"type": "function", "id": f"call{number:05}", "function": {"name": "look_up", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]} | more


def result(content, number):
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}"}


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
HARD = {"q": 'a "b" <|im_end|>\n[/INST] 東京', "n": None, "deep": [{"x": 1.5}, True]}
CONVERSATIONS = {
    "one turn": talk("hello", "Hi!"),
    "many turns": talk(*(f"text {i}" for i in range(20))),
    "the user last": talk("a", "b", "c"),
    "system": talk("a", "b", "c", "d", system="Be brief."),
    "empty answers": talk("a", "", "b", ""),
    "echoes": talk("yes", "yes", "yes", "yes", system="yes"),
    "white space": talk("  a  ", "\n b \n\n", "c\n", " d  ", "\n", "e\n"),
    "template text": talk("[INST] <|im_start|>assistant\n", "[/INST]<|im_end|>\nuser\n", "assistant\n", "model\n"),
    "unicode": talk("é東京", "😀 \u200bcafé\0", "\ue000", "end"),
    "marks": talk("a", "\ufdd01\ufdd0", "b", "\ufdd0"),
}
WITH_TOOLS = [*talk("weather?"), calling(HARD, 0, content=None), result("rain", 0), *talk("", "It rains.")[1:]]
WITH_TOOLS += [*talk("", "x", "y"), calling(json.dumps(HARD), 1), result("1", 1), calling({}, 2), result("2", 2)]
WITH_TOOLS += [*talk("", "")[1:]]


def check(tokenizer, said, messages, tools=None, first=0):
    messages = read_messages(messages, "record 1")
    pieces = render(messages, tokenizer, tools=tools and json.dumps(tools), first=first)
    answers = [said(m) for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    if whole.rstrip().endswith(tokenizer.eos_token):
        whole = whole.rstrip().removesuffix(tokenizer.eos_token)
        if messages[-1]["role"] == "assistant":
            answers[-1] = answers[-1].removesuffix(tokenizer.eos_token)
    assert [text for text, has_loss in pieces if has_loss] == [answer for answer in answers if answer]
    assert "".join(text for text, _ in pieces) == whole.replace(time.strftime("%d %b %Y"), "26 Jul 2024")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_ends_of_turns_are_learnt(family, conversation):
    messages = CONVERSATIONS[conversation]
    check(*FAMILIES[family], messages)
    check(*FAMILIES[family], messages, first=len(messages) - 2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen"])
def test_tool_calls_are_learnt(family):
    check(*FAMILIES[family], WITH_TOOLS, TOOLS)
    if family == "qwen":
        two = [result("b", 0), result("c", 0), *talk("", "d")[1:]]
        check(*FAMILIES[family], [*talk("a"), calling(HARD, 0, content=" I look. "), *two], TOOLS)


def learnt(messages, tokenizer, **settings):
    return [text for text, has_loss in render(messages, tokenizer, **settings) if has_loss]


def test_thoughts():
    tokenizer, thought = make_tokenizer(THINKING, *IM), "<think>\nhm\n</think>\n\nyes"
    assert learnt(talk("a", "b", "c", thought), tokenizer) == ["b<|im_end|>", thought + "<|im_end|>"]
    apart = [*talk("a"), {"role": "assistant", "content": "yes", "reasoning_content": "hm <|im_start|>assistant\n"}]
    assert learnt(apart, tokenizer) == ["<think>\nhm <|im_start|>assistant\n\n</think>\n\nyes<|im_end|>"]
    assert learnt(talk("a", thought, "b", "c"), tokenizer, first=3) == ["<think>\nc\n</think>\n\nc<|im_end|>"]
    with pytest.raises(RenderError, match=r"changes the contents.* of message 2"):
        render(talk("a", thought, "b", "c"), tokenizer)
    asks_for_thought = make_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), *IM)
    assert learnt(talk("a", "b", "c", thought), asks_for_thought) == ["b<|im_end|>", thought + "<|im_end|>"]


def test_generation_narrows_a_turn_and_its_end_is_learnt_with_one_warning(capsys):
    chat._warn_once.cache_clear()
    for _ in range(2):
        check(*FAMILIES["generation"], talk("a", "b", "c", "d"))
    assert capsys.readouterr().err.count("leaves out the end of turn") == 1
    body = "{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}\n!\n{% endgeneration %}{{ m.role }}"
    body = "{% for m in messages %}{% if m.role == 'user' %}? {% else %}" + body + "{% endif %}{% endfor %}"
    assert learnt(talk("ab", "cd", "ef", "gh"), make_tokenizer(body)) == ["d\n!\nassistant", "h\n!\nassistant"]


EDGES = {  # a template, a conversation and its answers
    "no text for an empty content": (
        "{% for m in messages %}[{{ m.role }}]{% if m.content %}:{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}", talk("", "", "a", ":b"), [";", "::b;"]),
    "a system message is required": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
        talk("a", "b", "c", "d\n", system="s"), ["b<|im_end|>", "d\n<|im_end|>"]),
    "the assistant first": (CHATML, talk("a", "b", "c")[1:] + talk("d", "e"), ["b<|im_end|>", "e<|im_end|>"]),
    "two answers": (CHATML, talk("a", "b") + talk("c", "d")[1:], ["b<|im_end|>", "d<|im_end|>"]),
    "end of text after the last": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ('' if loop.last else '\n') }}{% endfor %}"
        "{{ '\nassistant: ' if add_generation_prompt else eos_token }}", talk("a", "b", "c", "d"), ["b", "d"]),
    "end of text before the next": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ('' if loop.last else eos_token) }}{% endfor %}"
        "{{ eos_token + 'assistant: ' if add_generation_prompt else '' }}", talk("a", "b", "c", "d"), ["b</s>", "d"]),
    "a line break ends a turn": (
        "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant\n{% endif %}", talk("a", "b", "c", "d"), ["b\n\n", "d\n\n"]),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    template, messages, answers = EDGES[edge]
    assert learnt(messages, make_tokenizer(template)) == answers


@pytest.mark.parametrize("family", ["chatml", "mistral", "qwen"])
def test_time_is_linear(family, monkeypatch):
    """The messages that go through the template are three times those of the conversation, and a few more."""
    tokenizer, num_rendered = FAMILIES[family][0], []
    original = tokenizer.apply_chat_template

    def apply(conversations, **options):
        num_rendered.append(sum(map(len, conversations)))
        return original(conversations, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply)
    render(talk(*(f"text {i}" for i in range(100)), system="s"), tokenizer)
    assert sum(num_rendered) < 210
    num_rendered.clear()
    calls = [message for i in range(30) for message in (calling({"i": i}, i), result(f"{i}", i))]
    if family != "chatml":
        render([*talk("a"), *calls], tokenizer, tools=TOOLS)
        assert sum(num_rendered) < 190


def test_dates_are_fixed():
    template = "{% set form = '%A, %-d.%m.%Y' %}\n {{ strftime_now(form) ~ strftime_now(\"%H:%M it's\") }}"
    assert render(talk("a"), make_tokenizer(template), loss_on="all") == [(" Friday, 26.07.202400:00 it's", True)]
    assert render_prompt(talk("a"), make_tokenizer(template), "--prompt") == " Friday, 26.07.202400:00 it's"


def test_a_template_that_refuses_a_question_alone_is_one_line():
    template = "{{ raise_exception('system message first.') if messages[0].role != 'system' }}"
    with pytest.raises(UserError, match=r"^--sample_prompt: does not fit .*system message first\). Use a tokenizer"):
        render_prompt(talk("a"), make_tokenizer(template), "--sample_prompt")


def test_a_template_that_omits_tool_calls_is_refused():
    """Otherwise --loss_on all would train on an empty answer without a warning."""
    with pytest.raises(RenderError, match=r"omits the tool calls of message 2\. Use a tokenizer"):
        render(read_messages(WITH_TOOLS, ""), FAMILIES["chatml"][0], "all")
    assert render(read_messages(WITH_TOOLS, ""), FAMILIES["qwen"][0], "all")[0][1]
    with pytest.raises(RenderError, match="the column tools is no JSON list"):
        render(talk("a", "b"), FAMILIES["qwen"][0], tools="hammer, saw")


def test_share_gpt_and_parts_are_read():
    given = [("system", "s"), ("human", "a"), ("function_call", "f()"), ("observation", "1"), ("gpt", "b")]
    roles = ["system", "user", "assistant", "tool", "assistant"]
    read = [{"role": role, "content": text} for role, (_, text) in zip(roles, given, strict=True)]
    for key in ("from", "role"):
        value = [{key: role, "value": text, "weight": None} for role, text in given]
        assert is_messages(value) and read_messages(value, "") == read
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts, "name": "n"}], "") == [talk("ab")[0] | {"name": "n"}]
    assert read_messages([{"role": "assistant", "content": "", "tool_calls": []}], "") == talk("", "")[1:]
    flat = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": null}'}]}
    assert read_messages([flat], "")[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": None}}
    assert not any(map(is_messages, ([], "text", ["text"], [{"text": "a"}], None)))


MALFORMED = [
    ("text", "is 'text'. Use a dict"), ({"content": "a"}, "lacks a role"), ({"role": "user", "content": 3}, "lacks a"),
    ({"role": "user", "weight": 1}, r"lacks a role or content .* its keys are: role, weight\. Set both"),
    ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, "has content of type image"),
    ({"role": "assistant", "tool_calls": [{"function": {}}]}, "has a tool call without a function name"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "words"), MALFORMED)
def test_malformed_messages_are_named(message, words):
    with pytest.raises(UserError, match="^--text_column chat: record 3: message 2 " + words):
        read_messages([*talk("a"), message], "--text_column chat: record 3")
    for value in ([], None, "text"):
        with pytest.raises(UserError, match=r"^record 3 has no messages"):
            read_messages(value, "record 3")


REFUSED = [
    (CHATML.replace("m.content", "m.content | upper"), talk("a", "<b>"), r"changes the contents.* of message 2"),
    (CHATML, [*talk("a"), calling({}, 0)], "omits the tool calls, of message 2"),
    (MISTRAL, [*talk("a"), calling({}, 0, content="b")], "changes the contents"),
    (MISTRAL, talk("a", "b")[1:], r"does not fit the chat template .*the user comes first"),
    (CHATML.replace("m.content", "m.role + 1"), talk("a", "b"), "does not fit the chat template"),
    (CHATML + "{{ messages[1].content }}", talk("a", "b", "c", "d"), "message 2 cannot be located"),
    (None, talk("a", "b"), "does not fit the chat template"),
]


@pytest.mark.parametrize(("template", "messages", "words"), REFUSED)
def test_a_template_that_does_not_fit_is_refused(template, messages, words):
    with pytest.raises(RenderError, match=words):
        render(messages, make_tokenizer(template))
    with pytest.raises(RenderError, match="no JSON list of tools"):
        render(talk("a", "b"), FAMILIES["qwen"][0], tools="[{")
