"""Print a text while a model generates it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class Printer(BaseStreamer):
    """Print a text while it is generated, up to one of the texts ``stops``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()):
        self._tokenizer, self._ids, self._num_printed = tokenizer, [], 0  # the prompt counts as printed
        self._stops, parts = stops, [stop[:length] for stop in stops for length in range(1, len(stop))]
        self._unfinished = ("\N{REPLACEMENT CHARACTER}", *parts)  # part of a character, or of a stop

    def put(self, value: torch.Tensor) -> None:
        is_prompt = not self._ids  # transformers sends the prompt first, and then each token
        self._ids += value.flatten().tolist()
        if is_prompt:
            self._num_printed = len(self._ids)
        elif (text := self._decode_new()) == cut(text, self._stops) and not text.endswith(self._unfinished):
            self._print(text)

    def end(self) -> None:
        self._print(cut(self._decode_new(), self._stops) + "\n")

    def _decode_new(self) -> str:
        """Return the text that is not printed yet. Decode 16 more tokens, as some tokenizers drop a leading space."""
        start = max(0, self._num_printed - 16)
        before = decode(self._tokenizer, self._ids[start : self._num_printed])
        return decode(self._tokenizer, self._ids[start:])[len(before) :]

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self._num_printed = len(self._ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of ids, without special tokens and with its spaces."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text: str, stops: Sequence[str] | None) -> str:
    """Return the text before the first of ``stops`` in it."""
    return text[: min((text.find(stop) for stop in stops or () if stop in text), default=None)]
