"""Templates, filters and dotted columns: how a flag names a part of a record."""

import math
import re
from string import Formatter
from typing import Any

Template = tuple[tuple[str, str], ...]  # pairs of text and the dotted column that follows it, "" at the end


def parse_template(template: str) -> Template | None:
    """The parts of a template, or of a column alone; None where it is none. A shell's backslash and n are a newline."""
    if not {"{", "}"} & set(template):
        return (("", template),)
    try:
        parts = list(Formatter().parse(template.replace("\\n", "\n")))
    except ValueError:
        return None
    is_one = any(column for _, column, *_ in parts) and all(column != "" for _, column, *_ in parts)
    is_plain = not any(form or conversion for *_, form, conversion in parts)
    return tuple((text, column or "") for text, column, *_ in parts) if is_one and is_plain else None


def parse_filter(rule: str) -> tuple[str, bool, str] | None:
    """A filter's column, whether it is to equal, and the value; None where it is no filter."""
    match = re.fullmatch(r"([^=!]+)(!?)=(.*)", rule, re.DOTALL)
    return (match[1], not match[2], match[3]) if match else None


def parse_source(item: str) -> tuple[str, float]:
    """Name and weight of a part of a mixture; the weight is no number where there is none."""
    name, _, weight = item.rpartition(":")
    try:
        return name, float(weight)
    except ValueError:
        return name, math.nan


def value_at(value: Any, path: list[str]) -> Any:
    """What is at ``path`` below ``value``, and in each item of lists; None where something else is there."""
    if not path:
        return value
    if isinstance(value, list):
        return [value_at(item, path) for item in value]
    return value_at(value.get(path[0]), path[1:]) if isinstance(value, dict) else None


def joined(value: Any, separator: str, kinds: type = str) -> str | None:
    """A value of ``kinds`` as text, lists of them joined; None for anything else."""
    if isinstance(value, list):
        parts = [joined(item, separator, kinds) for item in value]
        return None if None in parts else separator.join(parts)
    return str(value) if isinstance(value, kinds) else None
