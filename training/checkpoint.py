"""Directories and files that are complete or absent: atomic save, verified load, retention.

    save(path := run_dir / "checkpoints" / "step-000100", tensors={"weights": {...}}, state={"step": 100})
    prune(run_dir / "checkpoints", keep=2, newest=path)
    state, tensors = load(newest(run_dir / "checkpoints"))

A checkpoint holds safetensors and JSON only, so that loading one can run no code. Its manifest holds the size and the
SHA-256 of each file, so that damage is noticed.
"""

import ctypes
import errno
import functools
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli.errors import SaveError, UserError, root_cause, save_advice, warn

MANIFEST = "manifest.json"
WRITING, COMPLETE = ".being-written", ".complete"  # suffixes of names that exist only during a save
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_warn_once = functools.cache(warn)


class NoCheckpointError(UserError):
    """No checkpoint is usable."""

    exit_code = 3


def save(path: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
    """Write ``tensors`` as one safetensors file per group, and ``state`` as JSON. Afterwards ``path`` is complete."""

    def write(directory: Path) -> None:
        for group, content in tensors.items():
            save_file(
                {name: tensor.contiguous() for name, tensor in content.items()}, directory / f"{group}.safetensors"
            )
        (directory / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in directory.iterdir()}
        (directory / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")

    write_directory(path, write, sum(tensor.nbytes for content in tensors.values() for tensor in content.values()))


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Return (state, tensors by group) of a verified checkpoint, with tensors on the CPU."""
    listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    tensors = {Path(name).stem: load_file(path / name) for name in listed if name.endswith(".safetensors")}
    return json.loads((path / "state.json").read_text(encoding="utf-8")), tensors


def newest(directory: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is none at all.

    Warn about each newer one that is damaged. Raise NoCheckpointError if all are.
    """
    paths = _checkpoints(directory)
    for path in reversed(paths):
        damage = verify(path)
        if damage is None:
            return path
        warn(f"{path}: {damage}; trying the checkpoint before it")
    if paths:
        raise NoCheckpointError(f"{directory}: no checkpoint there is intact. Use --overwrite to start over.")
    return None


def verify(path: Path) -> str | None:
    """Return the damage of a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in {"state.json": {}, **manifest}.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def prune(directory: Path, keep: int, newest: Path) -> None:
    """Delete all checkpoints except ``newest``, which was just saved, and the ``keep - 1`` before it.

    Later ones are damaged, or the run would have resumed from them. So they must not count among those to keep.
    """
    paths = _checkpoints(directory)
    until = paths.index(newest) + 1
    for path in paths[: max(0, until - keep)] + paths[until:]:
        _remove_or_warn(path)


def remove(path: Path) -> None:
    """Delete a file, a directory in one step if it can be renamed, or a symbolic link but not its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(WRITING):
        with suppress(OSError):  # overlayfs cannot rename a directory of a lower layer
            path = path.rename(path.with_name(f".{path.name}{WRITING}"))
    shutil.rmtree(path)


def _remove_or_warn(path: Path) -> None:
    try:
        remove(path)
    except OSError as error:
        warn(f"{path}: cannot be deleted ({error.strerror}). Change its permissions, or remove it.")


def write_directory(path: Path, write: Callable[[Path], None], num_bytes: int) -> None:
    """Call ``write`` with a temporary directory, and then replace ``path`` and all its old content by it.

    Each file, the directory and its parent are synced in this order, so a crash leaves the old directory or the new
    one. File modes follow the umask, also if a library creates private files. Raise SaveError, and leave ``path`` as it
    was, if writing fails; ``num_bytes`` is the approximate size.
    """
    path = Path(os.path.realpath(path))  # it may be a symbolic link to a larger disk
    temporary = path.with_name(f".{path.name}{WRITING}")
    with _saving(path, num_bytes):
        remove_partial_writes(path.parent, glob.escape(path.name))
        temporary.mkdir(parents=True)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        for file in temporary.rglob("*"):
            if file.is_file():
                with _if_supported():
                    file.chmod(0o666 & ~umask)
        _sync_tree(temporary)
        swap_into_place(temporary, path)
        _sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}{WRITING}")
    with _saving(path, len(text.encode())):
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)


@contextmanager
def _saving(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizers library raises a plain Exception
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        remove_partial_writes(path.parent, glob.escape(path.name))
        home = next(parent for parent in path.parents if parent.exists())
        raise SaveError(
            f"{path}: cannot be saved ({root_cause(error)}); it needs {num_bytes:,} bytes and "
            f"{shutil.disk_usage(home).free:,} are free. {save_advice(error)}"
        ) from error
    finally:
        remove_partial_writes(path.parent, glob.escape(path.name))  # the old content of `path` goes as well


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
            _sync(directory)
        marker.unlink()
    for leftover in directory.glob(f".{name}{WRITING}"):
        _remove_or_warn(leftover)


def swap_into_place(temporary: Path, path: Path) -> None:
    """Exchange ``temporary`` and ``path`` in one step, so that ``path`` always exists.

    NFS cannot exchange names, and overlayfs cannot rename a directory of a lower layer. There a marker file says that
    ``temporary`` is complete, so that `remove_partial_writes` replaces ``path``, if need be after a crash.
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
        _sync(path.parent)
        remove_partial_writes(path.parent, glob.escape(path.name))


def _exchange(first: Path, second: Path) -> None:
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


def _checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, oldest first, ordered by number: names of a million steps are longer."""
    found = {int(path.name[5:]): path for path in directory.glob("step-*/") if path.name[5:].isdecimal()}
    return [found[step] for step in sorted(found)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _if_supported() -> Iterator[None]:
    """Let a change of modes, or a sync of a directory, fail on file systems without it: CIFS, and some of FUSE."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise
        problem = "--output_dir: its file system cannot sync directories or set file modes"
        _warn_once(f"{problem}. After a power cut the last save may be missing.")


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _if_supported() if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
