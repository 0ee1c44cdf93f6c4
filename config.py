"""Settings: dataclasses, filled from defaults < YAML file < command line, and the one place that says "that is wrong".

@dataclass
class TrainConfig:
    batch_size: int = flag(8, "blocks a micro-batch")

(config,) = parse([TrainConfig], __doc__)     # reads sys.argv; --config FILE.yaml is understood everywhere
"""

import dataclasses
import difflib
import functools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from argparse import HelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, get_args, get_type_hints

import datasets
import huggingface_hub
import torch
import transformers
import yaml
from huggingface_hub.errors import HfHubHTTPError
from transformers import HfArgumentParser


class UserError(ValueError):
    """What the user gave is wrong. The message names the value, the rule and the fix, one line a mistake."""

    exit_code = 2


class SaveError(UserError):
    """Something cannot be written: the disk is full, read-only or broken. What was written before is whole."""

    exit_code = 5


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


def require(holds: bool, message: str) -> None:
    """Raises a UserError with ``message`` unless the rule holds."""
    if not holds:
        raise UserError(message)


def warn(text: str) -> None:
    with suppress(OSError):  # the disk may be full that stderr goes to
        print(f"warning: {text}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The innermost cause of an error as one line: libraries, but not the Hub's, wrap what matters."""
    while (cause := error.__cause__) is not None and not any(isinstance(e, HfHubHTTPError) for e in (error, cause)):
        error = cause
    return " ".join(str(error).split())[:300]


@functools.cache
def find_hub() -> None:
    """Where the Hub does not answer, only its cache is used from here on; else each file would cost half a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # which ones, depends on the HTTP library that the Hub's client uses
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's ``main`` and turns a UserError into plain lines on stderr and its exit code."""
    # What libraries say of their own accord would hide the one line that matters.
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    threading.excepthook = _thread_failed
    code: Any = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code or 0
    except BrokenPipeError:  # whoever read our output has seen enough
        drop_output(sys.stdout)
        code = 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        known = as_user_error(error)
        if known is None:
            raise
        with suppress(OSError):
            for line in str(known).splitlines():
                print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        if isinstance(known, SaveError):
            drop_output(sys.stdout, sys.stderr)
        code = known.exit_code
    finally:
        for child in multiprocessing.active_children():  # a DataLoader worker that hangs would outlive us
            child.kill()
    # Python takes a while to end, and a signal would show as a traceback: a second one ends it at once.
    with suppress(OSError):
        sys.stdout.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(code)  # Gloo's threads may wait for Python, which at its end waits for them
    sys.exit(code)


def drop_output(*streams: TextIO) -> None:
    """What cannot be written must not turn into another exit code when Python ends."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _thread_failed(failure: Any) -> None:
    """TensorBoard writes in a thread; when the disk is full the main thread is told as well and says so in one line."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on a CPU PyTorch has no class of its own for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def as_user_error(error: Exception) -> UserError | None:
    """What a person can act on, whoever raised it; None for what is a mistake of ours."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return UserError(f"out of memory ({one_line(error)}); lower --batch_size or --block_size")
    # The compiler takes a second to import, and raises nothing before.
    if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return UserError(f"torch.compile failed ({one_line(error)}); go on with --compile off --resume")
    if isinstance(error, OSError) and error.errno in (EACCES, EPERM, ENAMETOOLONG, ENOTDIR):
        return UserError(f"{error.filename}: {error.strerror}; give another path or the right to write there")
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EROFS, EIO):
        return SaveError(
            f"{error.filename or 'the output'}: {error.strerror}; make room there, then go on with --resume"
        )
    return None


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
        fault = f"line {mark.line + 1}, {error.problem}" if mark else one_line(error)
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
