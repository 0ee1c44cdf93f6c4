"""Parse templates, filters and sources of a mixture, and read dotted columns of a record."""

import math
import re
from string import Formatter
from typing import Any

Template = tuple[tuple[str, str], ...]  # pairs of text and the dotted column that follows it, "" for no column


def parse_template(template: str) -> Template | None:
    r"""Return the parts of a template such as '{title}\n{text}', or of a column name; None if it is malformed.

    A backslash followed by n is a newline, because a shell passes it on like that.
    """
    if not {"{", "}"} & set(template):
        return (("", template),) if template else None
    try:
        parts = list(Formatter().parse(template.replace("\\n", "\n")))
    except ValueError:
        return None
    has_column = any(column for _, column, *_ in parts) and all(column != "" for _, column, *_ in parts)
    is_plain = not any(format_spec or conversion for *_, format_spec, conversion in parts)
    return tuple((text, column or "") for text, column, *_ in parts) if has_column and is_plain else None


def parse_filter(rule: str) -> tuple[str, bool, str] | None:
    """Return (column, True for = or False for !=, value) of a filter; None if it is malformed."""
    match = re.fullmatch(r"([^=!]+)(!?)=(.*)", rule, re.DOTALL)
    return (match[1], not match[2], match[3]) if match else None


def parse_source(item: str) -> tuple[str, float]:
    """Return (name, weight) of one source of a mixture. The weight is NaN if it is missing or no number."""
    name, _, weight = item.rpartition(":")
    try:
        return name, float(weight)
    except ValueError:
        return name, math.nan


def value_at(value: Any, path: list[str]) -> Any:
    """Return the value at ``path`` below ``value``, a list of values for a list; None if there is no such key."""
    if not path:
        return value
    if isinstance(value, list):
        return [value_at(item, path) for item in value]
    return value_at(value.get(path[0]), path[1:]) if isinstance(value, dict) else None


def join_text(value: Any, separator: str, kinds: type = str) -> str | None:
    """Return a value of type ``kinds`` as text, with the items of lists joined; None for any other type."""
    if isinstance(value, list):
        parts = [join_text(item, separator, kinds) for item in value]
        return None if None in parts else separator.join(parts)
    return str(value) if isinstance(value, kinds) else None
