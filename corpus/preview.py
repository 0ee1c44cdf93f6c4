"""Show documents as the model sees them: token boundaries, special tokens, and which tokens are learnt."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpus.records import Documents
from corpus.tokenize import token_parts
from corpus.tokens import token_ids

NUM_DOCUMENTS, NUM_TOKENS = 3, 300  # to show; of a longer document the first tokens
LEARNT, SPECIAL, OTHER, PLAIN = "\033[32m", "\033[33m", "\033[2m", "\033[0m"  # green, yellow, dim


def preview(train_data: Any, tokenizer: PreTrainedTokenizerBase, in_color: bool) -> str:
    """Return the first documents and the first block of the training data as text.

    A bar stands between two tokens. What is learnt is in [[ ]], or green with ``in_color``, where special tokens are
    yellow and text without loss is dim.
    """
    documents = enumerate(_first_documents(train_data.documents, tokenizer), 1)
    shown = [(f"document {number}", *document) for number, document in documents]
    shown.append(("block 0", train_data.blocks.first(1)[0][0], False))
    legend = "green: learnt, yellow: special" if in_color else "[[learnt]], token|token"
    return "\n".join(
        [f"as the model sees it ({legend})"]
        + [f"{name}: {_show(ids, tokenizer, in_color)}{' ...' if is_cut else ''}" for name, ids, is_cut in shown]
    )


def _first_documents(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, bool]]:
    count, ids = 0, np.empty(0, np.int32)
    for part in token_parts(documents.read(tokenizer), tokenizer):
        ids = np.append(ids, part.ids)
        if part.is_last or len(ids) > NUM_TOKENS:
            yield ids[:NUM_TOKENS], len(ids) > NUM_TOKENS
            count, ids = count + 1, ids[:0]
            if count == NUM_DOCUMENTS or not part.is_last:  # a long document is not read to its end
                return


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
