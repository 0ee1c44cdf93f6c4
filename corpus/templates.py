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


def matches(record: dict[str, Any], column: str, is_equal: bool, wanted: str, separator: str) -> bool:
    """Return whether a record passes a filter. The number 1 equals both 1 and 1.0, and true equals True."""
    value = value_at(record, column)
    if isinstance(value, bool):
        found = wanted.lower() == str(value).lower()
    elif isinstance(value, (int, float)):
        try:
            found = wanted == str(value) or float(wanted) == value
        except ValueError:
            found = False
    else:
        found = join_text(value, separator, object) == wanted
    return found == is_equal


def parse_source(item: str) -> tuple[str, float]:
    """Return (name, weight) of one source of a mixture. The weight is NaN if it is missing or no number."""
    name, _, weight = item.rpartition(":")
    try:
        return name, float(weight)
    except ValueError:
        return name, math.nan


def value_at(value: Any, column: str) -> Any:
    """Return the value of a column such as answers.text, or None. A list gives a list of values."""
    if isinstance(value, list):
        items = [value_at(item, column) for item in value]
        return items if not items or any(item is not None for item in items) else None
    if not isinstance(value, dict):
        return None
    if column in value:  # also a key with dots
        return value[column]
    key, _, rest = column.partition(".")
    return value_at(value.get(key), rest) if rest else None


def join_text(value: Any, separator: str, kinds: type | tuple[type, ...] = str) -> str | None:
    """Return a value of type ``kinds`` as text, with the items of lists joined; None for any other type."""
    if isinstance(value, list):
        parts = [join_text(item, separator, kinds) for item in value]
        return None if None in parts else separator.join(parts)
    return str(value) if isinstance(value, kinds) else None
