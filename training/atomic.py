"""Files and directories that are complete or absent, even if a save fails or the process dies.

write_directory(run_dir / "model", lambda directory: model.save_pretrained(directory), num_bytes)
"""

import ctypes
import errno
import fcntl
import functools
import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from cli.errors import SaveError, UserError, root_cause, save_advice, warn

WRITING, COMPLETE = ".being-written", ".complete"  # suffixes of names that exist only during a save
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_warn_once = functools.cache(warn)


def write_directory(path: Path, write: Callable[[Path], None], num_bytes: int) -> None:
    """Call ``write`` with a temporary directory. Then replace ``path`` and all its old content by this directory.

    If writing fails, raise SaveError and leave ``path`` unchanged. ``num_bytes`` is the approximate size.
    """
    path, temporary = real_paths(path)
    try:
        begin(path, num_bytes)
        with saving(path, num_bytes):
            write(temporary)
            put(temporary, path)
    finally:
        end(path, num_bytes)


def begin(path: Path, num_bytes: int) -> None:
    """Make the temporary directory of ``path``. Raise SaveError if that fails."""
    path, temporary = real_paths(path)
    with saving(path, num_bytes):
        clean(path)
        temporary.mkdir(parents=True)


def end(path: Path, num_bytes: int) -> None:
    """Remove the temporary directory of ``path``. Raise SaveError if that fails."""
    path, _ = real_paths(path)
    with saving(path, num_bytes):
        clean(path)


def real_paths(path: Path) -> tuple[Path, Path]:
    """Return the target of ``path``, which may be a symbolic link to a larger disk, and its temporary directory."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(f".{path.name}{WRITING}")


def put(temporary: Path, path: Path) -> None:
    """Put a complete temporary directory in the place of ``path``.

    Each file, the directory and its parent are synced in this order, so a crash leaves the old directory or the new
    one. File modes follow the umask, even if a library creates private files.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary.rglob("*"):
        if file.is_file():
            with _if_supported():
                file.chmod(0o666 & ~umask)
    _sync_tree(temporary)
    swap_into_place(temporary, path)
    sync(path.parent)


def clean(path: Path) -> None:
    """Remove the remains of an interrupted or failed save of ``path``, and its old content after a successful save."""
    remove_partial_writes(path.parent, glob.escape(path.name))


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}{WRITING}")
    try:
        with saving(path, len(text.encode())):
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
    finally:
        clean(path)


@contextmanager
def saving(path: Path, num_bytes: int) -> Iterator[None]:
    """Raise SaveError if the body cannot write ``path``."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises a plain Exception
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        home = next(parent for parent in path.parents if parent.exists())
        raise SaveError(
            f"{path}: cannot be saved ({root_cause(error)}); it needs {num_bytes:,} bytes and "
            f"{shutil.disk_usage(home).free:,} are free. {save_advice(error)}"
        ) from error


def remove(path: Path) -> None:
    """Delete a file, a symbolic link but not its target, or a directory, in one step if it can be renamed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(WRITING):
        with suppress(OSError):  # overlayfs cannot rename a directory of a lower layer
            path = path.rename(path.with_name(f".{path.name}{WRITING}"))
    shutil.rmtree(path)


def remove_or_warn(path: Path) -> None:
    try:
        remove(path)
    except OSError as error:
        warn(f"{path}: cannot be deleted ({error.strerror}). Change its permissions, or remove it.")


def remove_partial_writes(directory: Path, name: str) -> None:
    """Finish or remove an interrupted save of ``name``, a glob pattern, in ``directory``."""
    for marker in directory.glob(f".{name}{COMPLETE}"):
        path = marker.with_name(marker.name[1:].removesuffix(COMPLETE))
        temporary = path.with_name(f".{path.name}{WRITING}")
        if temporary.exists():
            if path.exists():
                shutil.rmtree(path)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.copytree(temporary, path)
                _sync_tree(path)
            sync(directory)
        marker.unlink()
    for leftover in directory.glob(f".{name}{WRITING}"):
        remove_or_warn(leftover)


def swap_into_place(temporary: Path, path: Path) -> None:
    """Exchange ``temporary`` and ``path`` in one step, so that ``path`` always exists.

    NFS cannot exchange names, and overlayfs cannot rename a directory of a lower layer. There a marker file says that
    ``temporary`` is complete. `remove_partial_writes` then replaces ``path``, even after a crash.
    """
    try:
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EXDEV):
            raise
        path.with_name(f".{path.name}{COMPLETE}").touch()
        sync(path.parent)
        clean(path)


def _exchange(first: Path, second: Path) -> None:
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


@contextmanager
def _if_supported() -> Iterator[None]:
    """Let a change of modes, or a sync of a directory, fail on file systems without it: CIFS, and some on FUSE."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise
        problem = "--output_dir: its file system cannot sync directories or set file modes"
        _warn_once(f"{problem}. After a power cut the last save may be missing.")


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _if_supported() if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_directory(run_dir: Path) -> None:
    """Keep other processes out of a run until this process ends. Raise UserError if one is there already."""
    try:
        fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "Use another directory, or run again after its end"
        raise UserError(f"--output_dir {run_dir}: a run is under way there. {fix}.") from error
