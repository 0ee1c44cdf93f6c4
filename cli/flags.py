"""Flags: dataclasses, filled from defaults < YAML file < command line.

@dataclass
class Config(TextFlags, ModelFlags):          # each base is a group of --help, named by its `title`
    batch_size: Count = flag(8, "blocks per step")

config, config_file = parse(Config, __doc__)   # reads sys.argv; every script takes --config FILE.yaml
"""

import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
from argparse import HelpFormatter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from cli.errors import UserError, require, root_cause
from cli.replaced import REMOVED, TRAINER

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have. ``above`` and ``below`` are excluded, ``least`` and ``most`` included."""

    least: float | None = None
    most: float | None = 10**9  # a larger value is a mistake
    above: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """Return the fault of ``value`` and its remedy, or None."""
        bounds = (
            (self.least, lambda bound: value >= bound, "at least", "larger"),
            (self.above, lambda bound: value > bound, "above", "larger"),
            (self.below, lambda bound: value < bound, "below", "smaller"),
            (self.most, lambda bound: value <= bound, "at most", "smaller"),
        )
        for bound, holds, words, other in bounds:
            if bound is not None and not holds(bound):  # NaN fails every comparison
                return f"must be {words} {bound}. Set a {other} value."
        return None


Count = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # the seeds that NumPy takes
AnyPath = Annotated[str, "path"]  # or a Hub id; ~ is the home directory, even in YAML and in --model=~/x
METAVARS = {AnyPath: "PATH", int: "N", float: "X", str: "TEXT"}


def flag(default: Any, help: str, bare: str | None = None) -> Any:
    """Return a dataclass field that is also a flag. ``default`` is written here and nowhere else.

    ``bare`` is the value of a flag without an argument. In YAML, `true` stands for it, and `false` for the default.
    """
    # argparse formats help texts with %, so a literal per cent sign must be doubled.
    metadata = {"help": help.replace("%", "%%")} | ({"nargs": "?", "const": bare} if bare else {})
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(kind: type[T], description: str, argv: list[str] | None = None) -> tuple[T, Path | None]:
    """Return a filled ``kind`` and the path given with ``--config``, if any.

    Precedence: defaults < ``--config FILE.yaml`` < flags. Raise UserError for a value of the wrong type. Raise one for
    all other faults together: unknown flags, values out of their `Range`, and broken ``rules`` of any base class. A
    rule is a pair: whether it holds, and the message if it does not.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = "%(prog)s [--flag value ...]"  # the list of all flags would fill a screen
    parser = _Parser(groups(kind), usage=usage, description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the flags below; flags beside it win")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    path = parser.parse_known_args(argv)[0].config
    flags = _yaml_flags(Path(path).expanduser(), fields) if path else []
    *parts, _, unknown = parser.parse_args_into_dataclasses(
        flags + argv, look_for_args_file=False, return_remaining_strings=True
    )
    # Show only the names, because a value may be a secret.
    unknown = [given.partition("=")[0] for given in unknown if given.startswith("--")] or unknown[:1]
    config = kind(**{name: value for part in parts for name, value in vars(part).items()})
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if AnyPath in (hint, *get_args(hint)) and (value := getattr(config, name)):
            one = isinstance(value, str)
            setattr(config, name, os.path.expanduser(value) if one else [os.path.expanduser(item) for item in value])
    rules = [*_ranges(config)]
    for part in kind.__mro__:
        rules += vars(part)["rules"](config) if "rules" in vars(part) else []
    broken = [_unknown(given, list(fields)) for given in unknown] + [message for holds, message in rules if not holds]
    require(not broken, "\n".join(broken))
    return config, Path(path) if path else None


def groups(kind: type) -> list[type]:
    """Return one dataclass per group of flags. Base classes with the same ``title`` form one group.

    If ``kind`` has ``needed_most``, the flags that it names form the first group.
    """
    hints, fields = get_type_hints(kind, include_extras=True), {field.name: field for field in dataclasses.fields(kind)}
    first = getattr(kind, "needed_most", ())
    grouped: dict[str, list[tuple[str, Any, Any]]] = {"needed most": []} if first else {}
    for part in kind.__mro__:
        for name in vars(part).get("__annotations__", {}):
            default, factory = fields[name].default, fields[name].default_factory
            metadata = {**fields[name].metadata, "metavar": _metavar(hints[name])}
            field = dataclasses.field(default=default, metadata=metadata)
            if factory is not dataclasses.MISSING:
                field = dataclasses.field(default_factory=factory, metadata=metadata)
            grouped.setdefault("needed most" if name in first else part.title, []).append((name, hints[name], field))
    if first:
        grouped["needed most"].sort(key=lambda member: first.index(member[0]))
    return [
        dataclasses.make_dataclass("Group", members, namespace={"_argument_group_name": title})
        for title, members in grouped.items()
    ]


def _metavar(hint: Any) -> str | None:
    """Return the word for a flag's value in --help, or None for a switch and for a choice."""
    parts = [hint]
    for part in parts:
        parts += get_args(part)
    return next((word for kind, word in METAVARS.items() if kind in parts), None)


class _Formatter(HelpFormatter):
    """Wrap the paragraphs of the description, except code. Show each default once, if there is one."""

    def _fill_text(self, text, width, indent):
        fill = partial(HelpFormatter._fill_text, self, width=width, indent=indent)
        return "\n\n".join(part if part.startswith(" ") else fill(part) for part in text.strip().split("\n\n"))

    def _get_help_string(self, action):
        hidden = action.default in (None, False) or action.default == [] or action.dest in ("help", "config")
        default = repr(action.default) if action.default == " " else "%(default)s"
        return action.help if hidden else f"{action.help} (default: {default})"

    def _format_action_invocation(self, action):
        # HfArgumentParser also accepts --like-this; listing each flag twice would only make the help longer.
        if action.option_strings and action.dest != "help":
            is_switch = action.nargs == 0 or (action.nargs == "?" and not action.choices)
            value = "" if is_switch else " " + self._format_args(action, action.dest.upper())
            return action.option_strings[0] + value.replace(f"[{action.metavar} ...]", "...")
        return HelpFormatter._format_action_invocation(self, action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage first. One line is enough.
        message = re.sub(r"argument (--\w+)(/--[\w-]+)?", r"\1", message)
        if found := re.fullmatch(r"(--\w+): invalid (int|float) value: '(.*)'", message, re.DOTALL):
            kind = "a whole number" if found[2] == "int" else "a number"
            raise UserError(f"{found[1]} {shlex.quote(found[3])}: must be {kind}. Set one, such as 1.")
        if found := re.fullmatch(r"(--\w+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message, re.DOTALL):
            raise UserError(f"{found[1]} {shlex.quote(found[2])}: unknown. Use one of {found[3]}.")
        raise UserError(f"{message}. Run with --help to see all flags.")


def _ranges(config: Any) -> Iterator[tuple[bool, str]]:
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for part in (hint, *get_args(hint)):  # Count, or Count | None
            limits = [extra for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Range)]
            value = getattr(config, name)
            if limits and value is not None:
                rule = limits[0].broken_by(value)
                yield rule is None, f"--{name} {value}: {rule}"


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number. YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml_flags(path: Path, fields: dict[str, dataclasses.Field]) -> list[str]:
    """Return the file's settings as command line arguments, so that one parser checks every type."""
    try:
        text = path.read_text(encoding="utf-8")
        typed = yaml.load(text, _Loader) or {}
        raw = yaml.load(text, yaml.BaseLoader) or {}  # every scalar is text: `compile: on` stays "on", not True
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}. Pass an existing YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)  # the whole message quotes the line, which may be a secret
        fault = f"line {mark.line + 1}, {error.problem}" if mark else root_cause(error)
        raise UserError(f"--config {path}: not valid YAML ({fault}). Pass a valid file.") from error
    if not isinstance(typed, dict):
        raise UserError(f"--config {path}: must be a mapping of flags. Use lines such as `batch_size: 8`.")
    flags = []
    for key, value in typed.items():
        if key not in fields:
            raise UserError(f"--config {path}: {_unknown(str(key), list(fields))}")
        takes_one = fields[key].default_factory is dataclasses.MISSING
        is_list = f"--config {path}: {key}: takes one value, not a list. Remove the brackets."
        require(not (isinstance(value, list) and takes_one), is_list)
        if isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{key}", *raw[key]] if value else []
        elif value is not None:
            metadata, default = fields[key].metadata, fields[key].default
            meanings = {True: metadata["const"], False: default} if "const" in metadata else {}
            flags.append(f"--{key}={meanings.get(value, raw[key])}")
    return flags


def _unknown(given: str, names: list[str]) -> str:
    """Return the message about an unknown flag or key."""
    name, prefix = given.lstrip("-").replace("-", "_"), "--" if given.startswith("-") else ""
    if name in REMOVED:
        return f"{given}: no longer a flag. {REMOVED[name]}."
    if name in TRAINER and "learning_rate" in names:
        return f"{given}: a flag of the Trainer. {TRAINER[name]}."
    near = difflib.get_close_matches(name, names, n=1)
    return f"{given}: unknown. " + (f"Use {prefix}{near[0]}." if near else "Run with --help to see all flags.")
