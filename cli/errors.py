"""Errors that a user can act on: one line on stderr and an exit code."""

import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError

# The remedy before the next try, by the number of the error in writing a file.
REPAIRS = {ENOSPC: "making room", EDQUOT: "making room", EFBIG: "making room", EROFS: "making the disk writable"}
REPAIRS |= {EACCES: "changing its permissions", EPERM: "changing its permissions"}


class UserError(ValueError):
    """The input is wrong. The message names the value, the fault and the remedy, one line per mistake."""

    exit_code = 2


class NoMemoryError(UserError):
    """Memory ran out."""


class SaveError(UserError):
    """A file cannot be written: the disk is full, read-only or broken. Files written before are intact."""

    exit_code = 5


def require(holds: bool, message: str) -> None:
    """Raise UserError with ``message`` unless the rule holds."""
    if not holds:
        raise UserError(message)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    with suppress(OSError):  # stderr may go to a full disk
        print(f"warning: {without_credentials(text)}", file=sys.stderr)


def without_credentials(value: Any) -> Any:
    """Return a text, or the texts of a list, with user and password removed from URLs. Other values stay."""
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return re.sub(r"(?<=://)[^/\s?#]*@", "", value) if isinstance(value, str) else value


def root_cause(error: BaseException) -> str:
    """Return the innermost cause of an error as one line. Libraries wrap it, except the Hub's libraries."""
    while (cause := error.__cause__) is not None and not any(isinstance(e, HfHubHTTPError) for e in (error, cause)):
        error = cause
    return without_credentials(" ".join(str(error).split()))[:300]


def save_advice(error: BaseException) -> str:
    """Return the remedy for an error in writing a file."""
    in_rust = re.search(r"os error (\d+)", str(error))  # the text of an error in safetensors or tokenizers
    number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
    return f"Run again after {REPAIRS.get(number, 'checking the disk')}; train.py goes on with --resume."


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main``. Turn a UserError into plain lines on stderr and its exit code."""
    for name in ("stdin", "stdout", "stderr", "__stderr__"):  # a closed stream, as after `>&-`, is None
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a character that its encoding lacks must not end a run
    # Messages of libraries would hide the one line that matters.
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    threading.excepthook = _thread_failed
    code: Any = 0
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code or 0
    except BrokenPipeError:  # as after `| head`
        drop_output(sys.stdout)
        code = 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        known = as_user_error(error)
        if known is None:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # if rank 0 fails as well, it reports the error, and torchrun ends this rank
        with suppress(OSError):
            for line in without_credentials(str(known)).splitlines():
                print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        code = known.exit_code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop_output(stream)
    # While Python exits, a signal would print a traceback. So exit at once instead.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(code)  # a normal exit waits for Gloo's threads, which may wait for Python
    sys.exit(code)


def drop_output(stream: TextIO) -> None:
    """Send a stream to /dev/null, so that a failing flush at exit does not change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _thread_failed(failure: Any) -> None:
    """Print no traceback for a full disk in TensorBoard's thread, because the main thread reports it, too."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. A CPU, CUDA's driver, cuBLAS and NCCL raise a plain RuntimeError for that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, NoMemoryError)) or "allocate memory" in str(error):
        return True
    texts = ("out of memory", "STATUS_ALLOC_FAILED", "Failed to CUDA")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def as_user_error(error: Exception) -> UserError | None:
    """Return an error that the user can act on, from any library, or None for a bug."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        fix = "Use a smaller batch, shorter text or a smaller model."
        return NoMemoryError(f"out of memory ({root_cause(error)}). {fix}")
    frames = traceback.extract_tb(error.__traceback__)
    if frames and "torch/distributed/tensor/" in frames[-1].filename:
        return UserError(
            f"--strategy fsdp: an operation does not support sharded tensors ({root_cause(error)}). "
            "Use --strategy ddp, or another optimizer."
        )
    if isinstance(error, RuntimeError) and "not have a deterministic implementation" in str(error):
        return UserError(
            f"--deterministic: {str(error).split(' does ')[0]} has only a version whose sums run in any order. "
            "Use --deterministic off."
        )
    # The compiler takes a second to import. Until then it cannot have raised.
    if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return UserError(
            f"--compile: failed ({root_cause(error)}). Pass --compile off, with --resume if the run has begun."
        )
    if isinstance(error, OSError) and error.errno in (EACCES, EPERM, ENAMETOOLONG, ENOTDIR):
        return UserError(f"{error.filename}: {error.strerror}. Use another path, or change its permissions.")
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EROFS, EIO):
        return SaveError(f"{error.filename or 'the output'}: {error.strerror}. {save_advice(error)}")
    return None
