"""Show documents as the model sees them: token boundaries, special tokens, and which tokens are learnt."""

from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpus.tokens import token_ids

NUM_DOCUMENTS, NUM_TOKENS = 3, 100  # to show; a longer document is cut
LEARNT, SPECIAL, OTHER, PLAIN = "\033[32m", "\033[33m", "\033[2m", "\033[0m"  # green, yellow, dim


def preview(train_data: Any, tokenizer: PreTrainedTokenizerBase, in_color: bool) -> str:
    """Return the first documents and the first block of the training data as text.

    A bar stands between two tokens. Text with loss is in [[ ]]. With ``in_color`` it is green, special tokens are
    yellow, and other text is dim.
    """
    source = getattr(train_data.blocks, "stream", train_data.blocks)  # stored or streamed
    documents = source.first_documents(NUM_DOCUMENTS, NUM_TOKENS + 1)
    shown = [(f"document {number}", ids) for number, ids in enumerate(documents, 1)]
    shown.append(("block 0", train_data.blocks.first(1)[0][0]))
    legend = "green: learnt, yellow: special" if in_color else "[[learnt]], token|token"
    lines = [f"as the model sees it ({legend})"]
    for name, ids in shown:
        lines.append(f"{name}: {_show(ids[:NUM_TOKENS], tokenizer, in_color)}{' ...' if len(ids) > NUM_TOKENS else ''}")
    return "\n".join(lines)


def _show(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, in_color: bool) -> str:
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]  # a decoder drops the space of the first token
    before, special = tokenizer.decode(lead), set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([*lead, i], clean_up_tokenization_spaces=False) for i in token_ids(ids).tolist()]
    tokens = zip([text.removeprefix(before) for text in texts], ids >= 0, token_ids(ids).tolist(), strict=True)
    runs = []
    for is_learnt, run in groupby(tokens, key=lambda token: token[1]):
        if in_color:
            color = LEARNT if is_learnt else OTHER
            runs.append("|".join(f"{SPECIAL if i in special else color}{text}{PLAIN}" for text, _, i in run))
        else:
            text = "|".join(text for text, *_ in run)
            runs.append(f"[[{text}]]" if is_learnt else text)
    return ("|" if in_color else "").join(runs)
