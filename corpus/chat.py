"""Render a conversation with a chat template and locate the turns of the assistant."""

import datetime
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cli.errors import UserError, root_cause, warn

Piece = tuple[str, bool]  # (text, has_loss)
Messages = list[dict[str, Any]]
Turn = tuple[int, int, int]  # positions in the rendered text: after the prompt, after the content, after the turn

# For tokenizers without a template. It needs no new tokens.
CHAT_TEMPLATE = (
    "{% set end = eos_token or sep_token %}{% if tools %}{{ 'tools:\\n' + (tools | tojson) + end }}{% endif %}"
    "{% for message in messages %}{{ message.role + ':\\n' + (message.content or '') }}"
    "{{ (message.tool_calls | tojson if message.tool_calls else '') + end }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
# Tokens must not depend on the day, so templates get Llama 3.1's default date. `strftime_now` becomes a macro.
DAY = datetime.datetime(2024, 7, 26)
DATE_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
DIRECTIVES = ["%" + flag + letter for letter in "aAbBcdDeFHIjmMpSTxXyY" for flag in ("", "-")]
DATES = "".join(f" | replace('{directive}', '{DAY.strftime(directive)}')" for directive in DIRECTIVES)
DATE_MACRO = f"{{% macro strftime_now(format) %}}{{{{ format{DATES} }}}}{{% endmacro %}}\n"
GENERATION = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
MARK = "\ufdd0"  # a code point that is no character. _locate_with_prefix handles texts that contain it.
MARKS = re.compile(f"{MARK}(\\d+){MARK}")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_warn_once = cache(warn)


class RenderError(ValueError):
    """The chat template cannot render a conversation, or a turn cannot be located in the rendered text."""


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, loss_on: str = "completion", tools: Any = None, first=0
) -> list[Piece]:
    """Return the conversation as (text, has_loss) pieces, without the end-of-text token at its end.

    The turns of the assistant have loss from message ``first`` on, or the whole text if ``loss_on`` is "all". A turn
    starts after the generation prompt and includes its end of turn. Blocks of {% generation %} in the template narrow
    it. ``tools`` are a list or its JSON. Raise RenderError if a turn cannot be located exactly.
    """

    def apply(conversations: list[Messages], prompt: bool = False) -> list[str]:
        options = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt, "tokenize": False}
        return tokenizer.apply_chat_template(conversations, **options)

    try:
        tools = (json.loads(tools or "null") if isinstance(tools, str) else tools) or None
    except ValueError as error:
        raise RenderError("the column tools is no JSON list of tools. Rename or remove it.") from error
    try:
        template = _dated(tokenizer.get_chat_template(tools=tools))
        (text,) = apply([messages])
    except TEMPLATE_ERRORS as error:
        reason = root_cause(error).rstrip(".")
        raise RenderError(f"does not fit the chat template ({reason}). Remove or change the record.") from error
    end, spans = tokenizer.eos_token or tokenizer.sep_token or "", [(0, len(text))]
    if loss_on == "all" and any("tool_calls" in message for message in messages):  # many templates have no tool calls
        (layout,) = apply([[_mark(message, i) for i, message in enumerate(messages)]])
        for i, message in enumerate(messages):
            if any(f"{name}{MARK}{i}{MARK}" not in layout for name in _said(message)[1:]):
                omits = f"the chat template omits the tool calls of message {i + 1}"
                raise RenderError(f"{omits}. Use a tokenizer whose template has tool calls, or remove the record.")
    if loss_on != "all":
        turns = _turns(messages, text, apply, end, first)
        spans = [(start, stop) for start, _, stop in turns]
        if GENERATION.search(template):
            template = GENERATION.sub(rf"{{%\1 if true %}}{MARK}b{MARK}{{% endif %}}{{% \2 \3%}}", template)
            spans = _narrow(turns, text, apply([messages])[0].split(f"{MARK}b{MARK}"))
    stop = len(_without(text, end))  # without end-of-text, because tokenize() appends it
    bounds = [0, *(min(bound, stop) for span in spans for bound in span), stop]
    return [(text[a:b], i % 2 == 1) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]


def render_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase, flag_name: str) -> str:
    """Return the text of a conversation up to the answer that comes next, with the date of `render`.

    Raise UserError, which begins with ``flag_name``, if the chat template cannot render it.
    """
    try:
        template = _dated(tokenizer.get_chat_template())
        options = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        return tokenizer.apply_chat_template(messages, **options)
    except TEMPLATE_ERRORS as error:
        reason = root_cause(error).rstrip(".")
        fix = "Use a tokenizer whose template takes a question of the user alone"
        raise UserError(f"{flag_name}: does not fit the chat template ({reason}). {fix}.") from error


def _dated(template: str) -> str:
    template = DATE_CALL.sub(lambda call: repr(DAY.strftime(call[1][1:-1])), template)  # faster than the macro
    return DATE_MACRO + template if "strftime_now" in template else template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str]]:
    """Return the id of the token that ends an answer in the chat template, or else the text, each as a list.

    The token is the first added one, such as <|im_end|>, between an answer and the next question. The text is all that
    the template puts after an answer. If this is white space alone, it extends to the next question, such as
    "\\n### User:". Both lists are empty without a template, or if it has no place for these turns.
    """
    turns = [{"role": role, "content": f"{MARK}{i}{MARK}"} for i, role in enumerate(("user", "assistant", "user"))]
    try:
        rendered = tokenizer.apply_chat_template([turns, turns[:2]], tokenize=False)
    except TEMPLATE_ERRORS:
        return [], []
    if not all(f"{MARK}1{MARK}" in text for text in rendered):
        return [], []
    between, last = (text.rpartition(f"{MARK}1{MARK}")[2].partition(MARK)[0] for text in rendered)
    tokens = {token: id for token, id in tokenizer.get_added_vocab().items() if token.strip() and token in between}
    if tokens:
        return [tokens[min(tokens, key=lambda token: (between.find(token), -len(token)))]], []
    own = commonprefix([between, last])  # noqa: RUF071
    text = (own if own.strip() else between).rstrip()
    return [], [text] if text else []


def _without(text: str, end: str) -> str:
    return text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text


def _said(message: dict[str, Any]) -> list[str]:
    """Return the content of a message and the names of its tool calls."""
    return [(message.get("content") or "").strip(), *(c["function"]["name"] for c in message.get("tool_calls", []))]


def _turns(messages: Messages, text: str, apply: Callable, end: str, first: int) -> list[Turn]:
    """Return the turns of the assistant from message ``first`` on. Raise RenderError if one cannot be located."""
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    located, turns = _locate_with_marks(messages, wanted, text, apply, end), [(0, 0, 0)]
    for i in wanted:
        turn = located.get(i) or _locate_with_prefix(messages, i, text, apply, end)
        if turn is None or turn[0] < turns[-1][2]:
            raise RenderError(f"message {i + 1} cannot be located in the rendered text. Use --loss_on all.")
        if not all(said in text[turn[0] : turn[1]] for said in _said(messages[i])):
            changes = f"the chat template changes the contents, or omits the tool calls, of message {i + 1}"
            raise RenderError(f"{changes}. Use --loss_on all.")
        turns.append(turn)
    return turns[1:]


def _mark(message: dict[str, Any], i: int, stand_in: str | None = None) -> dict[str, Any]:
    """Put marks around the content and after names. White space stays outside, so that a template strips it."""
    marked, mark, (said, *names) = dict(message), f"{MARK}{i}{MARK}", _said(message)
    if said or not names:
        content = message.get("content") or ""
        marked["content"] = content.replace(said, mark + (stand_in or said) + mark, 1) if said else mark + content
    if names:
        calls = zip(message["tool_calls"], names, strict=True)
        marked["tool_calls"] = [call | {"function": call["function"] | {"name": name + mark}} for call, name in calls]
    return marked


def _locate_with_marks(messages: Messages, wanted: list[int], text: str, apply: Callable, end: str) -> dict[int, Turn]:
    """Locate turns in linear time, with marks in the contents. Leave out turns without the usual text around them.

    A rendered question with the answer shows that text. Equal questions get equal marks: some templates compare them.
    """
    question, turns = _mark({"role": "user", "content": "x"}, 0), {}
    answers = {i: _mark(messages[i], 1, "x") for i in wanted}  # most are equal, and rendered once
    pairs = {repr(answer): [question, answer] for answer in answers.values()}
    marked = [_mark(message, i if i in answers else len(messages)) for i, message in enumerate(messages)]
    try:
        (prompted,), (layout, asked, *shown) = apply([[question]], True), apply([marked, [question], *pairs.values()])
    except TEMPLATE_ERRORS:
        return {}
    prompted, asked = MARKS.split(prompted)[-1], _without(MARKS.split(asked)[-1], end)
    frames = {}  # for each answer: the generation prompt, the text between it and the content, the text after that
    for key, parts in zip(pairs, (MARKS.split(rendered)[::2] for rendered in shown), strict=True):
        head = parts[min(2, len(parts) - 1)]
        common = commonprefix([prompted, head])  # noqa: RUF071
        frames[key] = (common.removeprefix(asked), head[len(common) :], parts[-1])
    texts, owners = MARKS.split(layout)[::2], MARKS.split(layout)[1::2]
    edges = [0, *accumulate(map(len, texts))]  # mark k is at edges[k + 1]
    for i in wanted if "".join(texts) == text else []:
        (prompt, written, alone), count = frames[repr(answers[i])], owners.count(str(i))
        place = owners.index(str(i)) if count else 0
        before, after = texts[place], texts[place + count]
        start = len(before) - len(written)
        if not before.endswith(prompt + written):  # some templates keep the thought of the last answer alone
            start = before.find(prompt) + len(prompt) if prompt.strip() and before.count(prompt) == 1 else -1
        stop = _end_of_turn(after, alone, end)
        if start >= 0 and stop >= 0 and count and owners[place : place + count] == [str(i)] * count:
            turns[i] = (edges[place] + start, edges[place + count], edges[place + count] + stop)
    return turns


def _locate_with_prefix(messages: Messages, i: int, text: str, apply: Callable, end: str) -> Turn | None:
    """Locate a turn between the prompt for it and the conversation up to it, if these are prefixes of the text."""
    try:
        (prompt,), (alone,) = apply([messages[:i]], True), apply([messages[: i + 1]])
    except TEMPLATE_ERRORS:
        return None
    said = _said(messages[i])[-1]
    content_end = max(len(prompt), alone.find(said, len(prompt)) + len(said))
    stop = _end_of_turn(text[content_end:], alone[content_end:], end)
    are_prefixes = text.startswith(prompt) and text.startswith(alone[:content_end]) and stop >= 0
    return (len(prompt), content_end, content_end + stop) if are_prefixes else None


def _end_of_turn(after: str, alone: str, end: str) -> int:
    """Return how many characters after an answer end its turn, or -1. ``alone`` is the text after a last answer."""
    bare = _without(alone, end)  # some templates write end-of-text only after the last message
    candidates = [bare if bare.strip() else alone] if after == alone else [alone, bare]
    for own in (candidate.rstrip() or candidate for candidate in candidates):
        if after.startswith(own):
            return len(end) if not own.strip() and after.startswith(end) else len(own)
    return -1


def _narrow(turns: list[Turn], text: str, parts: list[str]) -> list[tuple[int, int]]:
    """Return the parts of turns in blocks of {% generation %}: every second one of ``parts``. Add the ends of turns."""
    if "".join(parts) != text:
        raise RenderError("the blocks {% generation %} of the chat template cannot be located. Use --loss_on all.")
    edges, spans = [0, *accumulate(map(len, parts))], []
    for start, content_end, stop in turns:
        blocks = zip(edges[1::2], edges[2::2], strict=False)
        spans += [(max(a, start), min(b, stop)) for a, b in blocks if a < stop and b >= start]
        if spans and content_end <= spans[-1][1] < stop:
            _warn_once("the chat template's {% generation %} leaves out the end of turn; it carries loss all the same")
            spans[-1] = (spans[-1][0], stop)
    return spans
