"""Flags: dataclasses, filled from defaults < YAML file < command line.

@dataclass
class TrainConfig:
    batch_size: int = flag(8, "blocks per step")

(config,) = parse([TrainConfig], __doc__)     # reads sys.argv; --config FILE.yaml works for every script
"""

import dataclasses
import difflib
import json
import re
import sys
from argparse import HelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from cli.errors import UserError, require, root_cause


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have; ``above`` and ``below`` are themselves excluded."""

    least: float | None = None
    most: float | None = 10**9  # nobody means more
    above: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """The rule that ``value`` breaks, or None."""
        bounds = (
            (self.least, lambda bound: value >= bound, "at least"),
            (self.above, lambda bound: value > bound, "above"),
            (self.below, lambda bound: value < bound, "below"),
            (self.most, lambda bound: value <= bound, "at most"),
        )
        for bound, holds, words in bounds:
            if bound is not None and not holds(bound):  # a NaN holds nowhere
                return f"must be {words} {bound}"
        return None


Count = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # what NumPy takes


def flag(default: Any, help: str) -> Any:
    """A dataclass field that is also a command line flag. ``default`` is written here and nowhere else."""
    # argparse formats help texts with %, so a literal per cent sign must be doubled.
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Formatter(RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and shows each default once, where there is one."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default != [] and action.dest not in ("help", "config")
        return f"{action.help} (default: %(default)s)" if shown else action.help

    def _format_action_invocation(self, action):
        # HfArgumentParser also accepts --like-this; listing each flag twice would only make the help longer.
        if action.option_strings and action.dest != "help":
            value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
            return action.option_strings[0] + value
        return HelpFormatter._format_action_invocation(self, action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage first; one line is what a person can act on.
        raise UserError(re.sub(r"(--\w+)/--[\w-]+", r"\1", message) + "; see --help")


def parse(dataclass_types: list[type], description: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Returns one filled instance of each dataclass and, last, the path given with ``--config`` or None.

    Precedence: defaults < ``--config FILE.yaml`` < flags. Raises UserError for an unknown flag or key, for values of
    the wrong type, and for all values at once that are out of their ``Range`` or break their dataclass's ``rules()``.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(dataclass_types, description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="a YAML file of the flags below; flags given beside it win"
    )
    names = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)]
    path = parser.parse_known_args(argv)[0].config
    flags = _yaml_flags(Path(path), names) if path else []
    *instances, _, unknown = parser.parse_args_into_dataclasses(
        flags + argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].partition("=")[0]  # what follows may be a secret
        raise UserError(f"unknown argument {name!r}{_suggest(name.lstrip('-'), names, '--')}; see --help")
    rules = [rule for instance in instances for rule in (*_ranges(instance), *instance.rules())]
    broken = [message for holds, message in rules if not holds]
    require(not broken, "\n".join(broken))
    return *instances, Path(path) if path else None


def _ranges(instance: Any) -> Iterator[tuple[bool, str]]:
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        for part in (hint, *get_args(hint)):  # Count, or Count | None
            limits = [extra for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Range)]
            value = getattr(instance, name)
            if limits and value is not None:
                rule = limits[0].broken_by(value)
                yield rule is None, f"--{name} {value}: {rule}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; everyone else reads a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml_flags(path: Path, names: list[str]) -> list[str]:
    """The file's settings as command line arguments, so that one parser checks every type."""
    try:
        text = path.read_text(encoding="utf-8")
        typed = yaml.load(text, _Loader) or {}
        raw = yaml.load(text, yaml.BaseLoader) or {}  # every scalar as written: `compile: on` stays "on", not True
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)  # the whole message would quote the line, be it a secret
        fault = f"line {mark.line + 1}, {error.problem}" if mark else root_cause(error)
        raise UserError(f"--config {path}: not valid YAML ({fault}); mend the file") from error
    if not isinstance(typed, dict):
        raise UserError(f"--config {path}: must be a mapping of flags, such as `batch_size: 8`")
    flags = []
    for key, value in typed.items():
        if key not in names:
            raise UserError(f"--config {path}: unknown key {key!r}{_suggest(str(key), names)}; the keys are the flags")
        if isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{key}", *raw[key]] if value else []
        elif value is not None:
            flags.append(f"--{key}={raw[key]}")
    return flags


def _suggest(name: str, names: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    return f": did you mean {prefix}{near[0]}?" if near else ""
