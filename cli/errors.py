"""Errors that a user can act on: one line on stderr and an exit code."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import Any, NoReturn, TextIO

import datasets
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError


class UserError(ValueError):
    """What the user gave is wrong. The message names the value, the rule and the fix, one line a mistake."""

    exit_code = 2


class SaveError(UserError):
    """Something cannot be written: the disk is full, read-only or broken. What was written before is whole."""

    exit_code = 5


def require(holds: bool, message: str) -> None:
    """Raises a UserError with ``message`` unless the rule holds."""
    if not holds:
        raise UserError(message)


def warn(text: str) -> None:
    with suppress(OSError):  # the disk may be full that stderr goes to
        print(f"warning: {text}", file=sys.stderr)


def root_cause(error: BaseException) -> str:
    """The innermost cause of an error as one line: libraries, but not the Hub's, wrap what matters."""
    while (cause := error.__cause__) is not None and not any(isinstance(e, HfHubHTTPError) for e in (error, cause)):
        error = cause
    return " ".join(str(error).split())[:300]


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
        return UserError(f"out of memory ({root_cause(error)}); lower --batch_size or --block_size")
    # The compiler takes a second to import, and raises nothing before.
    if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return UserError(f"torch.compile failed ({root_cause(error)}); go on with --compile off --resume")
    if isinstance(error, OSError) and error.errno in (EACCES, EPERM, ENAMETOOLONG, ENOTDIR):
        return UserError(f"{error.filename}: {error.strerror}; give another path or the right to write there")
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EROFS, EIO):
        return SaveError(
            f"{error.filename or 'the output'}: {error.strerror}; make room there, then go on with --resume"
        )
    return None
