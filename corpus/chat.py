"""Render a conversation with a chat template and find the parts that the assistant speaks."""

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from corpus.documents import Piece

# For tokenizers that have none; it needs no new tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content + (eos_token or sep_token) }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
MARK = re.compile("\ue000(\\d+)\ue000")  # where a message's content goes; the letter is no script's


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, loss_on: str = "completion"
) -> list[Piece] | None:
    """The conversation by the tokenizer's chat template, scored where the assistant speaks; None: that is not found.

    Marks go through the template in place of the contents, and show where it puts them. An answer begins behind the
    prompt for it and ends with the special token that follows it, if one does.
    """
    apply = partial(tokenizer.apply_chat_template, tokenize=False)
    end = tokenizer.eos_token or tokenizer.sep_token

    def unended(text: str) -> str:  # what ends a document is added later, and must not be there twice
        return text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text

    whole = unended(apply(messages))
    if loss_on == "all":
        return [(whole, True)]
    marked = [{**message, "content": f"\ue000{i}\ue000"} for i, message in enumerate(messages)]
    form = apply(marked)
    prompt = apply(marked, add_generation_prompt=True).removeprefix(form)
    form = unended(form)
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    after = re.compile(rf"\s*(?:{'|'.join(special)})|")
    places = [0]
    for mark in MARK.finditer(form):
        if messages[int(mark[1])]["role"] == "assistant":
            start = form.rfind(prompt, places[-1], mark.start())
            start = mark.start() if start < 0 else start + len(prompt)
            end_of_turn = after.match(form, mark.end()).end()
            # Where no special token ends the last answer, what ends the document does, and is learnt with it.
            last = end_of_turn == mark.end() and int(mark[1]) == len(messages) - 1
            places += [start, len(form) if last else end_of_turn]
    places.append(len(form))

    def filled(trim: Callable[[str], str]) -> list[str]:
        contents = [trim(message["content"]) for message in messages]
        return [MARK.sub(lambda mark: contents[int(mark[1])], form[start:end]) for start, end in pairwise(places)]

    for trim in (str, str.strip):  # many templates strip what is said
        if "".join(texts := filled(trim)) == whole:
            return [(text, i % 2 == 1) for i, text in enumerate(texts if texts[-1] else texts[:-1])]
    return None
