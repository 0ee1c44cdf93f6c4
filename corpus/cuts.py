"""Cut long documents into parts. The tokens of all parts, in order, are exactly the tokens of the whole document.

A cut is at a single space or newline and needs a proof. No added token and no match of a pattern holds both characters.
Normalizers do not join them, no prefix space is added, and the pre-tokenizer splits there. If in doubt, do not cut.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase

# Letters and digits that no normalization form joins to the character before: no jamo, no marks, none beyond U+FFFF.
_LETTER = r"[^\W\u0e33\u0eb3\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\ud7b0-\ud7ff\uff9e-\uffdf\U00010000-\U0010ffff]"
_BEFORE = rf"(?<={_LETTER}[ \n]|[!-/:-@\[-`{{-~\u3001-\u301f\uff01-\uff1f][ \n])"
_CANDIDATE = re.compile(rf"[ \n]{_BEFORE}(?={_LETTER}(?:{_LETTER}|\s))")
_EXAMPLE = "no 10 20\nno。\n一二"  # a tokenizer that cannot be cut here is never cut
# Normalizers that change only a character together with its marks. The proof itself applies Strip.
_LOCAL = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled", "Strip"}
# Pre-tokenizers that split at each match of their pattern, or more often. Split has its own pattern.
_PATTERNS = dict.fromkeys(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"), r"\s+")
_PATTERNS |= {"Digits": r"\p{N}+", "Punctuation": r"[\p{P}!-/:-@\[-`{-~]+"}
_PATTERNS["ByteLevel"] = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TOKEN = re.compile(  # of a regular expression; other syntax is unknown
    r"(?P<atom>\\[pP]\{\^?\w+\}|\\[sSdDwWrnt]|\\\W|[^\\\[\](){}|?*+^$]"
    r"|\[\^?(?!\])(?:\\.|[^\\\[\]]|\[\^?(?!\])(?:\\.|[^\\\[\]])+\])+\])"
    r"|(?P<repeat>(?:[?*+]|\{\d+(?:,\d*)?\})(?![?*+{]))|(?P<open>\((?:\?i?:|(?!\?)))|(?P<close>\))|(?P<alternative>\|)"
)


class _Atom(NamedTuple):
    """A part of a regular expression that matches one character: a class, an escape or a letter."""

    pattern: Split
    in_group: bool
    alternative: int
    place: int  # in its alternative
    repeats: bool

    def may_precede(self, other: "_Atom") -> bool:
        """Return whether a match may hold this atom's character right before the other's."""
        is_earlier = self.place < other.place or (self.place == other.place and self.repeats)
        return self.alternative == other.alternative and is_earlier


class _Step:
    """A step of a normalizer or pre-tokenizer, with the pairs of characters that a match of its pattern may hold."""

    def __init__(self, settings: dict[str, Any], component: Any) -> None:
        self.settings, self.component = settings, component
        no_split = False in (settings.get("use_regex"), settings.get("split"))  # of ByteLevel and Metaspace
        default = r"[^\s\S]" if no_split else _PATTERNS.get(settings["type"], "^")  # matches nothing, or is unknown
        pattern = settings.get("pattern", {"Regex": default})
        text = pattern.get("Regex") or re.escape(pattern["String"])
        # The last alternative matches single white space at a cut if the look-ahead of the alternative before fails.
        text = re.sub(r"\|\\s\+\(\?!\\S\)\|\\s\+?\Z", lambda _: r"|\s+", text)
        tokens = [(token.lastgroup, token[0]) for token in _TOKEN.finditer(text)]
        self._outside, self._atoms = Split(Regex(text), "removed").pre_tokenize_str, []
        empty = Split(Regex(f"(?:{text})\ue000"), "removed")  # matches if the pattern matches the empty string
        self.is_known = "".join(token for _, token in tokens) == text and empty.pre_tokenize_str("\ue000") != []
        depth = alternative = place = 0
        for (kind, token), (_, after) in pairwise((*tokens, ("", "?"))):
            depth += (kind == "open") - (kind == "close")
            alternative += kind == "alternative" and not depth
            if kind == "atom":  # a group is one place: its atoms may follow one another in any order
                repeats = depth > 0 or after[0] in "*+{"
                self._atoms.append(_Atom(Split(Regex(token), "removed"), depth > 0, alternative, place, repeats))
            place += not depth

    def at(self, char: str) -> list["_Atom"]:
        """Return the atoms that match a character. A group may ignore case, so in it each may match any letter."""
        may_be_any = not char.isspace()
        return [a for a in self._atoms if (a.in_group and may_be_any) or not a.pattern.pre_tokenize_str(char)]

    def splits(self, left: str, right: str) -> bool | None:
        """Return True if the step always splits between two characters, None if it does nothing, False if unknown."""
        if self.settings["type"] == "Metaspace" and self.settings["split"]:
            return right in (" ", self.settings["replacement"])
        before, after = self.at(left), self.at(right)
        # If no match holds both characters, even with all atoms optional, each side is matched independently.
        crosses = any(first.may_precede(second) for first, second in product(before, after))
        joins = self.settings.get("behavior", "Isolated") not in ("Isolated", "Removed") and (before or after)
        if not self.is_known or crosses or joins:
            return False
        return True if not self._outside(left) or not self._outside(right) else None  # it always matches one of them


def _steps(component: Any, key: str) -> list[_Step]:
    settings = json.loads(component.__getstate__())
    steps, components = (settings[key], component) if key in settings else ([settings], [component])
    return [_Step(*step) for step in zip(steps, components, strict=True)]


class Cutter:
    """Cut documents for one tokenizer. Make one per tokenizer: it remembers where a cut is proved."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._can_cut = tokenizer.is_fast
        if not tokenizer.is_fast:
            return
        backend = tokenizer.backend_tokenizer
        self._pre_tokenizer = backend.pre_tokenizer or pre_tokenizers.Sequence([])
        self._normalizers = _steps(normalizer := backend.normalizer or normalizers.Sequence([]), "normalizers")
        self._pre_tokenizers = _steps(self._pre_tokenizer, "pretokenizers")
        added = [(token, token.content) for token in backend.get_added_tokens_decoder().values()]
        added += [(token, normalizer.normalize_str(text)) for token, text in added if token.normalized]
        self._added = "\0".join(text for _, text in added)
        # No cut next to an end of an added token that looks at, or takes, the white space around it.
        wide = [text for token, text in added if token.lstrip or token.rstrip or token.single_word]
        self._edges = {char for text in wide for char in text[:1] + text[-1:]}
        unusual = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        is_plain = isinstance(backend.model, models.BPE) and not any(getattr(backend.model, name) for name in unusual)
        self._vocabulary = "\0".join(("", *backend.get_vocab(with_added_tokens=False), "")) if is_plain else ""
        self._is_exact = cache(self._prove)
        self._can_cut = self._last_cut(_EXAMPLE) > 0

    def cut(self, texts: Iterable[str], size: int) -> Iterator[str]:
        """Cut a document, given as consecutive strings, into parts of about ``size`` characters, or keep it whole."""
        searched, new, length = [], [], 0  # strings of the next part, and the number of characters not yet searched
        for text in texts:
            for start in range(0, len(text), size // 2 + 1):
                new.append(text[start : start + size // 2 + 1])
                length += len(new[-1])
                if self._can_cut and length > size:
                    block, new, length = "".join(new), [], 0
                    if end := self._last_cut(block):
                        yield "".join((*searched, block[:end]))
                        searched = []
                    searched.append(block[end:])
        yield "".join((*searched, *new))

    def _last_cut(self, block: str) -> int:
        near = max(0, len(block) - 4096)  # nearly always a cut comes after it; the last 64 spaces are enough
        spaces = (match.start() for i in (near, 0) for match in [*_CANDIDATE.finditer(block, i)][:-65:-1])
        ends = ((space, end) for space in spaces for end in (space, space + 1))
        return next((e for s, e in ends if self._is_exact(block[s - 1 : e], block[e : s + 2])), 0)

    def _prove(self, left: str, right: str) -> bool:
        """Return whether each text that ends with ``left`` may be cut from each that begins with ``right``."""
        is_before, chars, pair = len(left) < len(right), {*left, *right}, left[-1] + right[0]
        for step in self._normalizers:
            others = left + right[1:] if is_before else left[:-1] + right
            # Replace may change the space or newline if its matches hold no other character.
            is_local = step.settings["type"] in _LOCAL or (step.is_known and not any(map(step.at, others)))
            whole, left, right = map(step.component.normalize_str, (left + right, left, right))
            if not is_local or whole != left + right or not left or not right:
                return False
        chars, pairs = {*chars, *left, *right}, (pair, left[-1] + right[0])
        if not left[-2:].strip() or chars & self._edges or any(pair in self._added for pair in pairs):
            return False  # _Step allows at most one white-space character before the cut
        pieces = [[p for p, _ in self._pre_tokenizer.pre_tokenize_str(t)] for t in (left + right, left, right)]
        for step in self._pre_tokenizers:
            if (splits := step.splits(left[-1], right[0])) is not None:
                return splits and pieces[0] == pieces[1] + pieces[2]
            split = map(step.component.pre_tokenize_str, (left + right, left, right))
            whole, left, right = ("".join(piece for piece, _ in side) for side in split)
            if whole != left + right or not left or not right:
                return False
        # The text may be one word. No merge of BPE crosses the cut if no token holds both characters.
        pair = left[-1] + right[0]
        return all(f"\0{char}\0" in self._vocabulary for char in pair) and pair not in self._vocabulary
