"""Render a conversation with a chat template and find the text of the assistant."""

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from corpus.documents import Piece

# For tokenizers without a template. It needs no new tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content + (eos_token or sep_token) }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
PLACEHOLDER = re.compile("\ue000(\\d+)\ue000")  # stands for the content of message i; a private-use character


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, loss_on: str = "completion"
) -> list[Piece] | None:
    """Return the conversation as (text, has_loss) pieces, or None if the template changes the contents.

    Loss is on the turns of the assistant, or on the whole text if ``loss_on`` is "all". Placeholders go through the
    template instead of the contents, so they show where it puts each content. An answer starts after the generation
    prompt. It ends with the special token that follows it, if there is one.
    """
    apply = partial(tokenizer.apply_chat_template, tokenize=False)
    end = tokenizer.eos_token or tokenizer.sep_token

    def remove_end(text: str) -> str:  # tokenize() appends end-of-text; two of them would be one too many
        return text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text

    rendered = remove_end(apply(messages))
    if loss_on == "all":
        return [(rendered, True)]
    with_placeholders = [{**message, "content": f"\ue000{i}\ue000"} for i, message in enumerate(messages)]
    layout = apply(with_placeholders)
    generation_prompt = apply(with_placeholders, add_generation_prompt=True).removeprefix(layout)
    layout = remove_end(layout)
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    end_of_turn_pattern = re.compile(rf"\s*(?:{'|'.join(special)})|")
    bounds = [0]  # text without loss, text with loss, text without loss, ...
    for match in PLACEHOLDER.finditer(layout):
        if messages[int(match[1])]["role"] == "assistant":
            start = layout.rfind(generation_prompt, bounds[-1], match.start())
            start = match.start() if start < 0 else start + len(generation_prompt)
            end_of_turn = end_of_turn_pattern.match(layout, match.end()).end()
            # If no special token ends the last answer, the end-of-text token does, and the model learns it.
            ends_document = end_of_turn == match.end() and int(match[1]) == len(messages) - 1
            bounds += [start, len(layout) if ends_document else end_of_turn]
    bounds.append(len(layout))

    def fill(trim: Callable[[str], str]) -> list[str]:
        contents = [trim(message["content"]) for message in messages]
        return [
            PLACEHOLDER.sub(lambda match: contents[int(match[1])], layout[start:stop])
            for start, stop in pairwise(bounds)
        ]

    for trim in (str, str.strip):  # many templates strip the contents
        if "".join(texts := fill(trim)) == rendered:
            return [(text, i % 2 == 1) for i, text in enumerate(texts if texts[-1] else texts[:-1])]
    return None
